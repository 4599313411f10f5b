"""A network namespace of a test's own, without a name: it lives in one thread, and is gone with it."""

from __future__ import annotations

import ctypes
import os
import socket as sockets
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, Self, TypeVar

CLONE_NEWNET = 0x40000000
ETH_P_ALL = 3
PACKET_OUTGOING = 4

P = ParamSpec("P")
T = TypeVar("T")


class NetNs:
    """Runs functions and ``ip`` inside a fresh namespace with ``lo`` up and IPv6 off. Needs root.

    Sockets and taps opened inside stay there wherever they are used."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._thread.submit(_enter).result()
        self.ip("link", "set", "lo", "up")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Calls ``function`` inside."""
        return self._thread.submit(function, *args, **kwargs).result()

    def ip(self, *args: str) -> str:
        """Runs ip(8) inside."""
        run = self.call(subprocess.run, ["ip", *args], capture_output=True, text=True, check=False, timeout=20)
        assert run.returncode == 0, f"ip {' '.join(args)}: {run.stderr}"
        return str(run.stdout)

    def add_tap(self, name: str = "t0", *, address: str = "10.0.0.1/24", multi_queue: bool = False) -> None:
        """A persistent tap, up, with an address."""
        self.ip("tuntap", "add", name, "mode", "tap", *(["multi_queue"] if multi_queue else []))
        self.ip("addr", "add", address, "dev", name)
        self.ip("link", "set", name, "up")

    def wait_carrier(self, name: str = "t0", timeout: float = 20.0) -> None:
        """Until the kernel lets packets out to a tap that was just opened: up to a second later, since it handles
        carrier changes in batches, and drops what is sent before."""
        deadline = time.monotonic() + timeout
        while " state UP " not in self.ip("-o", "link", "show", name):
            assert time.monotonic() < deadline, f"{name} has no carrier after {timeout} s"

    def socket(self, *args: int) -> sockets.socket:
        """A socket inside; the caller closes it."""
        sock = self.call(sockets.socket, *args)
        sock.settimeout(20)
        return sock

    def packets(self, name: str = "t0") -> sockets.socket:
        """A packet socket on an interface: every frame, whole."""
        sock = self.socket(sockets.AF_PACKET, sockets.SOCK_RAW, sockets.htons(ETH_P_ALL))
        sock.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 8 << 20)
        sock.bind((name, ETH_P_ALL))
        return sock


def _enter() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) < 0:
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")
    # Neighbour discovery would come between the test's frames. /proc/sys/net is the reading thread's namespace.
    for where in ("all", "default"):
        path = Path(f"/proc/sys/net/ipv6/conf/{where}/disable_ipv6")
        if path.exists():
            fd = os.open(path, os.O_WRONLY)
            os.write(fd, b"1")
            os.close(fd)
