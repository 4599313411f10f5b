"""What the net tests put behind a NIC: numbered frames, passt's end of its stream, taps, links."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

from harness.frames import GUEST_MAC, ethernet
from harness.netns import NetNs
from harness.nic import Nic
from motorcade.orchestrator import netbackend

HOST, GUEST = "10.0.0.1", "10.0.0.2"
OTHER_MAC = bytes.fromhex("525400aabbcc")


def numbered(n: int, size: int = 60) -> bytes:
    """A frame that says which one it is."""
    return ethernet(GUEST_MAC, OTHER_MAC, 0x88B5, b"%08d" % n).ljust(size, b".")


def numbers(frames: list[bytes]) -> list[int]:
    """Which ones they are."""
    return [int(frame[14:22]) for frame in frames]


class Wire:
    """passt's end of the stream: frames behind their length."""

    def __init__(self) -> None:
        self.end, self.nics = socket.socketpair()
        self.end.settimeout(20)

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.end.close()
        self.nics.close()

    @property
    def fds(self) -> dict[str, int]:
        """By the label of the sidecar."""
        return {"passt": self.nics.fileno()}

    @staticmethod
    def pack(frame: bytes) -> bytes:
        """A frame on the stream."""
        return struct.pack("!I", len(frame)) + frame

    def send(self, *frames: bytes) -> None:
        """All at once."""
        self.end.sendall(b"".join(map(self.pack, frames)))

    def all_read(self) -> bool:
        """Nothing that was sent is still in the socket."""
        return int.from_bytes(fcntl.ioctl(self.end, termios.TIOCOUTQ, bytes(4)), sys.byteorder) == 0

    def recv(self) -> bytes:
        """The next frame."""
        (size,) = struct.unpack("!I", self.exactly(4))
        return self.exactly(size)

    def exactly(self, n: int) -> bytes:
        """The next ``n`` bytes."""
        data = b""
        while len(data) < n:
            piece = self.end.recv(n - len(data))
            assert piece
            data += piece
        return data


@contextlib.contextmanager
def tap(ns: NetNs, name: str, pairs: int = 1) -> Iterator[dict[str, int]]:
    """A tap with a carrier, whose host knows the guest's MAC; its descriptors by label."""
    ns.add_tap(name, multi_queue=pairs > 1)
    ns.ip("neigh", "add", GUEST, "lladdr", GUEST_MAC.hex(":"), "dev", name)
    fds = ns.call(netbackend.open_tap, name, pairs)
    try:
        ns.wait_carrier(name)
        yield {f"tap.{i}": fd for i, fd in enumerate(fds)}
    finally:
        for fd in fds:
            os.close(fd)


@contextlib.contextmanager
def link(path: Path) -> Iterator[dict[str, int]]:
    """One end of the link that is made at ``path``; its descriptor by label."""
    fd = netbackend.link(str(path))
    try:
        yield {"link": fd}
    finally:
        os.close(fd)


def used(nic: Nic) -> list[int]:
    """Where the device stands in each queue."""
    return [q.used_idx for q in nic.queues]
