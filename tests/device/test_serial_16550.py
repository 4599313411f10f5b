"""Both real ends of the rings together: the core's 16550 in C, without a VM, and the serial sidecar's process."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import select
import shutil
import socket
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.console import TIMEOUT, SerialSidecar, read_exactly, uart_sidecar
from harness.uart_ring import RX_SIZE, TX_SIZE, UartRing
from motorcade.core._native import ffi, lib
from motorcade.proto import messages as m

THR = RBR = 0
IIR_FCR, LSR = 2, 5
LSR_DR, LSR_THRE = 0x01, 0x20


class Guest:
    """A driver that polls the 16550's registers, and the core's main loop that polls ``uart.rx``."""

    def __init__(self, ring: UartRing, state: bytes = b"") -> None:
        """``state``: of a chip in another process, as ``save`` gave it. Nothing moves before ``poll`` then."""
        self.rx_event = ring.rx_event
        self.uart = ffi.new("struct mc_uart *")
        assert lib.mc_uart_init(self.uart, -1, 4) == 0
        self.ring = lib.mc_uart_ring_map(ring.fd)
        assert self.ring != ffi.NULL
        if state:
            regs = ffi.new("struct mc_uart_regs *")
            ffi.buffer(regs)[:] = state
            assert lib.mc_uart_restore(self.uart, regs) == 0
        lib.mc_uart_attach(self.uart, self.ring, ring.tx_event, ring.rx_event)
        if not state:
            lib.mc_uart_write(self.uart, IIR_FCR, 1)

    def poll(self) -> None:
        """The core at start and at resume."""
        lib.mc_uart_poll(self.uart)

    def save(self) -> bytes:
        """The chip's part of a snapshot."""
        regs = ffi.new("struct mc_uart_regs *")
        lib.mc_uart_save(self.uart, regs)
        return bytes(ffi.buffer(regs))

    def _core(self, deadline: float, what: str) -> None:
        if not select.select([self.rx_event], [], [], max(0, deadline - time.monotonic()))[0]:
            raise TimeoutError(f"{what}: no signal of the sidecar's")
        lib.mc_uart_poll(self.uart)

    def print(self, data: bytes) -> None:
        """A byte whenever the holding register is empty."""
        deadline = time.monotonic() + TIMEOUT
        for byte in data:
            while not lib.mc_uart_read(self.uart, LSR) & LSR_THRE:
                self._core(deadline, "transmitter full")
            lib.mc_uart_write(self.uart, THR, byte)

    def read(self, n: int) -> bytes:
        """Waits for ``n`` bytes of input."""
        deadline = time.monotonic() + TIMEOUT
        data = bytearray()
        while len(data) < n:
            if lib.mc_uart_read(self.uart, LSR) & LSR_DR:
                data.append(lib.mc_uart_read(self.uart, RBR))
            else:
                self._core(deadline, f"{len(data)} of {n} bytes of input")
        return bytes(data)

    def close(self) -> None:
        """Takes the ring away."""
        lib.mc_uart_attach(self.uart, ffi.NULL, -1, -1)
        lib.mc_uart_ring_unmap(self.ring)
        lib.mc_uart_deinit(self.uart)


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose path leaves room for a socket's name (107 bytes)."""
    path = Path(tempfile.mkdtemp(prefix="mc-"))
    yield path
    shutil.rmtree(path)


def test_bytes_and_echo(short: Path) -> None:
    data = b"".join(b"%07d\n" % i for i in range(25000))
    with (
        uart_sidecar(short, scrollback=1 << 20) as (sidecar, ring),
        contextlib.closing(Guest(ring)) as guest,
        sidecar.client() as client,
    ):
        guest.print(data)
        assert read_exactly(client.fileno(), len(data)) == data
        for i in range(200):
            client.sendall(b"%03d" % i)
            assert guest.read(3) == b"%03d" % i
            guest.print(b"%03d" % i)
            assert read_exactly(client.fileno(), 3) == b"%03d" % i
        assert guest.uart.stats.tx_discarded == guest.uart.stats.tx_overrun == 0


def test_paste_larger_than_every_buffer(short: Path) -> None:
    data = b"".join(b"%07d\n" % i for i in range(16 * RX_SIZE // 8))
    with (
        uart_sidecar(short) as (sidecar, ring),
        contextlib.closing(Guest(ring)) as guest,
        sidecar.client() as client,
    ):
        paste = threading.Thread(target=client.sendall, args=(data,))
        paste.start()
        assert guest.read(len(data)) == data
        paste.join(TIMEOUT)


def test_transmitter_waits_out_a_replacement(short: Path) -> None:
    """The sidecar dies under a printing guest: the ring fills, THRE goes off, and the next sidecar's signal ends it."""
    data = b"".join(b"%07d\n" % i for i in range(12500))
    with UartRing() as ring, contextlib.closing(Guest(ring)) as guest:
        with SerialSidecar(short / "a.sock", ring=ring) as first:
            guest.print(b"first\n")
            ring.tx_head = 6
            ring.drained()
            first.kill()
        guest.print(data[: TX_SIZE + 1])  # the last byte waits in the 16550
        assert not lib.mc_uart_read(guest.uart, LSR) & LSR_THRE
        assert guest.uart.stats.tx_stalls > 0
        printer = threading.Thread(target=guest.print, args=(data[TX_SIZE + 1 :],))
        printer.start()
        with SerialSidecar(short / "b.sock", ring=ring, scrollback=1 << 20) as second, second.client() as client:
            assert read_exactly(client.fileno(), len(data)) == data
            printer.join(TIMEOUT)
            assert not printer.is_alive()


def test_wake_up_is_never_missed(short: Path) -> None:
    """One byte at a time with the sidecar falling asleep in between: a lost wake-up would end in a timeout."""
    with (
        uart_sidecar(short) as (sidecar, ring),
        contextlib.closing(Guest(ring)) as guest,
        sidecar.client() as client,
    ):
        for i in range(500):
            guest.print(bytes([i & 0xFF]))
            assert read_exactly(client.fileno(), 1) == bytes([i & 0xFF])
            # Past the sidecar's nap of a millisecond every now and then, by waiting for what does not come.
            if i % 10 == 0:
                assert not select.select([client], [], [], 0.002)[0]
        assert ring.rx_filled == 0


def test_snapshot_of_chip_and_sidecar_has_each_byte_once(short: Path) -> None:
    """Six machines, each made from a snapshot of the one before, which goes on for a while as well."""
    typed = b"".join(b"%07d\n" % i for i in range(6 * 6000 // 8))
    printed = b"".join(b"%07d\n" % i for i in range(6 * 8000 // 8))
    taken = b""
    chip, console = b"", None
    for i in range(6):
        with (
            uart_sidecar(short, incoming=console is not None) as (sidecar, ring),
            contextlib.closing(Guest(ring, chip)) as guest,
            sidecar.client() as client,
        ):
            if console is not None:
                sidecar.ask(m.Load(console))
                assert (guest.save(), sidecar.save()) == (chip, console), "nothing moves before the resume"
                sidecar.resume()
            guest.poll()
            client.sendall(typed[6000 * i : 6000 * (i + 1)])
            # Ever more stays behind, in FIFO and ring.
            taken += guest.read(5500)
            sidecar.poll_until(functools.partial(all_read, client), "the sidecar to have read it")
            guest.print(printed[8000 * i : 8000 * (i + 1)])
            # The vCPUs are parked, and the core does not poll, from here on.
            sidecar.quiesce()
            chip, console = guest.save(), sidecar.save()
            sidecar.resume()
            guest.poll()
            rest = 500 * (i + 1)
            assert taken + guest.read(rest) == typed[: 6000 * (i + 1)]
            assert not lib.mc_uart_read(guest.uart, LSR) & LSR_DR
            everything = printed[: 8000 * (i + 1)]
            assert read_exactly(client.fileno(), len(everything)) == everything
    assert console is not None
    assert console.data.count(printed) == 1


def all_read(sock: socket.socket) -> bool:
    """The other end has read all that was sent."""
    return int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder) == 0
