"""The processes of a VM from its supervisor's side: forked, given their Boot, looked up, killed.

What happens when one of them says something or ends is supervisor.py's.
"""

from __future__ import annotations

import functools
import gc
import importlib
import logging
import os
import select
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from motorcade.orchestrator import pagers
from motorcade.orchestrator.pagers import PagerKeeper
from motorcade.orchestrator.resources import NO_SLOT, Device, Resources, slot_info, slot_number
from motorcade.orchestrator.revival import Revival
from motorcade.orchestrator.spawn import Child, Helper, Main, execute, load_main, load_mains, spawn
from motorcade.proto import boot, schema
from motorcade.proto.versions import PROTOCOL_VERSION

if TYPE_CHECKING:
    from motorcade.orchestrator.cgroups import Cgroup
    from motorcade.orchestrator.machine import Machine
    from motorcade.orchestrator.resources import Device
    from motorcade.orchestrator.rundir import RunDir

log = logging.getLogger("motorcade.supervisor")


class Watcher(Protocol):
    """Who has new processes watched: ``pidfd`` and ``link`` become readable."""

    def watch(self, child: Child) -> None:
        """A child has been forked."""

    def changed(self, role: str, text: str) -> None:
        """A sidecar has ended, or another has taken its place; ``text`` is for a person."""


class Processes:
    """All of a VM but its supervisor. Owns them until ``close``."""

    def __init__(self, machine: Machine, run: RunDir, resources: Resources, watcher: Watcher) -> None:
        """Forks nothing yet."""
        self.machine, self.run_dir, self.resources, self.watcher = machine, run, resources, watcher
        self.core: Child | None = None
        self.cgroup: Cgroup | None = None
        self.pager: PagerKeeper | None = None
        self.sidecars: dict[str, Child] = {}
        self.helpers: list[Helper] = []  # programs that backends need: passt
        self._mains: dict[str, Main] = {}
        self.revival = Revival(self, machine.restarts, watcher.changed)

    def limit(self) -> None:
        """From here on they start in cgroups, where machine.yaml asks for limits. Errors: UserError."""
        if self.machine.limits is not None:
            from motorcade.orchestrator.cgroups import Cgroup

            self.cgroup = Cgroup(self.machine.name, self.machine.limits)

    def bound(self, role: str, pid: int) -> None:
        """A process has been started. Errors: UserError."""
        if self.cgroup is not None:
            self.cgroup.add(role, pid, sidecar=role != "core")

    def load(self) -> None:
        """Warm start: what is imported here, no child has to. Frozen, so that the garbage collector's writes do not
        copy every page of it in every child."""
        kinds = {device.kind for device in self.resources.devices}
        self._mains = load_mains(kinds | ({"pager"} if self.resources.incoming is not None else set()))
        if any(device.debug for device in self.resources.devices):
            importlib.import_module("motorcade.sidecars.prompt")
        gc.collect()
        gc.freeze()

    def fork_all(self) -> None:
        """The sidecars first: the core's Boot names their pids."""
        for device in self.resources.devices:
            self.sidecars[device.id] = self._fork(device.role, device.id, self._main(device))
        if self.resources.incoming is not None and not self.resources.in_place:
            self.pager = PagerKeeper(
                lambda: self._fork(pagers.ID, pagers.ID, self._mains["pager"]),
                self._send_boot,
                int(self.machine.memory),
                eager=not self.resources.lazy,
                restarts=self.machine.restarts,
            )
            self.pager.start()
        self.core = self._fork("core", "", self._mains["core"])

    def add_sidecar(self, device: Device) -> Child:
        """Of a device that has come to a machine which is there. Errors: OSError."""
        if device.kind not in self._mains:
            self._mains[device.kind] = load_main(device.kind)
        child = self.sidecars[device.id] = self._fork(device.role, device.id, self._main(device))
        return child

    def boot_sidecar(self, device: Device, *, incoming: bool) -> None:
        """Its Boot. ``incoming``: it starts quiesced."""
        self._send_boot(self.sidecars[device.id], device.boot, self.resources.sidecar_fds(device), incoming=incoming)

    def _main(self, device: Device) -> Main:
        """What its sidecar runs. One that is to be debugged is never a process that was prepared: that one's sandbox
        closed before it could load its prompt."""
        main = self._mains[device.kind]
        return functools.partial(main) if device.debug else main

    def _fork(self, role: str, device_id: str, main: Main) -> Child:
        """A child, watched."""
        log_fd = self.run_dir.open_log(role)
        try:
            child = spawn(role, device_id, self.machine.name, main, log_fd)
        finally:
            os.close(log_fd)
        self.watcher.watch(child)
        self.bound(role, child.pid)
        log.debug("%s is pid %d", role, child.pid)
        return child

    def device(self, device_id: str) -> Device | None:
        """What the supervisor knows of a device."""
        return next((d for d in self.resources.devices if d.id == device_id), None)

    def fork_successor(self, device: Device, code: str | None) -> Child:
        """Another process for a device, which waits for ``boot_successor``. ``code``: None for what this process has
        loaded; else a new interpreter runs what is on disk, in the directory ``code`` first where that is not empty.
        Errors: OSError, UserError."""
        if code is None:
            return self._fork(device.role, device.id, self._mains[device.kind])
        log_fd = self.run_dir.open_log(device.role)
        try:
            child = execute(device.role, device.id, device.kind, log_fd, code)
        finally:
            os.close(log_fd)
        self.watcher.watch(child)
        self.bound(device.role, child.pid)
        return child

    def renew(self, device: Device) -> None:
        """After a death: what the last process may have left in the middle is begun anew."""
        self.resources.renew(device, self._end_helper)

    def _end_helper(self, role: str) -> None:
        """At once. It is reaped when its pidfd says so."""
        for helper in self.helpers:
            if helper.role == role and helper.alive:
                helper.kill()
                select.select([helper.pidfd], [], [], 5.0)

    def boot_successor(self, device: Device, child: Child, *, standby: bool) -> None:
        """Gives it what the last one had. It is at rest until the core says otherwise."""
        fds = self.resources.sidecar_fds(device)
        self._send_boot(child, device.boot, fds, incoming=True, standby=standby)
        device.let_go()

    def boot_machine(self, *, paused: bool) -> None:
        """Core, sidecars and, where its template is known, a pager that fills memory on demand: all set to work side
        by side. The control socket listens already, so it does not matter who is first."""
        self._boot_core(paused=paused)
        # Before the sidecars: it has most to do.
        if self.pager is not None and not self.pager.eager and self.resources.template:
            self.boot_pager()
        for device in self.resources.devices:
            self._send_boot(self.sidecars[device.id], device.boot, self.resources.sidecar_fds(device))
            device.let_go()

    def _boot_core(self, *, paused: bool) -> None:
        assert self.core is not None
        machine, resources, incoming = self.machine, self.resources, self.resources.incoming
        slots = [
            schema.Slot(d.id, d.kind, slot_number(d), d.queues, self.sidecars[d.id].pid, slot_info(d), d.debug)
            for d in resources.devices
        ]
        if self.pager is not None and self.pager.child is not None:
            slots.append(schema.Slot(pagers.ID, "pager", NO_SLOT, 0, self.pager.child.pid))
        role = schema.CoreBoot(
            uuid=machine.uuid or "",
            cpus=machine.cpus,
            cmdline=machine.kernel.cmdline,
            devices=tuple(slots),
            uart=next((d.id for d in resources.devices if d.slot is None), ""),
            paused=paused,
            kernel_path=machine.kernel.image,
            initrd_path=machine.kernel.initrd or "",
            on_reboot=machine.on_reboot,
            on_poweroff=machine.on_poweroff,
            on_crash=machine.on_crash,
            generation_id=incoming.generation_id if incoming is not None else b"",
            defer=incoming is not None and not incoming.template,
        )
        self._send_boot(self.core, role, resources.core_fds())

    def boot_pager(self) -> None:
        """The template is known, and open."""
        incoming = self.resources.incoming
        assert self.pager is not None
        assert incoming is not None
        self.pager.boot(self.resources.pager_fds(), len(incoming.memory) - 1, incoming.start)

    def _send_boot(
        self,
        child: Child,
        role: schema.Role,
        fds: dict[str, int],
        *,
        incoming: bool | None = None,
        standby: bool = False,
    ) -> None:
        """A child that is gone already shows by its pidfd, not here. ``incoming``: unless as the machine."""
        message = schema.Boot(
            protocol_version=PROTOCOL_VERSION,
            vm_name=self.machine.name,
            control_socket=str(self.run_dir.path / "core.sock"),
            regions=tuple(self.resources.regions),
            log_level=self.machine.log_level,
            role=role,
            incoming=self.resources.incoming is not None if incoming is None else incoming,
            standby=standby,
            lazy=self.resources.lazy,
        )
        log_fd = self.run_dir.open_log(child.role)
        try:
            boot.send_boot(child.link, message, {**fds, "log": log_fd})
        except boot.BootError as e:
            log.error("%s: %s", child.role, e)
            child.kill()
        finally:
            os.close(log_fd)

    def all(self) -> list[Child]:
        """Every process of the VM but its supervisor."""
        pager = [self.pager.child] if self.pager is not None and self.pager.child is not None else []
        sidecars = [*self.sidecars.values(), *self.revival.standing_by()]
        return [*([self.core] if self.core else []), *pager, *sidecars]

    def describe(self) -> list[dict[str, Any]]:
        """For state.json and for a person."""
        restarts = self.revival.restarts
        children = [{**child.describe(), "restarts": restarts(child.device_id)} for child in self.all()]
        return children + [helper.describe() for helper in self.helpers]

    @property
    def is_deferred(self) -> bool:
        """Started to wait for a template, which has not been named yet."""
        return self.resources.incoming is not None and not self.resources.template

    def booted(self) -> list[Child]:
        """The processes that have had their Boot, or will have it before anything else happens."""
        pager = self.pager.child if self.pager is not None else None
        return [child for child in self.all() if child is not pager or not self.is_deferred]

    def is_pager(self, child: Child) -> bool:
        """Whether it is the present pager."""
        return self.pager is not None and child is self.pager.child

    def by_device(self, device_id: str) -> Child | None:
        """The sidecar of that device, or the pager."""
        return next((child for child in self.all() if child.device_id == device_id and child is not self.core), None)

    def tell_core(self, life: schema.Life, fds: Sequence[int] = ()) -> None:
        """A core that is gone shows by its pidfd."""
        if self.core is not None and self.core.alive:
            boot.send_life(self.core.link, life, fds)

    def reopen(self, child: Child) -> None:
        """A sidecar's connection to its backend has ended; it asks for another one."""
        device = next((d for d in self.resources.devices if d.id == child.device_id), None)
        error, fds = "", {}
        try:
            if device is None or device.connection is None:
                raise OSError(0, "this device has nothing to be opened again")
            fds = dict(device.connection.connect())
        except OSError as e:
            error = e.strerror or str(e)
        child.link.setblocking(False)
        try:
            boot.send_life(child.link, schema.Reopened(error, tuple(fds)), list(fds.values()))
        except BlockingIOError:
            log.error("%s asks, and does not listen", child.role)
            child.kill()
        finally:
            child.link.setblocking(True)
            for fd in fds.values():
                os.close(fd)

    def replace_pager(self) -> None:
        """Another one, with what the last one had. The core has to know of it before it says hello."""
        assert self.pager is not None
        child = self.pager.replace()
        self.tell_core(schema.SidecarReplaced(pagers.ID, child.pid))
        self.pager.resume()

    def kill_all(self) -> None:
        """At once. They are reaped when their pidfds say so, or by ``close``."""
        for child in self.all():
            if child.alive:
                child.kill()

    def close(self) -> None:
        """Ends what is left of them."""
        self.kill_all()
        for child in self.all():
            if child.alive:
                child.reap()
                child.close()
        if self.pager is not None:
            self.pager.close()
        for helper in self.helpers:
            helper.end()
        if self.cgroup is not None:
            self.cgroup.close()
