"""What ties a virtio-mmio slot to its sidecar in KVM: ioeventfds as doorbells, an irqfd, InterruptStatus.

Slots are wired and unwired while the guest runs (hotplug.py): KVM_IOEVENTFD and KVM_IRQFD are among the ioctls that the
core makes after it has given up its privileges.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from motorcade.core.kvm import Vm
from motorcade.core.layout import slot_address, slot_gsi
from motorcade.core.virtio import CONFIG_CHANGED
from motorcade.core.virtio_mmio import Reg


class Slot:
    """One slot's wiring. A virtio.Interrupts. The descriptors stay the caller's and must outlive it."""

    def __init__(self, vm: Vm, index: int, kicks: Sequence[int], call: int, isr: int) -> None:
        """``kicks``: an eventfd a queue; ``call``: the interrupt's eventfd; ``isr``: the page of ``struct mc_isr``."""
        self.index = index
        self.address = slot_address(index)
        self.gsi = slot_gsi(index)
        self._vm = vm
        self._kicks = tuple(kicks)
        self._call = call
        self._armed: set[int] = set()
        self._isr = vm.map_isr(index, isr)
        vm.add_irqfd(call, self.gsi)

    def close(self) -> None:
        """Unties it: no doorbell and no interrupt any more. The vCPUs must be parked."""
        self.set_doorbells([])
        self._vm.remove_irqfd(self._call, self.gsi)

    def set_doorbells(self, queues: list[int]) -> None:
        """Has the guest's notifications of exactly these queues wake the sidecar without an exit to Python."""
        wanted = {q for q in queues if q < len(self._kicks)}
        for queue in self._armed - wanted:
            self._vm.remove_ioeventfd(self._kicks[queue], self.address + Reg.QUEUE_NOTIFY, queue)
        for queue in wanted - self._armed:
            self._vm.add_ioeventfd(self._kicks[queue], self.address + Reg.QUEUE_NOTIFY, queue)
        self._armed = wanted

    def config_changed(self) -> None:
        """See virtio.Interrupts."""
        self._isr.set(CONFIG_CHANGED)
        os.eventfd_write(self._call, 1)

    def clear(self) -> None:
        """See virtio.Interrupts."""
        self._isr.clear()

    def pending(self) -> int:
        """See virtio.Interrupts."""
        return self._isr.read()

    def restore(self, bits: int) -> None:
        """See virtio.Interrupts."""
        self._isr.clear()
        self._isr.set(bits)

    def raise_again(self) -> None:
        """See virtio.Interrupts."""
        if self._isr.read():
            os.eventfd_write(self._call, 1)
