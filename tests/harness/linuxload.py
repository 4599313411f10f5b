"""The host's end of the program that works and checks itself in a Linux guest (tests/guests/linux/load.c).

Each part has a thread of its own, since it goes on while the VM is frozen: none may run when a VM is started, which
forks. What was wrong is raised by whoever waits for it or stops it.
"""

from __future__ import annotations

import contextlib
import functools
import re
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator

_DEADLINE = 60.0  # seconds, for anything; the box is slow
_PAD = 40
_WINDOW = 3  # lines on their way in
_PERIOD = 65521  # bytes after which a stream repeats itself: a prime, so that nothing is lost in multiples of it
_M64 = (1 << 64) - 1
FRESH = 1_000_000
"""Number of the first line to a guest whose console somebody else has written to before."""


def mix(x: int) -> int:
    """splitmix64, as load.c's."""
    x = (x + 0x9E3779B97F4A7C15) & _M64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _M64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _M64
    return x ^ x >> 31


class Part:
    """A thread that works until it is stopped, or something is wrong."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.changed = threading.Condition()
        self.failure: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._main, name=name)

    def start(self) -> None:
        self._thread.start()

    def _main(self) -> None:
        try:
            while not self._stop.is_set():
                self.step()
        except BaseException as e:
            self.failure = e
        with self.changed:
            self.changed.notify_all()

    def step(self) -> None:
        """Waits a little for something to do, and does it."""
        raise NotImplementedError

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Until it holds; AssertionError if it does not in time."""
        with self.changed:
            held = self.changed.wait_for(lambda: self.failure is not None or condition(), _DEADLINE)
        if self.failure is not None:
            raise AssertionError(f"{self.name}: {self.failure}") from self.failure
        assert held, f"{self.name}: no {what} in {_DEADLINE:g} s: {self}"

    def stop(self) -> None:
        """Ends it, and raises what was wrong."""
        self._stop.set()
        self._thread.join()
        if self.failure is not None:
            raise AssertionError(f"{self.name}: {self.failure}") from self.failure


class Console(Part):
    """A console on which ``load tty`` runs: its lines, and the echoes of ours, are complete, in order, and unharmed.

    ``resumed``: the guest goes on from a template, and others have written to it before. Then what it says first is the
    end of what it had said, and echoes of lines that were under way.
    """

    def __init__(self, name: str, sock: socket.socket, *, resumed: bool = False) -> None:
        super().__init__(name)
        self.lines = self.echoes = 0
        """How many have come; those that a resumed guest had said before, too."""
        self._sock, self._rest = sock, b""
        self._next_line: int | None = None if resumed else 1
        self._next_echo: int | None = None if resumed else 1
        self._resumed = resumed
        self._sent = FRESH - 1 if resumed else 0
        self._under_way = 0
        self._cut = False  # of lines that were under way, the last may have been cut off by ours
        sock.setblocking(False)
        if resumed:
            sock.sendall(b"\n")

    def __str__(self) -> str:
        return f"{self.lines} lines, {self.echoes} echoes, {self._sent} sent; its end: {self._rest!r}"

    def wait_more(self, count: int = 3) -> None:
        """Until so many more lines and echoes have come."""
        lines, echoes = self.lines + count, self.echoes + count
        self.wait(lambda: self.lines >= lines and self.echoes >= echoes, f"{count} more lines and echoes")

    def step(self) -> None:
        while self._under_way < _WINDOW:
            self._sent += 1
            self._under_way += 1
            self._sock.sendall(b"%d %s\n" % (self._sent, pad(self._sent)))
        if not select.select([self._sock], [], [], 0.1)[0]:
            return
        data = self._sock.recv(65536)
        assert data, "the console ended"
        *lines, self._rest = (self._rest + data).split(b"\n")
        with self.changed:
            for line in lines:
                self._take(line)
            self.changed.notify_all()

    def stop(self) -> None:
        """Also hangs up."""
        try:
            super().stop()
        finally:
            self._sock.close()

    def _take(self, line: bytes) -> None:
        if found := re.fullmatch(rb"L (\d+) (\S+)", line):
            n = int(found[1])
            assert n == self._next_line or self._next_line is None, f"line {self._next_line} expected: {line!r}"
            assert found[2] == pad(n), f"damaged: {line!r}"
            self._next_line = n + 1
            self.lines += 1
        elif found := re.fullmatch(rb"E (\d+) (\S+)", line):
            n = int(found[1])
            if n == FRESH and self._resumed:
                self._next_echo, self._resumed = n, False
            if self._resumed and self._next_echo is not None and n == self._next_echo and found[2] != pad(n):
                assert not self._cut and pad(n).startswith(found[2]), f"damaged: {line!r}"
                self._cut = True
                return
            assert n == self._next_echo or self._next_echo is None, f"echo {self._next_echo} expected: {line!r}"
            assert found[2] == pad(n), f"damaged: {line!r}"
            self._next_echo = n + 1
            if n >= FRESH or self._sent < FRESH:
                self.echoes += 1
                self._under_way -= 1
        elif self._resumed and line.startswith(b"E ") and not self._cut:
            self._cut = True
        else:
            assert self.lines == 0, f"neither line nor echo: {line!r}"  # before: what the console said at the start


def pad(n: int) -> bytes:
    """What line ``n`` has after its number."""
    return bytes(ord("a") + mix(n * _PAD + i) % 26 for i in range(_PAD))


class Stream(Part):
    """A server for ``load tcp``: every byte each way follows from its place. Listens until it is stopped."""

    def __init__(self, name: str, address: str, port: int = 0) -> None:
        super().__init__(name)
        self._listener = socket.create_server((address, port))
        self.port: int = self._listener.getsockname()[1]
        self.connections = self.received = 0
        """How often the guest has connected, and bytes, of all its connections."""
        self._peer: socket.socket | None = None
        self._sent = self._got = 0

    def __str__(self) -> str:
        return f"{self.connections} connections, {self.received} bytes"

    def wait_more(self, count: int = 8192) -> None:
        """Until so many bytes more have come."""
        received = self.received + count
        self.wait(lambda: self.received >= received, f"{count} more bytes")

    def step(self) -> None:
        reading = [self._listener] + ([self._peer] if self._peer else [])
        ready, room, _ = select.select(reading, [self._peer] if self._peer else [], [], 0.1)
        if self._listener in ready:
            self._hang_up()
            self._peer = self._listener.accept()[0]
            self._peer.setblocking(False)
            self._peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
            self._sent = self._got = 0
            self.connections += 1
            return
        if self._peer is None:
            return
        if ready:
            data = self._peer.recv(65536)
            assert data, "the guest has closed the connection"
            expected = stream_bytes(self._got, len(data), 2 << 40)
            assert data == expected, f"damaged, after {self._got} bytes"
            self._got += len(data)
            with self.changed:
                self.received += len(data)
                self.changed.notify_all()
            # As much as comes goes back: the guest sets the pace.
            if room:
                self._sent += self._peer.send(stream_bytes(self._sent, len(data), 1 << 40))

    def stop(self) -> None:
        """Also closes its sockets."""
        try:
            super().stop()
        finally:
            self._listener.close()
            self._hang_up()

    def _hang_up(self) -> None:
        """By a reset. An orderly end would wait for a guest that is gone, and then answer what was the same guest some
        time before, which would not hear that its connection is no more."""
        if self._peer is not None:
            self._peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._peer.close()


def stream_bytes(position: int, size: int, key: int) -> bytes:
    """So many bytes of a stream from there on. ``key``: 1 << 40 is what we send, 2 << 40 what the guest does."""
    at = position % _PERIOD
    table = _table(key)
    return (table * (2 + size // _PERIOD))[at : at + size]


@functools.cache
def _table(key: int) -> bytes:
    return b"".join(mix(n + key).to_bytes(8, "little") for n in range(_PERIOD // 8 + 1))[:_PERIOD]


@contextlib.contextmanager
def working(*parts: Part) -> Iterator[None]:
    """These parts work meanwhile; what is wrong with any is raised at the end, unless something else was."""
    started: list[Part] = []
    try:
        for part in parts:
            part.start()
            started.append(part)
        yield
    finally:
        failures = []
        for part in started:
            try:
                part.stop()
            except AssertionError as e:
                failures.append(str(e))
    assert not failures, "\n".join(failures)
