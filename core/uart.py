"""COM1: the 16550 in C (native/uart.c) and the ring to the serial sidecar behind it."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import Any

from motorcade.core._native import ffi, lib
from motorcade.core.kvm import Vm
from motorcade.core.layout import UART_GSI


@dataclass(frozen=True)
class UartStats:
    """Bytes and events since the start; see ``struct mc_uart_stats``."""

    tx_bytes: int
    rx_bytes: int
    tx_discarded: int
    tx_overrun: int
    rx_overrun: int
    ring_errors: int
    tx_stalls: int


class Uart:
    """The 16550 at UART_PORT, answered in the C exit loop once it exists. Any thread may call."""

    def __init__(self, vm: Vm) -> None:
        """Puts it into ``vm``, with nothing behind it: what the guest sends is discarded and counted."""
        self.native = ffi.new("struct mc_uart *")
        self._ring = ffi.NULL
        if result := lib.mc_uart_init(self.native, vm.fd, UART_GSI):
            raise OSError(-result, os.strerror(-result))
        self._vm = vm
        vm.platform.uart = self.native

    def attach(self, ring_fd: int, tx_eventfd: int, rx_eventfd: int) -> None:
        """Puts a sidecar's ring behind it, going on where the ring stands. No byte moves before ``poll``.

        ``ring_fd``: memfd of ``struct mc_uart_ring`` (native/uart_ring.h), sealed against shrinking (ValueError
        where not), mapped here and the caller's to close. The eventfds stay the caller's and must stay open:
        ``tx_eventfd`` is signalled for the sidecar; when ``rx_eventfd`` is readable, call ``poll``.
        """
        ring = lib.mc_uart_ring_map(ring_fd)
        if ring == ffi.NULL:
            reasons = {errno.EPERM: "it is not sealed against shrinking", errno.EINVAL: "it is too small, or no memfd"}
            raise ValueError(f"the UART's ring cannot be mapped: {reasons.get(ffi.errno) or os.strerror(ffi.errno)}")
        lib.mc_uart_attach(self.native, ring, tx_eventfd, rx_eventfd)
        self._replace(ring)

    def detach(self) -> None:
        """The sidecar is gone: the guest's bytes are discarded from now on, and its driver never waits."""
        lib.mc_uart_attach(self.native, ffi.NULL, -1, -1)
        self._replace(ffi.NULL)

    def _replace(self, ring: Any) -> None:
        if self._ring != ffi.NULL:
            lib.mc_uart_ring_unmap(self._ring)
        self._ring = ring

    def poll(self) -> None:
        """Takes in what the sidecar sent, and sends on what waited for room. Not while the sidecar is quiesced: what
        moves then is saved twice, or by nobody."""
        lib.mc_uart_poll(self.native)

    def reset(self) -> None:
        """Power-on state; bytes in the ring stay."""
        lib.mc_uart_reset(self.native)

    @property
    def stats(self) -> UartStats:
        """Counters, read without a lock."""
        s = self.native.stats
        return UartStats(s.tx_bytes, s.rx_bytes, s.tx_discarded, s.tx_overrun, s.rx_overrun, s.ring_errors, s.tx_stalls)

    def save(self) -> bytes:
        """The registers and FIFOs, for a snapshot; the vCPUs must be parked."""
        regs = ffi.new("struct mc_uart_regs *")
        lib.mc_uart_save(self.native, regs)
        return bytes(ffi.buffer(regs))

    def restore(self, data: bytes) -> None:
        """Puts back what ``save`` gave, and moves nothing: call ``poll`` before the guest runs, and restore
        the irqchip, which has the interrupt line's state. ValueError where it is not what ``save`` gave."""
        regs = ffi.new("struct mc_uart_regs *")
        if len(data) != len(ffi.buffer(regs)):
            raise ValueError(f"UART state has {len(data)} bytes, not {len(ffi.buffer(regs))}")
        ffi.buffer(regs)[:] = data
        if lib.mc_uart_restore(self.native, regs):
            raise ValueError("UART state is not one that a 16550 can be in")

    def close(self) -> None:
        """Takes it out of the VM and unmaps the ring; no vCPU may run."""
        self._vm.platform.uart = ffi.NULL
        self.detach()
        lib.mc_uart_deinit(self.native)
