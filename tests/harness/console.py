"""A console's client and the serial sidecar with its descriptors, for the serial tests."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from harness.sidecar import Sidecar
from harness.uart_ring import UartRing
from motorcade.orchestrator import charbackend
from motorcade.proto.messages import SerialBoot
from motorcade.sidecars import _serial

TIMEOUT = 20.0  # seconds


def read_exactly(fd: int, n: int, timeout: float = TIMEOUT) -> bytes:
    """``n`` bytes of a descriptor; AssertionError at end of file, TimeoutError, both with what has come."""
    deadline = time.monotonic() + timeout
    data = b""
    while len(data) < n:
        if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError(f"{len(data)} of {n} bytes: {data[-200:]!r}")
        piece = os.read(fd, min(1 << 20, n - len(data)))
        assert piece, f"end of file after {len(data)} of {n} bytes: {data[-200:]!r}"
        data += piece
    return data


def read_until(fd: int, end: bytes, timeout: float = TIMEOUT) -> bytes:
    """Everything up to and with ``end``, which must be the last thing sent so far."""
    deadline = time.monotonic() + timeout
    data = b""
    while not data.endswith(end):
        if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError(f"no {end!r} in {len(data)} bytes: {data[-200:]!r}")
        piece = os.read(fd, 1 << 20)
        assert piece, f"end of file after {len(data)} bytes: {data[-200:]!r}"
        data += piece
    return data


class SerialSidecar(Sidecar):
    """The sidecar with a console socket. ``backend`` is an open CharBackend, owned by the caller. ``incoming``,
    ``predecessor`` and ``takes_over`` as for Sidecar; a ring is never a predecessor's."""

    def __init__(
        self,
        console: Path,
        *,
        ring: UartRing | None = None,
        backend: str = "none",
        backend_fd: int | None = None,
        scrollback: int = 65536,
        cold: bool = False,
        wait: bool = True,
        incoming: bool = False,
        predecessor: Sidecar | None = None,
        takes_over: bool = False,
    ) -> None:
        self.console_path = console
        self._console = charbackend.open_socket(console)
        fds = {"console": self._console.fd, **(ring.fds if ring else {})}
        if backend_fd is not None:
            fds["backend"] = backend_fd
        self._watch = -1
        if backend == "pty" and backend_fd is not None:
            fds["pty-opened"] = self._watch = _serial.lib.mc_serial_watch_pty(backend_fd)
        role = SerialBoot("con0", "uart" if ring else "virtio", backend, scrollback)
        try:
            queues = 0 if ring else 2
            super().__init__(
                "serial",
                role,
                fds,
                queues=queues,
                cold=cold,
                wait=wait,
                incoming=incoming,
                predecessor=predecessor,
                takes_over=takes_over,
            )
        except BaseException:
            self._console.close()
            raise

    def client(self, receive_buffer: int | None = None) -> socket.socket:
        """A connected console; the caller closes it."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        # With a timeout set a full backlog would be an error instead of a wait.
        sock.connect(str(self.console_path))
        sock.settimeout(TIMEOUT)
        return sock

    def counter(self, name: str) -> int:
        """One of its own counters."""
        return next(c.value for c in self.stats().detail if c.name == name)

    def wait_counter(self, name: str, value: int) -> None:
        """Asks until the counter has reached ``value``: each answer is an event of its own, not a sleep."""
        deadline = time.monotonic() + TIMEOUT
        while (now := self.counter(name)) < value:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name} is {now}, not {value}\n{self.log_tail()}")

    def close(self) -> None:
        """Also the listening socket."""
        super().close()
        self._console.close()
        if self._watch >= 0:
            os.close(self._watch)
            self._watch = -1


@contextlib.contextmanager
def uart_sidecar(
    directory: Path,
    *,
    backend: str = "none",
    backend_fd: int | None = None,
    scrollback: int = 65536,
    start: tuple[int, int] = (0, 0),
    cold: bool = False,
    incoming: bool = False,
) -> Iterator[tuple[SerialSidecar, UartRing]]:
    """A sidecar of flavour uart and the core's end of its rings, both empty at positions ``start``."""
    with UartRing() as ring:
        ring.set_start(*start)
        path = directory / "c.sock"
        with SerialSidecar(
            path,
            ring=ring,
            backend=backend,
            backend_fd=backend_fd,
            scrollback=scrollback,
            cold=cold,
            incoming=incoming,
        ) as sidecar:
            yield sidecar, ring
