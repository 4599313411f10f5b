"""Peers of the control plane that do what they should not: hand-made ZMTP, and processes of their own."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Iterator

_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)


class RawPeer:
    """A DEALER made by hand (ZMTP 3.0, RFC 23), that can send any bytes. Owns its socket."""

    def __init__(self, path: str, *, identity: bytes = b"", user_id: bytes = b"", greet: bool = True) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(20)
        self._sock.connect(path)
        self._buffer = bytearray()
        if not greet:
            return
        ready = b"\x05READY"
        properties = {b"Socket-Type": b"DEALER", b"Identity": identity}
        if user_id:
            properties |= {b"User-Id": user_id, b"Peer-Address": b"localhost:0:0:1"}
        for key, value in properties.items():
            ready += bytes([len(key)]) + key + struct.pack(">I", len(value)) + value
        self._sock.sendall(_GREETING + bytes([4, len(ready)]) + ready)

    def __del__(self) -> None:
        self._sock.close()

    def fileno(self) -> int:
        """The socket's, which stays ours."""
        return self._sock.fileno()

    def close(self) -> None:
        """Hangs up."""
        self._sock.close()

    def raw(self, data: bytes) -> None:
        """Sends ``data`` as they are."""
        self._sock.sendall(data)

    def send(self, data: bytes, more: bool = False) -> None:
        """Sends one frame. A connection that the other side has ended takes it silently."""
        flags = int(more)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if len(data) < 256:
                self._sock.sendall(bytes([flags, len(data)]) + data)
            else:
                self._sock.sendall(bytes([flags | 2]) + struct.pack(">Q", len(data)) + data)

    def ready(self) -> bool:
        """Whether the other side has accepted the handshake, without waiting."""
        return self._handshake(b"\x05READY")

    def refused(self) -> bool:
        """Whether the other side has refused the handshake, without waiting."""
        return self._handshake(b"\x05ERROR")

    def closed(self) -> bool:
        """Whether the other side has ended the connection, without waiting."""
        if not self._readable():
            return False
        try:
            return not self._sock.recv(65536)
        except ConnectionResetError:
            return True

    def receive(self) -> bytes:
        """The next frame; waits up to 20 s."""
        head = self._take(2)
        if head[0] & 2:
            (length,) = struct.unpack(">Q", head[1:] + self._take(7))
            return self._take(length)
        return self._take(head[1])

    def _readable(self) -> bool:
        return bool(select.select([self._sock], [], [], 0)[0])

    def _take(self, n: int) -> bytes:
        while len(self._buffer) < n:
            data = self._sock.recv(65536)
            assert data, "the other side ended the connection"
            self._buffer += data
        taken = bytes(self._buffer[:n])
        del self._buffer[:n]
        return taken

    def _handshake(self, word: bytes) -> bool:
        if not self._readable():
            return False
        data = self._sock.recv(65536)
        assert data, "the other side ended the connection"
        self._buffer += data
        if len(self._buffer) < 66 or len(self._buffer) < 66 + self._buffer[65]:
            return False
        command = bytes(self._buffer[66 : 66 + self._buffer[65]])
        del self._buffer[: 66 + len(command)]
        assert command.startswith(word), command
        return True


class PeerProcess:
    """A forked sidecar. It waits for go()."""

    def __init__(self, pid: int, start: int) -> None:
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)
        self._start = start
        self._status: int | None = None

    def go(self) -> None:
        """Lets it connect."""
        os.eventfd_write(self._start, 1)

    def wait(self, seconds: float = 20.0) -> int:
        """Its exit status: 0 shut down by the core, 3 refused, 4 any other exception."""
        if self._status is None:
            assert select.select([self._pidfd], [], [], seconds)[0], "the peer process still runs"
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status

    def end(self) -> None:
        """Kills and reaps it."""
        if self._status is None:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self.wait()
        os.close(self._pidfd)
        os.close(self._start)


@contextlib.contextmanager
def peer_process(
    path: str, device_id: str, *, identity: bytes = b"", user_id: bytes = b"", forge: int = 0
) -> Iterator[PeerProcess]:
    """A process that says hello as ``device_id`` and serves requests, or misbehaves as told.

    ``identity``, ``user_id``: claimed by hand-made ZMTP. ``forge``: answers that request id, which is another's.
    """
    start = os.eventfd(0)
    pid = os.fork()
    if pid == 0:
        status = 4
        try:
            os.eventfd_read(start)
            if identity or user_id:
                status = _thief(path, device_id, identity, user_id)
            else:
                status = _sidecar(path, device_id, forge)
        finally:
            os._exit(status)
    process = PeerProcess(pid, start)
    try:
        yield process
    finally:
        process.end()


def _thief(path: str, device_id: str, identity: bytes, user_id: bytes) -> int:
    from motorcade.proto import schema

    peer = RawPeer(path, identity=identity, user_id=user_id)
    while not peer.ready():
        select.select([peer], [], [], 20)
    peer.send(schema.encode(schema.Message(1, 1, schema.Hello(1, device_id, os.getppid(), 1, 0, (), b""))))
    return 3 if isinstance(schema.decode(peer.receive()).body, schema.Error) else 4


def _sidecar(path: str, device_id: str, forge: int) -> int:
    from motorcade.proto import schema
    from motorcade.proto.framing import ControlClient, Refused

    client = ControlClient()
    client.connect(path, device_id)
    try:
        client.hello(schema.Hello(1, device_id, os.getpid(), 2, 0, (256,), b""), 15)
    except Refused:
        return 3
    if forge:
        client.answer(forge, schema.Ok())
    over: list[bool] = []

    def handle(message: schema.Message) -> None:
        body = message.body
        if isinstance(body, schema.StatsRequest):
            client.answer(message.id, schema.StatsReport((schema.QueueStats(0, requests=7),)))
        elif isinstance(body, schema.Activate):
            client.answer(message.id, schema.Error(schema.ErrorCode.STATE, "not now"))
        else:
            client.answer(message.id, schema.Ok())
        if isinstance(body, schema.Shutdown):
            over.append(True)
        elif not isinstance(body, schema.Ping):
            client.notify(schema.ConfigChanged(b"c"))

    end = time.monotonic() + 30
    while not over and time.monotonic() < end:
        select.select([client], [], [], 1)
        if not client.process(handle):
            return 5
    client.close(linger=10)
    return 0
