"""Doorbells, interrupts and the registers of virtio-mmio that the C exit loop answers, on the real /dev/kvm."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from harness.microvm import MicroVm, sealed_memfd, wait_readable, wait_until
from motorcade.core._native import lib
from motorcade.core.kvm import InterruptStatus, KvmError
from motorcade.core.layout import slot_address
from motorcade.core.virtio_mmio import Reg

pytestmark = pytest.mark.kvm

Make = Callable[..., MicroVm]


class Nothing:
    """A device whose accesses are counted."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, int]] = []

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, value))


def test_a_notification_wakes_its_own_eventfd_only(micro_vm: Make) -> None:
    vm = micro_vm("slot=1 poke=80:0 poke=80:1 poke=80:1 poke=80:7 print=done")
    doorbells = [vm.eventfd(), vm.eventfd()]
    rest = Nothing()
    vm.device(1, rest)
    for queue, fd in enumerate(doorbells):
        vm.vm.add_ioeventfd(fd, slot_address(1) + Reg.QUEUE_NOTIFY, queue)
    vm.start()
    vm.wait_for(b"done\n")
    assert [wait_readable(fd) for fd in doorbells] == [1, 2]
    assert rest.writes == [(Reg.QUEUE_NOTIFY, 7)]  # a queue that does not exist comes to Python
    assert vm.vcpus.vcpus[0].native.stats.python == 1


def test_a_doorbell_taken_away_comes_to_python(micro_vm: Make) -> None:
    vm = micro_vm("slot=1 poke=80:0 print=done")
    fd, rest = vm.eventfd(), Nothing()
    vm.device(1, rest)
    vm.vm.add_ioeventfd(fd, slot_address(1) + Reg.QUEUE_NOTIFY, 0)
    vm.vm.remove_ioeventfd(fd, slot_address(1) + Reg.QUEUE_NOTIFY, 0)
    vm.start()
    vm.wait_for(b"done\n")
    assert rest.writes == [(Reg.QUEUE_NOTIFY, 0)]
    with pytest.raises(BlockingIOError):
        os.eventfd_read(fd)


def test_a_doorbell_cannot_be_there_twice(micro_vm: Make) -> None:
    vm = micro_vm("print=x")
    fd = vm.eventfd()
    vm.vm.add_ioeventfd(fd, slot_address(1) + Reg.QUEUE_NOTIFY, 0)
    with pytest.raises(KvmError, match="KVM_IOEVENTFD at 0xd0001050: File exists"):
        vm.vm.add_ioeventfd(fd, slot_address(1) + Reg.QUEUE_NOTIFY, 0)


def test_an_eventfd_interrupts_a_sleeping_guest(micro_vm: Make) -> None:
    vm = micro_vm("irq=5 print=ready await=1 await=2 await=3")
    irq = vm.eventfd()
    vm.vm.add_irqfd(irq, 5)
    vm.start()
    vm.wait_for(b"ready\n")
    for n in (b"1", b"2", b"3"):
        os.eventfd_write(irq, 1)
        vm.wait_for(b"interrupts " + n + b"\n")


def test_an_eventfd_taken_away_interrupts_no_more(micro_vm: Make) -> None:
    vm = micro_vm("irq=5 print=ready await=1")
    irq, other = vm.eventfd(), vm.eventfd()
    vm.vm.add_irqfd(irq, 5)
    vm.vm.add_irqfd(other, 5)
    vm.vm.remove_irqfd(irq, 5)
    vm.start()
    vm.wait_for(b"ready\n")
    os.eventfd_write(irq, 1)
    assert os.eventfd_read(irq) == 1  # nobody took it
    os.eventfd_write(other, 1)
    vm.wait_for(b"interrupts 1\n")


def test_a_line_interrupts_on_its_rising_edge(micro_vm: Make) -> None:
    vm = micro_vm("irq=9 print=ready await=1 await=2")
    vm.start()
    vm.wait_for(b"ready\n")
    vm.vm.irq_line(9, True)
    vm.wait_for(b"interrupts 1\n")
    vm.vm.irq_line(9, True)
    vm.vm.irq_line(9, False)
    assert vm.peer.take() == b""
    vm.vm.irq_line(9, True)
    vm.wait_for(b"interrupts 2\n")


def test_interrupt_status_is_answered_in_c(micro_vm: Make) -> None:
    vm = micro_vm("slot=3 isr isr print=done")
    device, page = Nothing(), vm.page()
    vm.device(3, device)
    isr = vm.vm.map_isr(3, page)
    isr.set(1)
    vm.start()
    vm.wait_for(b"isr 1 then 0\n")
    sidecar = InterruptStatus(page)  # another mapping of the same page
    sidecar.set(3)
    vm.wait_for(b"isr 3 then 0\n")
    vm.wait_for(b"done\n")
    assert isr.read() == 0
    assert device.writes == []
    stats = vm.vcpus.vcpus[0].native.stats
    assert stats.isr >= 6
    assert stats.python == 0
    sidecar.unmap()


def test_an_acknowledgement_clears_only_its_bits(micro_vm: Make) -> None:
    vm = micro_vm("slot=3 poke=100:1 peek=96 print=done")
    isr = vm.vm.map_isr(3, vm.page())
    isr.set(3)
    vm.start()
    assert vm.wait_for(b"done\n").startswith(b"2\n")
    assert isr.read() == 2
    isr.clear()
    assert isr.read() == 0


def test_other_registers_and_widths_are_python_s(micro_vm: Make) -> None:
    """Of a slot whose InterruptStatus is in C, an 8-byte access to it is not."""
    vm = micro_vm("slot=3 wide=96 print=done")
    device = Nothing()
    vm.device(3, device)
    vm.vm.map_isr(3, vm.page()).set(1)
    vm.start()
    vm.wait_for(b"done\n")
    assert [offset for offset, _ in device.writes] == [96, 96, 96]


def test_shared_memory_must_be_sealed(micro_vm: Make) -> None:
    vm = micro_vm("print=x")
    unsealed = os.memfd_create("unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 1 << 20)
    small = sealed_memfd("small", 2)
    try:
        with pytest.raises(ValueError, match="not sealed against shrinking"):
            vm.vm.map_isr(0, unsealed)
        with pytest.raises(ValueError, match="too small"):
            vm.vm.map_isr(0, small)
        with pytest.raises(ValueError, match="not sealed against shrinking"):
            vm.uart.attach(unsealed, vm.peer.tx_event, vm.peer.rx_event)
        with pytest.raises(ValueError, match="too small"):
            vm.uart.attach(small, vm.peer.tx_event, vm.peer.rx_event)
    finally:
        os.close(unsealed)
        os.close(small)
    with pytest.raises(KvmError, match="slot 48"):
        vm.vm.map_isr(48, vm.page())


def test_interrupts_of_the_uart_both_ways(micro_vm: Make) -> None:
    vm = micro_vm("txirq=300 print=tx echoirq=200 print=rx")
    vm.start()
    out = vm.wait_for(b"tx\n")
    sent, irqs = out.split(b"\nirqs ")
    assert sent == (b"0123456789abcdefghijklmnopqrstuvwxyz" * 9)[:300]
    assert int(irqs.split()[0], 16) >= 300 // 16
    text = bytes(range(65, 90)) * 8
    for at in range(0, 200, 25):  # in pieces: each is below or beyond the trigger level of 8
        vm.peer.send(text[at : at + 25])
        vm.uart.poll()
        vm.wait_for(text[: at + 25])
    vm.wait_for(b"rx\n")


def test_a_full_ring_holds_the_guest_back_and_loses_nothing(micro_vm: Make) -> None:
    vm = micro_vm("flood=3000 print=end")
    # As if nearly all of the ring were taken already: the guest need not send that much.
    room = 1000
    head = (1 << 32) - 500  # the positions wrap on the way
    vm.uart.detach()
    vm.peer.ring.tx.head, vm.peer.ring.tx.tail = head, (head + room - lib.MC_UART_TX_SIZE) % (1 << 32)
    vm.uart.attach(vm.peer.ring_fd, vm.peer.tx_event, vm.peer.rx_event)
    vm.start()
    wait_until(lambda: vm.uart.stats.tx_stalls > 0)
    vm.vcpus.pause()  # a guest that waits for the UART can be paused
    assert vm.uart.stats.tx_bytes == room
    vm.vcpus.resume()
    vm.peer.ring.tx.tail = head  # what was there before is not of this guest
    os.eventfd_write(vm.peer.rx_event, 1)
    assert vm.peer.ring.tx.producer_waiting == 1
    vm.uart.poll()
    out = vm.wait_for(b"end\n")
    assert out == (b"0123456789abcdefghijklmnopqrstuvwxyz" * 84)[:3000] + b"end\n"
    assert vm.uart.stats.tx_overrun == 0


def test_without_a_sidecar_the_guest_does_not_wait(micro_vm: Make) -> None:
    vm = micro_vm("fill=3000 slot=1 poke=0:1", attach=False)
    device = Nothing()
    vm.device(1, device)
    vm.start()
    wait_until(lambda: bool(device.writes))
    assert vm.uart.stats.tx_discarded == 3000
    assert vm.uart.stats.tx_bytes == 0
