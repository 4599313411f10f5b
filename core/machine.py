"""The machine: KVM, platform devices and sidecar links put together, and what QMP and the guest may do to it.

Everything here runs on the main thread except the few callables that devices call on vCPU threads; those only
post to the loop.
"""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence

from motorcade.core import pm
from motorcade.core.acpi import tables
from motorcade.core.boot.entry import Entry
from motorcade.core.boot.error import BootError
from motorcade.core.boot.loader import load
from motorcade.core.bus import Bus
from motorcade.core.kvm import Kvm, Vm
from motorcade.core.layout import RTC_PORT, VIRTIO_MMIO_SIZE, slot_gsi
from motorcade.core.link import LinkState, SidecarLink
from motorcade.core.loop import Loop
from motorcade.core.qmp import machine as qmp
from motorcade.core.qmp.errors import DeviceNotFound, QmpError
from motorcade.core.rtc import Rtc
from motorcade.core.slots import Slot
from motorcade.core.uart import Uart
from motorcade.core.vcpu import StopReason, Vcpus
from motorcade.core.virtio import Device, Identity
from motorcade.core.virtio_mmio import VirtioMmio
from motorcade.proto import boot as bootlink
from motorcade.proto import messages, versions
from motorcade.proto.framing import ControlServer
from motorcade.proto.memory import GuestMemory

log = logging.getLogger(__name__)

ACPI_TABLES = 0xE0000  # guest physical: where a kernel that got no pointer searches, too
NO_SLOT = 0xFFFF  # Slot.index of the sidecar behind the 16550
PARK_SECONDS = 60.0  # a vCPU may wait for a sidecar's answer to a reset before it parks
HELLO_SECONDS = 60.0
PING_SECONDS = 20.0
SHUTDOWN_SECONDS = 40.0  # longer than the link waits for a disk to be flushed
DETAIL_MAX = 8192
FAILED = 1  # vmmctl's exit status (docs/vmmctl.md)


class Machine:
    """One VM. Implements qmp.MachineControl."""

    def __init__(
        self,
        boot: messages.Boot,
        fds: Mapping[str, int],
        memory: GuestMemory,
        loop: Loop,
        server: ControlServer,
        life: socket.socket,
    ) -> None:
        """Creates the VM with all its devices; nothing runs yet. Uses ``fds`` (by label), which it does not own."""
        assert isinstance(boot.role, messages.CoreBoot)
        self._boot, self._role, self._fds = boot, boot.role, fds
        self._memory, self._loop, self._server, self._life = memory, loop, server, life
        self.on_event: Callable[[str, Mapping[str, object]], None] = lambda _name, _data: None
        self.ended: messages.Ended | None = None
        self._state = qmp.RunState.PRELAUNCH
        self._announced = False

        self._kvm = Kvm(fds["kvm"])
        self._vm = Vm(self._kvm, memory)
        self._mmio, self._pio = Bus("MMIO"), Bus("port")
        self._links: dict[str, SidecarLink] = {}
        self._devices: dict[str, Device] = {}
        self._slots: list[messages.Slot] = list(self._role.devices)
        for slot in self._slots:
            self._links[slot.device_id] = SidecarLink(
                slot.device_id, slot.kind, slot.pid, loop, server, self._kill_sidecar
            )
            server.expect(slot.device_id, slot.pid)
            if slot.index != NO_SLOT:
                self._add_virtio(slot)
        self._uart = self._add_uart() if self._role.uart else None
        self._pm = pm.PmDevice(self._guest_shutdown, self._guest_reset, self._pulse)
        self._rtc = Rtc()
        self._pio.add(pm.BASE, pm.SIZE, self._pm)
        self._pio.add(pm.KBD_COMMAND, 1, pm.KeyboardReset(self._guest_reset))
        self._pio.add(pm.CF9, 1, pm.Cf9Reset(self._guest_reset))
        self._pio.add(RTC_PORT, 2, self._rtc)
        self._vcpus = Vcpus(
            self._vm,
            self._role.cpus,
            self._mmio,
            self._pio,
            on_stop=lambda reason, text: loop.call_soon(lambda: self._vcpu_stopped(reason, text)),
            on_parked=lambda: loop.call_soon(lambda: None),  # wakes _park
        )

        server.handler = self._on_message
        loop.add_control(server.fileno(), server.process)
        loop.add_deadlines(server.next_deadline, server.expire)
        loop.add_control(life.fileno(), self._on_life)
        self._next_ping = time.monotonic() + PING_SECONDS
        loop.add_deadlines(lambda: self._next_ping, self._ping)

    def _add_virtio(self, slot: messages.Slot) -> None:
        fds, name = self._fds, slot.device_id
        wiring = Slot(
            self._vm,
            slot.index,
            [fds[f"kick.{name}.{n}"] for n in range(slot.queues)],
            fds[f"call.{name}.0"],
            fds[f"isr.{name}"],
        )
        device = Device(
            name,
            self._links[name],
            wiring,
            wiring.set_doorbells,
            lambda reason: log.warning("%s: DEVICE_NEEDS_RESET: %s", name, reason),
        )
        self._devices[name] = device
        self._mmio.add(wiring.address, VIRTIO_MMIO_SIZE, VirtioMmio(device))

    def _add_uart(self) -> Uart:
        uart = Uart(self._vm)
        uart.attach(self._fds["uart.ring"], self._fds["uart.tx"], self._fds["uart.rx"])
        self._loop.add_control(self._fds["uart.rx"], uart.poll)
        return uart

    def start(self) -> None:
        """Loads the kernel and waits, vCPUs parked, for the sidecars' hellos. BootError."""
        self._vcpus.start(self._load())
        deadline = time.monotonic() + HELLO_SECONDS
        self._loop.add_deadlines(lambda: None if self._announced else deadline, self._hello_overdue)
        self._go_when_complete()

    def _load(self) -> Entry:
        slots = [(s.index, slot_gsi(s.index)) for s in self._slots if s.index != NO_SLOT]
        rsdp = tables.build(self._memory.write, ACPI_TABLES, self._role.cpus, slots, self._uart is not None)
        return load(
            self._memory,
            self._fds["kernel"],
            self._role.kernel_path,
            self._fds.get("initrd"),
            self._role.initrd_path,
            self._role.cmdline,
            rsdp,
        )

    def _go_when_complete(self) -> None:
        if self._announced or any(link.state is not LinkState.PRESENT for link in self._links.values()):
            return
        self._announced = True
        if not self._role.paused:
            self._vcpus.resume()
            self._state = qmp.RunState.RUNNING
        bootlink.send_life(self._life, messages.Running())

    def _hello_overdue(self, _now: float) -> None:
        silent = [link.device_id for link in self._links.values() if link.state is LinkState.WAITING]
        self._announced = True
        self._end(FAILED, "sidecar-failed", f"no hello within {HELLO_SECONDS:g} s from: {', '.join(silent)}")

    def close(self) -> None:
        """Frees the VM. The vCPU threads end first."""
        self._vcpus.close()
        self._vm.close()

    # Sidecars and the supervisor.

    def _on_message(self, device_id: str, message: messages.Message) -> None:
        link, device, body = self._links[device_id], self._devices.get(device_id), message.body
        if isinstance(body, messages.Hello):
            if device is not None:
                device.plug(Identity(body.virtio_type, body.features, tuple(body.queue_sizes), body.config))
            link.hello()
            self._server.answer(device_id, message.id, messages.Welcome(versions.PROTOCOL_VERSION))
            self._go_when_complete()
        elif device is None:
            log.warning("%s: a notice that only a virtio device may send", device_id)
        elif isinstance(body, messages.ConfigChanged):
            if not device.change_config(body.data):
                log.warning("%s: configuration space of another length refused", device_id)
        elif isinstance(body, messages.NeedsReset):
            queue = "" if body.queue == messages.NO_QUEUE else f"queue {body.queue}: "
            device.needs_reset(queue + body.reason)

    def _ping(self, now: float) -> None:
        """Finds a sidecar that hangs, or that feeds us a message which never ends, when nothing else is asked of it."""
        self._next_ping = now + PING_SECONDS
        for link in self._links.values():
            link.ping()

    def _kill_sidecar(self, device_id: str, reason: str) -> None:
        log.error("%s: to be killed: %s", device_id, reason)
        bootlink.send_life(self._life, messages.KillSidecar(device_id))

    def _on_life(self) -> None:
        received, alive = bootlink.drain_life(self._life)
        for life in received:
            if isinstance(life, messages.SidecarDied):
                self._sidecar_died(life.device_id, life.reason)
            elif isinstance(life, messages.ShutdownVm):
                self._end(0, "host-signal")
        if not alive:
            # Nobody is left to report to; the kernel is about to kill this process as well (PR_SET_PDEATHSIG).
            self.ended = messages.Ended(FAILED, "supervisor-gone")
            self._loop.stop()

    def _sidecar_died(self, device_id: str, reason: str) -> None:
        link = self._links[device_id]
        if link.state is LinkState.GONE:
            return
        link.died(reason)
        if self._state is qmp.RunState.SHUTDOWN:
            return
        if not self._announced:
            self._announced = True
            self._end(FAILED, "sidecar-failed", f"{device_id}: {reason}")
            return
        if device_id in self._devices:
            self._devices[device_id].needs_reset(f"its sidecar ended: {reason}")
        elif self._uart is not None:
            self._loop.remove_control(self._fds["uart.rx"])
            self._uart.detach()
        data = {"id": device_id, "kind": link.kind, "reason": reason}
        self.on_event("SIDECAR_EXITED", data)
        self.on_event("SIDECAR_FAILED", data)

    # What the guest does, on its vCPUs' threads.

    def _guest_shutdown(self) -> None:
        self._vcpus.request_pause()
        self._loop.call_soon(lambda: self._end(0, "guest-shutdown", guest=True))

    def _guest_reset(self) -> None:
        self._vcpus.request_pause()
        self._loop.call_soon(self._on_guest_reset)

    def _on_guest_reset(self) -> None:
        if self._role.on_reboot == "exit":
            self._end(0, "guest-reset", guest=True)
        elif self._state is not qmp.RunState.SHUTDOWN:
            try:
                self._reset("guest-reset", guest=True)
            except QmpError as e:
                self._end(FAILED, "internal-error", f"the guest's reset failed: {e.desc}", guest=True)

    def _pulse(self, gsi: int) -> None:
        self._vm.irq_line(gsi, True)
        self._vm.irq_line(gsi, False)

    def _vcpu_stopped(self, reason: StopReason, text: str) -> None:
        self._end(FAILED, reason.value, text, guest=True)

    # Transitions.

    def _park(self) -> None:
        self._vcpus.request_pause()
        if not self._loop.run_until(lambda: self._vcpus.parked, PARK_SECONDS):
            raise QmpError(f"the vCPUs did not stop within {PARK_SECONDS:g} s: a device's sidecar does not answer")

    def _reset(self, reason: str, *, guest: bool) -> None:
        self._park()
        for device in self._devices.values():
            device.reset()
        if self._uart is not None:
            self._uart.reset()
        self._pm.reset()
        try:
            entry = self._load()
        except BootError as e:
            self._end(FAILED, "internal-error", f"the kernel cannot be loaded again: {e}")
            return
        self._vcpus.reset(entry)
        self.on_event("RESET", {"guest": guest, "reason": reason})
        if self._state is qmp.RunState.RUNNING:
            self._vcpus.resume()

    def _end(self, status: int, reason: str, detail: str = "", *, guest: bool = False) -> None:
        """Ends the VM: vCPUs, then sidecars, which flush, then the loop. The first reason counts."""
        if self._state is qmp.RunState.SHUTDOWN:
            return
        self._state = qmp.RunState.SHUTDOWN
        log.info("the VM ends: %s %s", reason, detail)
        self.ended = messages.Ended(status, reason, detail[-DETAIL_MAX:])
        self._vcpus.request_pause()
        self.on_event("SHUTDOWN", {"guest": guest, "reason": reason})
        self._loop.run_until(lambda: self._vcpus.parked, PARK_SECONDS)
        for link in self._links.values():
            link.shutdown()
        everyone_gone = self._loop.run_until(
            lambda: all(link.state is LinkState.GONE for link in self._links.values()), SHUTDOWN_SECONDS
        )
        if not everyone_gone:
            log.error("sidecars that did not end: %s", [i for i, x in self._links.items() if x.state != LinkState.GONE])
        self._loop.stop()

    # qmp.MachineControl.

    @property
    def name(self) -> str:
        """See qmp.MachineControl, here and below."""
        return self._boot.vm_name

    @property
    def uuid(self) -> str:
        return self._role.uuid

    @property
    def run_state(self) -> qmp.RunState:
        return self._state

    def vcpus(self) -> Sequence[qmp.Vcpu]:
        return [qmp.Vcpu(index, tid, core=index) for index, tid in enumerate(self._vcpus.tids)]

    def pause(self) -> None:
        if self._state is qmp.RunState.RUNNING:
            self._park()
            self._state = qmp.RunState.PAUSED
            self.on_event("STOP", {})

    def resume(self) -> None:
        if not self._announced:
            raise QmpError("the machine is still starting: its sidecars are not ready")
        if self._state in (qmp.RunState.PAUSED, qmp.RunState.PRELAUNCH):
            self._vcpus.resume()
            self._state = qmp.RunState.RUNNING
            self.on_event("RESUME", {})

    def reset(self, reason: str) -> None:
        if not self._announced:
            raise QmpError("the machine is still starting: its sidecars are not ready")
        self._reset(reason, guest=False)

    def powerdown(self) -> None:
        self._pm.power_button()
        self.on_event("POWERDOWN", {})

    def quit(self, reason: str) -> None:
        # Later: the command's answer goes out before the event.
        self._loop.call_soon(lambda: self._end(0, reason))

    def block_devices(self) -> Sequence[qmp.BlockDevice]:
        return [self._block_device(slot) for slot in self._slots if slot.kind == "blk"]

    def _block_device(self, slot: messages.Slot) -> qmp.BlockDevice:
        info = json.loads(slot.info)
        identity = self._devices[slot.device_id].identity
        # Configuration space begins with the capacity in sectors of 512 bytes (virtio 1.2, 5.2.4).
        capacity = int.from_bytes(identity.config[:8], "little") * 512 if identity else 0
        return qmp.BlockDevice(
            device_id=slot.device_id,
            filename=info["file"],
            driver=info["driver"],
            size=capacity,
            readonly=info["ro"],
            direct=info["direct"],
            backing=info["backing-file"] or "",
        )

    def char_devices(self) -> Sequence[qmp.CharDevice]:
        infos = [json.loads(slot.info) for slot in self._consoles()]
        return [qmp.CharDevice(i["label"], i["filename"], i["frontend-open"]) for i in infos]

    def _consoles(self) -> list[messages.Slot]:
        serial = [slot for slot in self._slots if slot.kind == "serial"]
        return sorted(serial, key=lambda slot: (slot.index != NO_SLOT, slot.index))

    def sidecars(self) -> Sequence[qmp.Sidecar]:
        return [
            qmp.Sidecar(
                slot.device_id,
                slot.kind,
                slot.pid,
                self._links[slot.device_id].state.value,
                None if slot.index == NO_SLOT else slot.index,
            )
            for slot in self._slots
        ]

    def sidecar_stats(self, device_id: str, done: Callable[[messages.StatsReport | None], None]) -> None:
        link = self._links.get(device_id)
        if link is None:
            raise DeviceNotFound(f"no device has the id {device_id}")
        link.stats(done)
