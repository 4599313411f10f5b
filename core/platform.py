"""The virtual hardware of one VM: KVM's part, platform devices, virtio slots, and the links to their sidecars.

What happens to it when, and who may ask for that, is machine.py's.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from motorcade.core import pm
from motorcade.core.acpi import tables
from motorcade.core.boot.entry import Entry
from motorcade.core.boot.error import BootError
from motorcade.core.boot.loader import load
from motorcade.core.bus import Bus
from motorcade.core.clock import Clock
from motorcade.core.kvm import Kvm, Vm
from motorcade.core.layout import HOTPLUG_SLOTS, RTC_PORT, VIRTIO_MMIO_SIZE, slot_address, slot_gsi
from motorcade.core.link import LinkState, SidecarLink
from motorcade.core.loop import Loop
from motorcade.core.rtc import Rtc
from motorcade.core.slots import Slot
from motorcade.core.task import Future
from motorcade.core.uart import Uart
from motorcade.core.vcpu import StopReason, Vcpus
from motorcade.core.virtio import Device, Identity
from motorcade.core.virtio_mmio import EmptySlot, VirtioMmio
from motorcade.proto import messages
from motorcade.proto.framing import ControlServer
from motorcade.proto.memory import GuestMemory

log = logging.getLogger(__name__)

ACPI_TABLES = 0xE0000  # guest physical: where a kernel that got no pointer searches, too
NO_SLOT = 0xFFFF  # Slot.index of a sidecar that is no virtio device
PAGER = "pager"  # kind of the process that fills guest memory


class Guest(Protocol):
    """What the guest does, on a vCPU's thread: note the wish and return."""

    def guest_shutdown(self) -> None:
        """It powered off."""

    def guest_reset(self) -> None:
        """It asked for a reset."""

    def guest_stopped(self, reason: StopReason, text: str) -> None:
        """It cannot go on."""

    def kill_sidecar(self, device_id: str, reason: str, *, unless_traced: bool = False) -> None:
        """(On the main thread.) This sidecar does not answer."""


@dataclass(frozen=True)
class Firmware:
    """What is needed to start the machine from its kernel. Descriptors are the caller's."""

    kernel: int | None  # None: restored without it
    kernel_path: str
    initrd: int | None
    initrd_path: str
    cmdline: str


class Platform:
    """Everything the guest can see, put together. Nothing runs until ``vcpus`` are started."""

    def __init__(
        self,
        boot: messages.Boot,
        fds: Mapping[str, int],
        memory: GuestMemory,
        loop: Loop,
        server: ControlServer,
        guest: Guest,
        vm: Vm | None = None,
    ) -> None:
        """Uses ``fds`` (by label), which it does not own and which must outlive it. ``vm``: made of ``memory``."""
        assert isinstance(boot.role, messages.CoreBoot)
        role = boot.role
        self.memory, self.slots, self.loop, self._fds = memory, list(role.devices), loop, fds
        self.firmware = Firmware(fds.get("kernel"), role.kernel_path, fds.get("initrd"), role.initrd_path, role.cmdline)
        self.vm = vm if vm is not None else Vm(Kvm(fds["kvm"]), memory)
        self.kvm = self.vm.kvm
        self._mmio, self._pio = Bus("MMIO"), Bus("port")
        for n in HOTPLUG_SLOTS:
            self._mmio.add(slot_address(n), VIRTIO_MMIO_SIZE, EmptySlot())
        self.links: dict[str, SidecarLink] = {}
        self.devices: dict[str, Device] = {}
        self._wirings: dict[int, tuple[Slot, list[int]]] = {}  # by slot; with descriptors that are ours to close
        self.on_device_reset: Callable[[str], None] = lambda _id: None
        for slot in self.slots:
            self.links[slot.device_id] = SidecarLink(
                slot.device_id, slot.kind, slot.pid, loop, server, guest.kill_sidecar
            )
            self.links[slot.device_id].debug = slot.debug
            server.expect(slot.device_id, slot.pid)
            if slot.index != NO_SLOT:
                name = slot.device_id
                labels = [*(f"kick.{name}.{n}" for n in range(slot.queues)), f"call.{name}.0", f"isr.{name}"]
                self._add_virtio(slot, [fds[label] for label in labels])
        self.uart_id = role.uart
        self._uart_polled = False
        self.uart = Uart(self.vm) if role.uart else None
        self.pm = pm.PmDevice(guest.guest_shutdown, guest.guest_reset, self._pulse)
        self.cf9 = pm.Cf9Reset(guest.guest_reset)
        self.rtc = Rtc()
        self._pio.add(pm.BASE, pm.SIZE, self.pm)
        self._pio.add(pm.KBD_COMMAND, 1, pm.KeyboardReset(guest.guest_reset))
        self._pio.add(pm.CF9, 1, self.cf9)
        self._pio.add(RTC_PORT, 2, self.rtc)
        self._parked: list[Future[None]] = []
        self.vcpus = Vcpus(
            self.vm,
            role.cpus,
            self._mmio,
            self._pio,
            on_stop=lambda reason, text: loop.call_soon(lambda: guest.guest_stopped(reason, text)),
            on_parked=lambda: loop.call_soon(self._on_parked),
        )
        self.clock = Clock(self.vm, self.vcpus.vcpus)

    def _add_virtio(self, slot: messages.Slot, fds: list[int]) -> Device:
        """``fds``: its kicks, its call, its InterruptStatus; taken."""
        name, (*kicks, call, isr) = slot.device_id, fds
        wiring = Slot(self.vm, slot.index, kicks, call, isr)
        device = Device(
            name,
            self.links[name],
            wiring,
            wiring.set_doorbells,
            lambda reason: log.warning("%s: DEVICE_NEEDS_RESET: %s", name, reason),
        )
        device.on_reset = lambda device_id: self.on_device_reset(device_id)
        self.devices[name] = device
        self._wirings[slot.index] = (wiring, fds)
        if slot.index in HOTPLUG_SLOTS:
            self._mmio.remove(wiring.address)
        self._mmio.add(wiring.address, VIRTIO_MMIO_SIZE, VirtioMmio(device))
        return device

    # Devices that come and go (hotplug.py); the vCPUs are parked.

    def slot_of(self, device_id: str) -> messages.Slot:
        """What the supervisor said of a device. StopIteration where there is none."""
        return next(slot for slot in self.slots if slot.device_id == device_id)

    def fill_slot(self, slot: messages.Slot, fds: Mapping[str, int], identity: Identity) -> None:
        """A device whose sidecar is there, in a slot that is empty. ``fds``: kick.0 and on, call.0, isr; taken."""
        labels = [*(f"kick.{n}" for n in range(slot.queues)), "call.0", "isr"]
        self._add_virtio(slot, [fds[label] for label in labels]).plug(identity)

    def empty_slot(self, device_id: str) -> None:
        """Takes away a device, whose driver has let go; its sidecar stays."""
        del self.devices[device_id]
        wiring, fds = self._wirings.pop(self.slot_of(device_id).index)
        self._mmio.remove(wiring.address)
        self._mmio.add(wiring.address, VIRTIO_MMIO_SIZE, EmptySlot())
        wiring.close()
        for fd in fds:
            os.close(fd)

    def rename_device(self, old: str, new: str) -> None:
        """The device in a slot goes on under another id."""
        self.devices[new] = self.devices.pop(old)

    def write_present_slots(self, slots: Iterable[int]) -> None:
        """Says in memory which slots have devices; the guest is not told."""
        self.memory.write(ACPI_TABLES + tables.PRESENT_SLOTS, tables.present_slots(slots))

    def _pulse(self, gsi: int) -> None:
        self.vm.irq_line(gsi, True)
        self.vm.irq_line(gsi, False)

    # Sidecars.

    @property
    def device_links(self) -> list[SidecarLink]:
        """Those of the sidecars that are devices, in slot order."""
        return [link for link in self.links.values() if link.kind != PAGER]

    @property
    def pager(self) -> SidecarLink | None:
        """That of the process which fills guest memory, where there is one."""
        return next((link for link in self.links.values() if link.kind == PAGER), None)

    @property
    def complete(self) -> bool:
        """Whether every sidecar has said hello, and none is gone."""
        return all(link.state is LinkState.PRESENT for link in self.links.values())

    def lose(self, device_id: str, reason: str) -> None:
        """A sidecar that was in use is gone; the guest goes on without its device."""
        if device_id in self.devices:
            self.devices[device_id].needs_reset(f"its sidecar ended: {reason}")
        elif device_id == self.uart_id and self.uart is not None:
            self.poll_uart(False)
            self.uart.detach()

    def find(self, device_id: str) -> None:
        """A device that was lost has a sidecar again. A virtio driver has to reset it (2.1.2)."""
        if device_id == self.uart_id:
            self.attach_uart()
            self._uart_polled = False

    def attach_uart(self) -> None:
        """Puts the sidecar's ring behind the 16550; ``poll_uart`` has bytes move."""
        if self.uart is not None:
            self.uart.attach(self._fds["uart.ring"], self._fds["uart.tx"], self._fds["uart.rx"])

    def poll_uart(self, on: bool) -> None:
        """Whether bytes move between the 16550 and its sidecar's ring when the sidecar says that some can.

        Not while the sidecar is quiet: each byte must be saved once, by the one or the other.
        """
        if self.uart is None or on == self._uart_polled:
            return
        if on and (self.links[self.uart_id].state is LinkState.GONE or self.links[self.uart_id].paused):
            return
        self._uart_polled = on
        if on:
            self.loop.add_control(self._fds["uart.rx"], self.uart.poll)
            self.uart.poll()
        else:
            self.loop.remove_control(self._fds["uart.rx"])

    # Power on, reset and rest.

    def power_on(self) -> Entry:
        """Puts tables, a new generation ID, kernel and initrd into memory. BootError."""
        firmware = self.firmware
        if firmware.kernel is None:
            raise BootError("this machine was restored from a template, and its kernel image is not there")
        slots = [(s.index, slot_gsi(s.index)) for s in self.slots if s.index != NO_SLOT and s.device_id[0] != "~"]
        rsdp = tables.build(self.memory.write, ACPI_TABLES, len(self.vcpus.vcpus), slots, self.uart is not None)
        self.write_generation_id(os.urandom(16))
        return load(
            self.memory,
            firmware.kernel,
            firmware.kernel_path,
            firmware.initrd,
            firmware.initrd_path,
            firmware.cmdline,
            rsdp,
        )

    def read_generation_id(self) -> bytes:
        """The 16 bytes as they are there now: the guest could write them."""
        return self.memory.read(ACPI_TABLES + tables.GENERATION_ID, 16)

    def write_generation_id(self, value: bytes) -> None:
        """Puts the 16 bytes where the tables say that they are; the guest is not told."""
        self.memory.write(ACPI_TABLES + tables.GENERATION_ID, value)

    def reset(self) -> Entry:
        """Power-on state of all but the vCPUs, which must be parked. BootError."""
        for device in self.devices.values():
            device.reset()
        if self.uart is not None:
            self.uart.reset()
        self.pm.reset()
        return self.power_on()

    def park(self) -> Future[None]:
        """Asks the vCPUs to park; the future is set when all have."""
        future: Future[None] = Future()
        self._parked.append(future)
        self.vcpus.request_pause()
        self._on_parked()  # they may be parked already, and then nobody says so again
        return future

    def _on_parked(self) -> None:
        if self.vcpus.parked:
            parked, self._parked = self._parked, []
            for future in parked:
                future.set(None)

    def wake(self) -> None:
        """Sidecars that were quiesced, or restored, go on, and so do interrupts that may have been lost."""
        for link in self.device_links:
            link.wake()
        for device in self.devices.values():
            device.raise_again()
        self.poll_uart(True)

    def close(self) -> None:
        """Frees the VM. The vCPU threads end first."""
        self.vcpus.close()
        self.vm.close()
