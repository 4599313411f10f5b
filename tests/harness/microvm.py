"""A VM of the core's KVM parts alone, in the test's own process: a micro-guest, a UART ring, two buses."""

from __future__ import annotations

import fcntl
import os
import queue
import select
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from harness import microguest
from motorcade.core._native import ffi, lib
from motorcade.core.boot.entry import Entry
from motorcade.core.boot.loader import load
from motorcade.core.bus import Bus, BusDevice
from motorcade.core.kvm import Kvm, Vm
from motorcade.core.layout import slot_address
from motorcade.core.uart import Uart
from motorcade.core.vcpu import StopReason, Vcpus
from motorcade.proto.memory import GuestMemory, layout


def sealed_memfd(name: str, size: int) -> int:
    """A memfd that can no longer shrink or grow; the caller closes it."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd


class UartPeer:
    """The serial sidecar's end of the UART's ring (native/uart_ring.h)."""

    def __init__(self) -> None:
        self.ring_fd = sealed_memfd("uart", ffi.sizeof("struct mc_uart_ring"))
        self.tx_event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.rx_event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.ring = lib.mc_uart_ring_map(self.ring_fd)
        assert self.ring != ffi.NULL
        self.output = b""

    def take(self) -> bytes:
        """What is in the TX ring, and room for the core again."""
        tx = self.ring.tx
        n = (tx.head - tx.tail) % (1 << 32)
        size = lib.MC_UART_TX_SIZE
        taken = bytes(self.ring.tx_data[(tx.tail + i) % size] for i in range(n))
        tx.tail = (tx.tail + n) % (1 << 32)
        self.output += taken
        if n and tx.producer_waiting:
            tx.producer_waiting = 0
            os.eventfd_write(self.rx_event, 1)
        return taken

    def wait_for(self, text: bytes, timeout: float = 20.0) -> bytes:
        """Takes output until ``text`` is in it; everything so far. AssertionError after ``timeout`` seconds."""
        until = time.monotonic() + timeout
        poll = select.poll()
        poll.register(self.tx_event, select.POLLIN)
        while text not in self.output:
            self.ring.tx.consumer_asleep = 1
            poll.poll(0)  # gives up the GIL, which is a full fence between the flag and the look at head
            if self.take():
                continue
            left = until - time.monotonic()
            assert left > 0, f"{text!r} did not come; so far: {self.output[-500:]!r}"
            if poll.poll(left * 1000):
                os.eventfd_read(self.tx_event)
        return self.output

    def send(self, data: bytes) -> None:
        """Puts bytes into the RX ring, which must have room for them, and signals the core."""
        rx = self.ring.rx
        for i, byte in enumerate(data):
            self.ring.rx_data[(rx.head + i) % lib.MC_UART_RX_SIZE] = byte
        rx.head = (rx.head + len(data)) % (1 << 32)
        rx.consumer_asleep = 0
        os.eventfd_write(self.rx_event, 1)

    def close(self) -> None:
        """Ends the mapping and closes the descriptors."""
        lib.mc_uart_ring_unmap(self.ring)
        for fd in (self.ring_fd, self.tx_event, self.rx_event):
            os.close(fd)


class MicroVm:
    """A VM that runs the micro-guest; a context manager, which ends it."""

    def __init__(self, cmdline: str, *, cpus: int = 1, memory: int = 64 << 20, attach: bool = True) -> None:
        """Parked at its first instruction. ``attach``: with a UartPeer behind the 16550."""
        self.stops: queue.Queue[tuple[StopReason, str]] = queue.Queue()
        self.parks: queue.Queue[None] = queue.Queue()
        self._fds = [os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC), sealed_memfd("ram", memory)]
        self.memory = GuestMemory(self._fds[1], layout(memory))
        self.elf: Path = microguest.build()
        self.vm = Vm(Kvm(self._fds[0]), self.memory)
        self.mmio, self.pio = Bus("MMIO"), Bus("port")
        self.uart = Uart(self.vm)
        self.peer = UartPeer()
        if attach:
            self.uart.attach(self.peer.ring_fd, self.peer.tx_event, self.peer.rx_event)
            self.uart.poll()
        self.vcpus = Vcpus(
            self.vm,
            cpus,
            self.mmio,
            self.pio,
            on_stop=lambda reason, text: self.stops.put((reason, text)),
            on_parked=lambda: self.parks.put(None),
        )
        self.cmdline = cmdline

    def load(self) -> Entry:
        """Puts the guest's image into its memory, anew."""
        fd = os.open(self.elf, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return load(self.memory, fd, str(self.elf), None, "", self.cmdline, 0)
        finally:
            os.close(fd)

    def device(self, slot: int, device: BusDevice) -> None:
        """Puts a device behind a virtio-mmio slot."""
        self.mmio.add(slot_address(slot), 0x200, device)

    def eventfd(self) -> int:
        """A non-blocking eventfd that is closed with the VM."""
        self._fds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        return self._fds[-1]

    def page(self) -> int:
        """A sealed memfd of one page, closed with the VM."""
        self._fds.append(sealed_memfd("page", 4096))
        return self._fds[-1]

    def start(self) -> None:
        """Loads the guest and lets it run."""
        self.vcpus.start(self.load())
        self.vcpus.resume()

    def wait_for(self, text: bytes, timeout: float = 20.0) -> bytes:
        """The output once it contains ``text``."""
        return self.peer.wait_for(text, timeout)

    def wait_stop(self, timeout: float = 20.0) -> tuple[StopReason, str]:
        """Why the guest could not go on."""
        return self.stops.get(timeout=timeout)

    def close(self) -> None:
        """Ends the threads and frees everything."""
        self.vcpus.close()
        self.uart.close()
        self.vm.close()
        self.peer.close()
        for fd in self._fds:
            os.close(fd)

    def __enter__(self) -> MicroVm:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def wait_readable(fd: int, timeout: float = 20.0) -> int:
    """An eventfd's count, once it is not 0; AssertionError after ``timeout`` seconds."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(timeout * 1000), "the eventfd was not signalled"
    return os.eventfd_read(fd)


def wait_until(condition: Callable[[], bool], timeout: float = 20.0) -> None:
    """Returns when ``condition()`` holds, for what nothing signals; AssertionError after ``timeout`` seconds."""
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        os.sched_yield()
