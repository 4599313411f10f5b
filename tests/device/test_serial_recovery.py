"""A console whose sidecar is killed while the guest prints and somebody types, and its successors."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import shutil
import struct
import tempfile
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.console import SerialSidecar, read_until
from harness.driver import Queue
from harness.uart_ring import UartRing
from motorcade.proto import messages as m

KILLS = 12


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose path leaves room for a socket's name (107 bytes)."""
    path = Path(tempfile.mkdtemp(prefix="mc-"))
    yield path
    shutil.rmtree(path)


class Console:
    """A virtio console, and whatever process serves it now. A context manager, which ends that."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack, backend_fd: int | None = None) -> None:
        self._folder, self._stack, self._generation = folder, stack, 0
        self._backend = {} if backend_fd is None else {"backend": "file", "backend_fd": backend_fd}
        self.sidecar = self._start()
        self.rx, self.tx = self.sidecar.start()

    def _start(self, predecessor: SerialSidecar | None = None) -> SerialSidecar:
        self._generation += 1
        sidecar = SerialSidecar(
            self._folder / f"{self._generation}.sock",
            scrollback=1 << 20,
            incoming=predecessor is not None,
            predecessor=predecessor,
            takes_over=predecessor is not None,
            **self._backend,  # type: ignore[arg-type]
        )
        return self._stack.enter_context(sidecar)

    def die(self) -> None:
        """kill -9, and another takes its place."""
        self.sidecar.kill()
        self.sidecar = self._start(self.sidecar)
        self.sidecar.take_over()


def line(n: int) -> bytes:
    return b"%d:" % n + b"abcdefghij"[n % 10 : n % 10 + 1] * (n * 37 % 400) + b"\n"


def print_through_kills(console: Console, tx: Queue, rng: random.Random) -> int:
    """Lines, some of which are under way at each kill, all acknowledged in the end. How many."""
    count = 0
    for _ in range(KILLS):
        pending = []
        for _ in range(rng.randrange(1, 60)):
            text = line(count)
            cut = rng.randrange(len(text) + 1)
            pending.append(tx.submit(out=[piece for piece in (text[:cut], text[cut:]) if piece]))
            count += 1
        tx.kick()
        if rng.random() < 0.5:
            tx.wait(rng.randrange(1, len(pending) + 1))
        console.die()
        tx.kick()
        while not all(request.done for request in pending):
            tx.wait(1)
    return count


def test_output_is_printed_once_through_kills(short: Path) -> None:
    """Who comes late sees all of it, each line once and whole."""
    with contextlib.ExitStack() as stack:
        console = Console(short, stack)
        count = print_through_kills(console, console.tx, random.Random(1))
        with console.sidecar.client() as client:
            said = read_until(client.fileno(), line(count - 1))
        assert said == b"".join(line(n) for n in range(count))


def test_the_first_line_of_each_successor_is_whole(short: Path) -> None:
    """It is not taken for the one that its predecessor had begun."""
    with contextlib.ExitStack() as stack:
        console = Console(short, stack)
        for n in range(3):
            console.tx.run(out=[line(10 + n)])
            console.die()
        with console.sidecar.client() as client:
            assert read_until(client.fileno(), line(12)) == line(10) + line(11) + line(12)


def test_a_file_gets_all_output_through_kills(short: Path) -> None:
    """Once: its size says how far it has come."""
    path = short / "out"
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, fd)
        console = Console(short, stack, fd)
        count = print_through_kills(console, console.tx, random.Random(2))
        assert console.sidecar.shutdown() == 0
    assert path.read_bytes() == b"".join(line(n) for n in range(count))


def test_a_16550_prints_each_byte_once_through_kills(short: Path) -> None:
    """The ring is full most of the time: a kill finds the sidecar at work."""
    text = b"".join(line(n) for n in range(4500))
    at, old = 0, None
    with UartRing() as ring, contextlib.ExitStack() as stack:
        for generation in range(KILLS):
            sidecar = SerialSidecar(
                short / f"{generation}.sock", ring=ring, scrollback=1 << 20, predecessor=old, takes_over=old is not None
            )
            stack.enter_context(sidecar)
            while at < len(text) * (generation + 1) // (KILLS + 1):
                at += ring.put(text[at : at + 4096])
            sidecar.kill()
            old = sidecar
        with SerialSidecar(short / "c.sock", ring=ring, scrollback=1 << 20, predecessor=old, takes_over=True) as last:
            ring.print(text[at:])
            with last.client() as client:
                assert read_until(client.fileno(), text[-9:]) == text


def test_input_that_waits_for_the_guest_outlives_the_process(short: Path) -> None:
    with contextlib.ExitStack() as stack:
        console = Console(short, stack)
        with console.sidecar.client() as client:
            client.sendall(b"typed before")
            # Read by the sidecar, whose data loop has been round since: it has nowhere to put it.
            while struct.unpack("i", fcntl.ioctl(client, termios.TIOCOUTQ, bytes(4)))[0]:
                pass
            console.sidecar.ask(m.Ping())
        console.die()
        with console.sidecar.client() as client:
            client.sendall(b", and after")
            got = b""
            while len(got) < 23:
                request = console.rx.submit(into=[64])
                console.rx.kick()
                console.rx.wait(1)
                got += request.data[0][: request.written]
        assert got == b"typed before, and after"
