"""Devices that come and go in a machine that is there, from its supervisor's side: what the core asks for.

A backend is opened with the checks and locks of a start; a device is a backend with a slot and a sidecar. What is done
here is soon done (a program like passt may take a moment to come up, as at the start), so the supervisor does it in one
go; only the end of a process is waited for in its loop.
"""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from motorcade.orchestrator import netbackend
from motorcade.orchestrator.errors import UserError
from motorcade.orchestrator.machine import Disk, Net, Removed, parse_mac
from motorcade.orchestrator.resources import FIRST_SLOT, Device
from motorcade.proto import hotplug as ask
from motorcade.proto import schema
from motorcade.proto.messages import BlkBoot, NetBoot

if TYPE_CHECKING:
    from motorcade.orchestrator.disks import OpenDisk
    from motorcade.orchestrator.spawn import Child, Helper
    from motorcade.orchestrator.supervisor import Supervisor

log = logging.getLogger("motorcade.supervisor")

_TEXT_MAX = 4000


@dataclass
class Backend:
    """A disk or a NIC's other side, open, and the device that has it."""

    part: Disk | Net
    device: Device  # as it was opened: no slot, and the backend's name as its id
    disk: OpenDisk | None
    user: str = ""
    keep: bool = True  # when its device goes


class Hotplug:
    """Of one VM."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._backends: dict[str, Backend] = {}
        self._coming: set[str] = set()  # devices that the core does not count on yet
        self._leaving = ""  # the device whose end the core waits for
        self._dismissed: set[str] = set()  # roles of helpers that were ended

    # Events.

    def on(self, life: schema.Hotplug, fds: Sequence[int]) -> None:
        """A request of the core's; ``fds`` stay the caller's."""
        try:
            request = ask.decode(life.request)
            log.debug("%s", request)
            match request:
                case ask.OpenBackend():
                    self._open(request, fds)
                case ask.CloseBackend():
                    self._close(request.name)
                case ask.Plug():
                    self._plug(request)
                    return
                case ask.Boot():
                    self._boot(request)
                case ask.Settled():
                    self._coming.discard(request.id)
                case ask.Unplug():
                    if not self._unplug(request):
                        return
        except (UserError, OSError, ValueError) as e:
            text = str(e) if isinstance(e, UserError | ValueError) else str(e.strerror)
            log.warning("hot-plug: %s", text)
            self._answer(schema.Hotplugged(" ".join(text.split("\n"))[:_TEXT_MAX]))
        else:
            self._answer(schema.Hotplugged(""))
            self._supervisor.write_state()

    def is_moving(self, child: Child) -> bool:
        """Whether the end of this sidecar is nobody's but the core's to hear of."""
        return child.device_id == self._leaving or child.device_id in self._coming

    def on_exit(self, child: Child, why: str) -> None:
        """A sidecar that was moving is gone."""
        self._supervisor.processes.tell_core(schema.SidecarDied(child.device_id, (child.failure or why)[:_TEXT_MAX]))
        if child.device_id == self._leaving:
            self._free(child.device_id)
            self._answer(schema.Hotplugged(""))

    def is_dismissed(self, helper: Helper) -> bool:
        """Whether a helper's end was ours to bring about."""
        return helper.role in self._dismissed

    def _answer(self, answer: schema.Hotplugged, fds: Sequence[int] = ()) -> None:
        self._supervisor.processes.tell_core(answer, fds)

    # Backends.

    def _open(self, request: ask.OpenBackend, fds: Sequence[int]) -> None:
        from motorcade.orchestrator import config

        supervisor = self._supervisor
        folder = Path(supervisor.config).absolute().parent
        part = config.part(supervisor.machine, request.kind, request.options, folder)
        resources = supervisor.resources
        if isinstance(part, Disk):
            device = resources.open_disk(part)
            self._backends[part.id] = Backend(part, device, resources.disks.pop(part.id))
        elif fds:
            part.tap, part.unplugged = netbackend.adopt_taps(part.id, fds), False
            taps = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in fds]
            self._backends[part.id] = Backend(part, resources.open_net(part, taps), None)
        else:
            self._backends[part.id] = Backend(part, resources.open_net(part), None)

    def _close(self, name: str) -> None:
        """One that went with its device already is no error: the core cannot know how far a Plug came."""
        if (backend := self._backends.pop(name, None)) is not None:
            self._let_go(backend.device)

    def locks(self) -> list[dict[str, Any]]:
        """Of backends that no device has, for state.json."""
        return [lock for b in self._backends.values() if not b.user for lock in b.device.locks]

    def _let_go(self, device: Device) -> None:
        """Closes what a device has of its own, with its locks; ends its helper."""
        supervisor = self._supervisor
        if isinstance(device.boot, BlkBoot):
            for label, fd in device.fds.items():
                if label == "debug":
                    continue
                # Its sidecar's io_uring may keep the file open for a while after its end, and so the lock.
                fcntl.flock(fd, fcntl.LOCK_UN)
        supervisor.resources.let_go(device.fds.values())
        device.fds = {}
        role = f"passt-{device.id}"
        for helper in [h for h in supervisor.processes.helpers if h.role == role]:
            self._dismissed.add(role)
            supervisor.processes.helpers.remove(helper)
            if helper.alive:
                supervisor.selector.unregister(helper.pidfd)
            helper.end()

    # Coming.

    def _plug(self, request: ask.Plug) -> None:
        resources, processes = self._supervisor.resources, self._supervisor.processes
        old = self._device(request.replaces) if request.replaces else None
        part: Disk | Net | Removed
        if request.backend:
            part, device = self._of_backend(self._backends[request.backend], request)
        else:
            assert old is not None
            part = self._removed(old, request.slot)
            device = resources.nothing(part, request.id)
        try:
            device.slot = request.slot
            if old is not None and device.queues != old.queues:
                raise UserError(
                    f"{ask.UNLIKE}the guest's driver still holds the slot, and it has {old.queues} queues, the "
                    f"device {device.queues}; unbind it in the guest, or use another slot"
                )
            resources.wire(device, old)
            child = processes.add_sidecar(device)
        except (UserError, OSError):
            if device in resources.devices:
                self._unwire(device)
            theirs = set(self._backends[request.backend].device.fds.values()) if request.backend else set()
            resources.let_go([fd for fd in device.fds.values() if fd not in theirs])
            raise
        self._coming.add(device.id)
        self._record(device, part)
        if request.backend:
            backend = self._backends[request.backend]
            backend.user, backend.keep = device.id, request.keep
            if backend.disk is not None:
                resources.disks[device.id] = backend.disk
        mac = str(part.mac) if isinstance(part, Net) else None
        plugged = ask.Plugged(device.kind, device.queues, child.pid, json.dumps(device.info), mac)
        fds = {"watch": device.watch}
        if old is None:
            fds |= {f"kick.{n}": fd for n, fd in enumerate(device.kicks)} | {"call.0": device.call, "isr": device.isr}
        self._answer(schema.Hotplugged("", ask.encode(plugged), tuple(fds)), tuple(fds.values()))
        self._supervisor.write_state()

    def _of_backend(self, backend: Backend, request: ask.Plug) -> tuple[Disk | Net, Device]:
        """The device that a backend is to be."""
        opened, name = backend.device, self._supervisor.machine.name
        if isinstance(backend.part, Disk):
            assert isinstance(opened.boot, BlkBoot)
            serial = request.serial or backend.part.serial or request.id[:20]
            part: Disk | Net = msgspec.structs.replace(backend.part, id=request.id, serial=serial)
            boot: BlkBoot | NetBoot = replace(opened.boot, device_id=request.id, serial=serial)
            info = opened.info
        else:
            assert isinstance(opened.boot, NetBoot)
            from motorcade.orchestrator.machine import stable_mac

            chosen = parse_mac(request.mac) if request.mac is not None else None
            mac = chosen or (backend.part.mac if not backend.keep else None) or stable_mac(name, request.id)
            for net in self._supervisor.machine.nets:
                if net.mac == mac:
                    unlike = ask.UNLIKE if request.replaces else ""
                    raise UserError(f"{unlike}{mac} is already the address of {net.id}")
            part = msgspec.structs.replace(backend.part, id=request.id, mac=mac)
            boot = replace(opened.boot, device_id=request.id, mac=bytes(mac))
            info = {**opened.info, "mac": str(mac)}
        fds = dict(opened.fds)  # it may get some that are not its backend's
        device = replace(opened, id=request.id, boot=boot, info=info, fds=fds, kicks=[], call=-1, isr=-1, watch=-1)
        return part, device

    def _removed(self, old: Device, slot: int) -> Removed:
        boot = old.boot
        place = slot - FIRST_SLOT[old.kind]
        if isinstance(boot, BlkBoot):
            return Removed("blk", place, boot.queues, boot.readonly, boot.discard)
        assert isinstance(boot, NetBoot)
        from motorcade.orchestrator.machine import Mac

        return Removed("net", place, boot.queue_pairs, mac=Mac(boot.mac), mtu=boot.mtu or None)

    def _boot(self, request: ask.Boot) -> None:
        self._supervisor.processes.boot_sidecar(self._device(request.id), incoming=request.incoming)

    # Going.

    def _unplug(self, request: ask.Unplug) -> bool:
        """False: the answer comes when its process has ended."""
        child = self._supervisor.processes.sidecars[request.id]
        self._leaving = request.id
        if child.alive:
            if request.kill:
                child.kill()
            return False
        self._free(request.id)
        return True

    def _free(self, device_id: str) -> None:
        """Its process is gone; whatever there is for it follows."""
        supervisor, device = self._supervisor, self._device(device_id)
        self._leaving = ""
        self._coming.discard(device_id)
        supervisor.watching.forget(device_id)
        del supervisor.processes.sidecars[device_id]
        self._unwire(device)
        supervisor.resources.disks.pop(device_id, None)
        backend = next((b for b in self._backends.values() if b.user == device_id), None)
        if backend is None:
            self._let_go(device)
        else:
            theirs = set(backend.device.fds.values())
            supervisor.resources.let_go([fd for fd in device.fds.values() if fd not in theirs])
            backend.user = ""
            if not backend.keep:
                self._close(backend.part.id)
        self._strike(device)

    def _unwire(self, device: Device) -> None:
        """Its doorbells are closed, unless another device goes on with them."""
        resources = self._supervisor.resources
        resources.devices.remove(device)
        resources.let_go([device.watch])
        if all(other.call != device.call for other in resources.devices):
            resources.let_go([*device.kicks, device.call, device.isr])

    def _device(self, device_id: str) -> Device:
        return next(d for d in self._supervisor.resources.devices if d.id == device_id)

    # The machine's description, for templates.

    def _record(self, device: Device, part: Disk | Net | Removed) -> None:
        """The machine has this device, too. From now on it says which slot each device is in."""
        machine, resources = self._supervisor.machine, self._supervisor.resources
        assert device.slot is not None
        place = device.slot - FIRST_SLOT[device.kind]
        if isinstance(part, Removed):
            machine.removed = [*machine.removed, part]
        elif isinstance(part, Disk):
            machine.disks = [*machine.disks, msgspec.structs.replace(part, slot=place)]
        else:
            machine.nets = [*machine.nets, msgspec.structs.replace(part, slot=place)]
        slots = {d.id: d.slot for d in resources.devices}
        for kind, parts in (("blk", machine.disks), ("net", machine.nets)):
            for known in parts:
                slot = slots[known.id]
                assert slot is not None
                known.slot = slot - FIRST_SLOT[kind]

    def _strike(self, device: Device) -> None:
        machine = self._supervisor.machine
        assert device.slot is not None
        if device.id.startswith("~"):
            place = device.slot - FIRST_SLOT[device.kind]
            machine.removed = [r for r in machine.removed if (r.kind, r.slot) != (device.kind, place)]
        machine.disks = [disk for disk in machine.disks if disk.id != device.id]
        machine.nets = [net for net in machine.nets if net.id != device.id]
