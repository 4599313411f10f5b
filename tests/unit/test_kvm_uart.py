"""The 16550's registers as a driver sees them (PC16550D datasheet; Linux drivers/tty/serial/8250), without KVM."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.microvm import UartPeer
from motorcade.core._native import ffi, lib

THR = RBR = DLL = 0
IER = DLM = 1
IIR = FCR = 2
LCR, MCR, LSR, MSR, SCR = 3, 4, 5, 6, 7
DLAB = 0x80
NO_INT, RLSI, RDI, TIMEOUT, THRI, MSI = 1, 6, 4, 0xC, 2, 0
OUT2, LOOP = 0x08, 0x10
DR, OE, THRE, TEMT = 1, 2, 0x20, 0x40


class Chip:
    """A UART that has no KVM, with the sidecar's end of its ring."""

    def __init__(self, attach: bool = True) -> None:
        self.native = ffi.new("struct mc_uart *")
        assert lib.mc_uart_init(self.native, -1, 4) == 0
        self.peer = UartPeer()
        if attach:
            self.attach()

    def attach(self) -> None:
        lib.mc_uart_attach(self.native, self.peer.ring, self.peer.tx_event, self.peer.rx_event)
        lib.mc_uart_poll(self.native)

    def read(self, offset: int) -> int:
        return int(lib.mc_uart_read(self.native, offset))

    def write(self, offset: int, value: int) -> None:
        lib.mc_uart_write(self.native, offset, value)

    def receive(self, data: bytes) -> None:
        self.peer.send(data)
        lib.mc_uart_poll(self.native)

    @property
    def irq(self) -> bool:
        return bool(self.native.irq_level)

    @property
    def iir(self) -> int:
        return self.read(IIR) & 0xF

    def close(self) -> None:
        lib.mc_uart_deinit(self.native)
        self.peer.close()


@pytest.fixture
def chip() -> Iterator[Chip]:
    made = Chip()
    yield made
    made.close()


def test_power_on(chip: Chip) -> None:
    assert [chip.read(r) for r in range(1, 8)] == [0, NO_INT, 0, 0, THRE | TEMT, 0xB0, 0]
    assert not chip.irq


def test_linux_autoconfig_sees_a_16550a(chip: Chip) -> None:
    """The steps of autoconfig() in 8250_port.c."""
    chip.write(IER, 0)
    assert chip.read(IER) == 0
    chip.write(IER, 0xF)
    assert chip.read(IER) & 0xF == 0xF
    chip.write(IER, 0)
    chip.write(MCR, LOOP | 0x0A)
    assert chip.read(MSR) & 0xF0 == 0x90
    chip.write(MCR, 0)
    chip.write(LCR, 0xBF)  # no EFR behind it
    chip.write(IIR, 0)
    chip.write(LCR, 0)
    chip.write(FCR, 1)
    assert chip.read(IIR) >> 6 == 3
    # autoconfig_16550a: neither an EFR at DLAB, nor 64-byte FIFOs, nor an XScale's UUE
    chip.write(LCR, DLAB)
    assert chip.read(IIR) != 0
    chip.write(FCR, 1 | 0x20)
    assert chip.read(IIR) >> 5 == 6
    chip.write(LCR, 0)
    chip.write(IER, 0x40)
    assert chip.read(IER) & 0x40 == 0


def test_linux_thre_test(chip: Chip) -> None:
    """serial8250_do_startup: enabling THRI twice with an empty transmitter must interrupt twice."""
    for _ in range(2):
        chip.write(IER, 2)
        assert chip.iir == THRI
        assert chip.iir == NO_INT
        chip.write(IER, 0)


def test_divisor_latch_hides_data_and_ier(chip: Chip) -> None:
    chip.write(IER, 5)
    chip.write(LCR, DLAB | 3)
    chip.write(DLL, 1)
    chip.write(DLM, 2)
    assert (chip.read(DLL), chip.read(DLM)) == (1, 2)
    chip.write(LCR, 3)
    assert chip.read(IER) == 5
    assert chip.read(LCR) == 3
    chip.write(SCR, 0x5A)
    assert chip.read(SCR) == 0x5A
    assert chip.peer.take() == b""


def test_bytes_go_out_at_once(chip: Chip) -> None:
    for b in b"abc":
        chip.write(THR, b)
        assert chip.read(LSR) & (THRE | TEMT) == THRE | TEMT
    assert chip.peer.take() == b"abc"


def test_interrupts_need_out2(chip: Chip) -> None:
    chip.write(IER, 2)
    assert not chip.irq
    chip.write(MCR, OUT2)
    assert chip.irq
    chip.write(MCR, 0)
    assert not chip.irq


def test_transmitter_interrupt_comes_back_after_each_byte(chip: Chip) -> None:
    chip.write(MCR, OUT2)
    chip.write(IER, 2)
    for b in b"xyz":
        assert chip.irq
        assert chip.iir == THRI
        assert not chip.irq
        chip.write(THR, b)
    assert chip.irq


def test_receive_below_and_at_the_trigger_level(chip: Chip) -> None:
    chip.write(MCR, OUT2)
    chip.write(FCR, 1 | 0x80)  # 8
    chip.write(IER, 1)
    chip.receive(b"abc")
    assert chip.irq
    assert chip.iir == TIMEOUT
    chip.receive(b"defgh")
    assert chip.iir == RDI
    assert bytes(chip.read(RBR) for _ in range(8)) == b"abcdefgh"
    assert chip.iir == NO_INT
    assert not chip.irq
    assert chip.read(LSR) & DR == 0


@pytest.mark.parametrize(("fcr", "level"), [(0x01, 1), (0x41, 4), (0x81, 8), (0xC1, 14)])
def test_trigger_levels(chip: Chip, fcr: int, level: int) -> None:
    chip.write(FCR, fcr)
    chip.write(IER, 1)
    for n in range(1, 16):
        chip.receive(b"x")
        assert chip.iir == (RDI if n >= level else TIMEOUT)


def test_without_fifos_one_byte_at_a_time(chip: Chip) -> None:
    chip.write(IER, 1)
    chip.receive(b"hello")
    got = b""
    while chip.iir == RDI:
        got += bytes([chip.read(RBR)])
    assert got == b"hello"


def test_priorities(chip: Chip) -> None:
    chip.write(IER, 0xF)
    chip.write(FCR, 1)
    chip.write(MCR, LOOP | 2)  # a change of CTS; and by way of the loop:
    for b in range(17):
        chip.write(THR, b)  # the 17th overruns
    assert chip.iir == RLSI
    assert chip.read(LSR) & (OE | DR) == OE | DR
    assert chip.read(LSR) & OE == 0
    assert chip.iir == RDI
    chip.write(FCR, 1 | 2)
    assert chip.iir == THRI
    assert chip.iir == MSI
    assert chip.read(MSR) & 0xF
    assert chip.iir == NO_INT


def test_loopback_keeps_the_line_quiet(chip: Chip) -> None:
    chip.write(FCR, 1)
    chip.write(MCR, LOOP)
    for b in b"echo":
        chip.write(THR, b)
    chip.receive(b"from the line")
    assert bytes(chip.read(RBR) for _ in range(4)) == b"echo"
    assert chip.read(LSR) & DR == 0
    assert chip.peer.take() == b""
    chip.write(MCR, 0)
    assert bytes(chip.read(RBR) for _ in range(13)) == b"from the line"


@pytest.mark.parametrize(("mcr", "msr"), [(0x01, 0x20), (0x02, 0x10), (0x04, 0x40), (0x08, 0x80)])
def test_loopback_modem_lines(chip: Chip, mcr: int, msr: int) -> None:
    chip.write(MCR, LOOP)
    chip.read(MSR)
    chip.write(MCR, LOOP | mcr)
    first = chip.read(MSR)
    assert first & 0xF0 == msr
    assert first & 0x0F == (0 if msr == 0x40 else msr >> 4)  # RI reports its trailing edge only
    assert chip.read(MSR) & 0x0F == 0
    chip.write(MCR, LOOP)
    assert chip.read(MSR) == msr >> 4


def fill_ring(chip: Chip) -> None:
    chip.write(FCR, 1)
    for i in range(lib.MC_UART_TX_SIZE):
        chip.write(THR, i & 0xFF)


def test_a_full_ring_is_back_pressure(chip: Chip) -> None:
    chip.write(MCR, OUT2)
    chip.write(IER, 2)
    fill_ring(chip)
    assert chip.read(LSR) & THRE  # the FIFO is still empty
    assert chip.iir == THRI
    for b in range(16):
        chip.write(THR, b)
        assert chip.read(LSR) & (THRE | TEMT) == 0
        assert not chip.irq
    assert chip.native.stats.tx_overrun == 0
    chip.write(THR, 0x99)  # a driver that does not look
    assert chip.native.stats.tx_overrun == 1
    assert chip.peer.ring.tx.producer_waiting == 1
    assert len(chip.peer.take()) == lib.MC_UART_TX_SIZE
    lib.mc_uart_poll(chip.native)
    assert chip.irq
    assert chip.iir == THRI
    assert chip.read(LSR) & THRE
    assert chip.peer.take() == bytes(range(16))


def test_detached_while_full_lets_the_driver_go_on(chip: Chip) -> None:
    fill_ring(chip)
    chip.write(THR, 1)
    assert chip.read(LSR) & THRE == 0
    lib.mc_uart_attach(chip.native, ffi.NULL, -1, -1)
    assert chip.read(LSR) & THRE
    assert chip.native.stats.tx_discarded == 1
    chip.write(THR, 2)
    assert chip.native.stats.tx_discarded == 2
    chip.attach()  # a new sidecar finds what the old one had not taken
    assert len(chip.peer.take()) == lib.MC_UART_TX_SIZE


def test_a_sleeping_consumer_is_woken_once(chip: Chip) -> None:
    import os

    chip.write(THR, 1)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(chip.peer.tx_event)
    chip.peer.ring.tx.consumer_asleep = 1
    chip.write(THR, 2)
    chip.write(THR, 3)
    assert os.eventfd_read(chip.peer.tx_event) == 1
    assert chip.peer.ring.tx.consumer_asleep == 0


def test_receiving_says_when_it_sleeps_and_when_there_is_room(chip: Chip) -> None:
    import os

    lib.mc_uart_poll(chip.native)
    assert chip.peer.ring.rx.consumer_asleep == 1
    chip.peer.ring.rx.producer_waiting = 1
    chip.receive(b"x")
    assert chip.peer.ring.rx.producer_waiting == 0
    assert os.eventfd_read(chip.peer.tx_event) == 1
    assert chip.peer.ring.rx.tail == 1


def test_long_input_arrives_whole(chip: Chip) -> None:
    data = bytes(i % 251 for i in range(4096))
    chip.write(FCR, 1)
    chip.receive(data)
    got = bytearray()
    while chip.read(LSR) & DR:
        got.append(chip.read(RBR))
    assert bytes(got) == data


@pytest.mark.parametrize("distance", [1, 100_000, (1 << 32) - 1])
def test_positions_of_the_peer_that_cannot_be(chip: Chip, distance: int) -> None:
    """The peer's tail is beyond our head, or its head too far beyond our tail."""
    head = chip.peer.ring.tx.head
    chip.peer.ring.tx.tail = (head + distance) % (1 << 32)
    chip.peer.ring.rx.head = (chip.peer.ring.rx.tail + max(distance, 5000)) % (1 << 32)
    lib.mc_uart_poll(chip.native)
    errors = chip.native.stats.ring_errors
    assert errors > 0
    assert chip.read(LSR) & DR == 0
    chip.write(THR, 1)
    if distance != (1 << 32) - 1:  # there, one byte waits: a position that can be
        assert chip.read(LSR) & THRE == 0
        assert chip.native.stats.ring_errors > errors
    chip.peer.ring.tx.tail = head
    chip.peer.ring.rx.head = chip.peer.ring.rx.tail
    lib.mc_uart_poll(chip.native)
    assert chip.read(LSR) & THRE


def test_a_peer_cannot_move_our_own_positions(chip: Chip) -> None:
    chip.write(THR, 1)
    chip.peer.ring.tx.head = 12345
    chip.write(THR, 2)
    assert chip.peer.ring.tx.head == 2


def test_reset_forgets_registers_and_keeps_the_line(chip: Chip) -> None:
    chip.write(MCR, OUT2)
    chip.write(IER, 0xF)
    chip.write(LCR, 3)
    assert chip.irq
    lib.mc_uart_reset(chip.native)
    assert not chip.irq
    assert [chip.read(r) for r in (IER, LCR, MCR)] == [0, 0, 0]
    chip.write(THR, 7)
    assert chip.peer.take() == b"\7"


def test_saved_state_comes_back(chip: Chip) -> None:
    chip.write(FCR, 0x81)
    chip.write(IER, 3)
    chip.write(MCR, OUT2)
    chip.write(SCR, 9)
    chip.receive(b"in the fifo")
    regs = ffi.new("struct mc_uart_regs *")
    lib.mc_uart_save(chip.native, regs)
    other = Chip()
    assert lib.mc_uart_restore(other.native, regs) == 0
    assert other.irq
    assert other.read(SCR) == 9
    assert other.iir == RDI
    assert bytes(other.read(RBR) for _ in range(11)) == b"in the fifo"
    other.close()


def saved(chip: Chip) -> bytes:
    regs = ffi.new("struct mc_uart_regs *")
    lib.mc_uart_save(chip.native, regs)
    return bytes(ffi.buffer(regs))


def restored(state: bytes) -> Chip:
    """A chip in another process: its ring is empty, and attached after the state was put back."""
    chip = Chip(attach=False)
    regs = ffi.new("struct mc_uart_regs *")
    ffi.buffer(regs)[:] = state
    assert lib.mc_uart_restore(chip.native, regs) == 0
    lib.mc_uart_attach(chip.native, chip.peer.ring, chip.peer.tx_event, chip.peer.rx_event)
    return chip


def test_bytes_that_waited_for_room_are_sent_once_by_the_restored_chip(chip: Chip) -> None:
    chip.write(FCR, 1)
    chip.write(IER, 2)
    chip.write(MCR, OUT2)
    while chip.read(LSR) & THRE:
        chip.write(THR, ord("r"))
    for byte in b"waits":
        chip.write(THR, byte)
    state = saved(chip)
    other = restored(state)
    try:
        assert other.peer.take() == b"", "nothing moves while the machine stands still"
        assert saved(other) == state
        assert other.read(LSR) & (THRE | TEMT) == 0
        lib.mc_uart_poll(other.native)
        assert other.peer.take() == b"rwaits"
        assert other.irq
        assert other.iir == THRI
    finally:
        other.close()
    # The saved one goes on by itself.
    assert chip.peer.take().endswith(b"r")
    lib.mc_uart_poll(chip.native)
    assert chip.peer.take() == b"rwaits"


def test_received_bytes_are_in_the_fifo_or_in_the_ring_and_never_in_both(chip: Chip) -> None:
    chip.write(FCR, 1)
    chip.write(IER, 1)
    chip.write(MCR, OUT2)
    chip.receive(bytes(range(40)))
    left = chip.peer.ring.rx.head - chip.peer.ring.rx.tail  # what the sidecar saves
    other = restored(saved(chip))
    try:
        assert other.irq
        assert (left, chip.native.irq_level) == (24, True)
        other.receive(bytes(range(16, 40)))  # from the sidecar
        assert bytes(other.read(RBR) for _ in range(40)) == bytes(range(40))
        assert not other.read(LSR) & DR
        assert not other.irq
    finally:
        other.close()


def test_equal_chips_give_equal_states(chip: Chip) -> None:
    other = Chip()
    try:
        other.write(FCR, 1)
        other.receive(b"long gone")
        while other.read(LSR) & DR:
            other.read(RBR)
        chip.write(FCR, 1)
        assert saved(chip) == saved(other)
    finally:
        other.close()


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_state_is_taken_whole_or_refused(data: st.DataObject) -> None:
    chip = Chip()
    try:
        regs = ffi.new("struct mc_uart_regs *")
        size = len(ffi.buffer(regs))
        ffi.buffer(regs)[:] = data.draw(st.binary(min_size=size, max_size=size))
        if lib.mc_uart_restore(chip.native, regs) == 0:
            for _ in range(40):
                chip.write(THR, 0)
                chip.read(RBR)
    finally:
        chip.close()


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7), st.integers(0, 255), st.binary(max_size=20)), max_size=200))
@settings(max_examples=200, deadline=None)
def test_whatever_the_driver_does_the_chip_stays_sane(steps: list[tuple[bool, int, int, bytes]]) -> None:
    """Register by register: what must hold between them, after any history."""
    chip = Chip()
    try:
        for is_write, offset, value, arrived in steps:
            if arrived and len(arrived) + (chip.peer.ring.rx.head - chip.peer.ring.rx.tail) < 4096:
                chip.receive(arrived)
            if is_write:
                chip.write(offset, value)
            else:
                assert 0 <= chip.read(offset) <= 255
            ier, lsr = _ier(chip), chip.read(LSR)
            if chip.irq:
                assert chip.read(MCR) & OUT2
                assert ier
            if lsr & DR and ier & 1 and chip.read(MCR) & OUT2:
                assert chip.irq
            assert chip.native.irq_error == 0
    finally:
        chip.close()


def _ier(chip: Chip) -> int:
    lcr = chip.read(LCR)
    chip.write(LCR, lcr & ~DLAB)
    ier = chip.read(IER)
    chip.write(LCR, lcr)
    return ier
