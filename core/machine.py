"""The machine: what happens to it when, and who may ask for that. What it is made of is platform.py's.

Everything here runs on the main thread except ``guest_shutdown`` and ``guest_reset``, which the guest's devices call on
vCPU threads; those only post to the loop.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from motorcade.core import balloon, inventory
from motorcade.core.boot.error import BootError
from motorcade.core.debugging import Debugger
from motorcade.core.hotplug import Hotplug
from motorcade.core.incoming import Incoming
from motorcade.core.kvm import Vm
from motorcade.core.life import LifeLink
from motorcade.core.link import LinkState, SidecarLink
from motorcade.core.loop import Loop
from motorcade.core.platform import PAGER, Platform
from motorcade.core.qmp import dump
from motorcade.core.qmp import machine as qmp
from motorcade.core.qmp.errors import DeviceNotFound, QmpError
from motorcade.core.recovery import Recovery
from motorcade.core.snapshot.coordinator import Coordinator
from motorcade.core.snapshot.plan import Kind, Plan, Report, SnapshotError, Status
from motorcade.core.task import Future
from motorcade.core.vcpu import StopReason
from motorcade.core.virtio import Identity
from motorcade.core.watching import Watching
from motorcade.proto import messages, tap, versions
from motorcade.proto.framing import ControlServer
from motorcade.proto.memory import GuestMemory

log = logging.getLogger(__name__)

PARK_SECONDS = 60.0  # a vCPU may wait for a sidecar's answer to a reset before it parks
HELLO_SECONDS = 60.0
PING_SECONDS = 5.0
SHUTDOWN_SECONDS = 40.0  # longer than the link waits for a disk to be flushed
DETAIL_MAX = 8192
FAILED = 1  # vmmctl's exit status (docs/vmmctl.md)


class Machine:
    """One VM. Implements qmp.MachineControl, platform.Guest and coordinator.Owner."""

    def __init__(
        self,
        boot: messages.Boot,
        fds: Mapping[str, int],
        memory: GuestMemory,
        loop: Loop,
        server: ControlServer,
        life: socket.socket,
        vm: Vm | None = None,
    ) -> None:
        """Creates the VM, unless it is there, with all its devices; nothing runs yet. Uses ``fds`` (by label), which it
        does not own."""
        assert isinstance(boot.role, messages.CoreBoot)
        self._boot, self._role, self._fds, self._loop, self._server = boot, boot.role, fds, loop, server
        self.on_event: Callable[[str, Mapping[str, object]], None] = lambda _name, _data: None
        self.ended: messages.Ended | None = None
        self._state = qmp.RunState.INMIGRATE if boot.incoming else qmp.RunState.PRELAUNCH
        self._announced = False
        self._held = False  # by a snapshot: the vCPUs stay parked
        self._over: qmp.RunState | None = None  # how the guest ended, where the VM stays nevertheless
        self._leaving = False  # the guest asked for a reset or the end: its vCPUs are not to go on
        self._dormant = boot.incoming  # restored and not run yet: sidecars quiet, clocks standing still
        self._resting = False  # after a snapshot that it was not to go on from: sidecars quiet
        self._hellos: Future[None] = Future()
        self._life = LifeLink(life, self._on_life)
        self._platform = Platform(boot, fds, memory, loop, server, self, vm)
        self._snapshots = Coordinator(self._platform, self, self._life, fds["memory"], fds.get("dirty"))

        self.watching = Watching(self._platform, fds, self._why_not_now)
        self.debugger = Debugger(self._platform, self._still)
        self.hotplug = Hotplug(self._platform, self._life, server, self)
        self._platform.on_device_reset = self.hotplug.driver_let_go
        self.balloon = balloon.find(self._platform, loop, lambda name, data: self.on_event(name, data))
        self._recovery = Recovery(self._platform, self._life, self)
        self._incoming = Incoming(self._platform, self._life, self, deferred=self._role.defer)
        server.handler = self._on_message
        server.tap = tap.Tap(fds.get("watch"))
        loop.add_control(server.fileno(), server.process)
        loop.add_deadlines(server.next_deadline, server.expire)
        loop.add_control(life.fileno(), self._on_life_readable)
        self._next_ping = time.monotonic() + PING_SECONDS
        loop.add_deadlines(lambda: self._next_ping, self._ping)

    def start(self) -> None:
        """Loads the kernel, or the machine's frozen state, and waits, vCPUs parked, for the sidecars' hellos.

        Errors: BootError. A state that cannot be restored ends the VM, later.
        """
        self._platform.attach_uart()
        if self._role.defer:
            return  # migrate-incoming is to say more
        if self._boot.incoming:
            self._incoming.begin(os.dup(self._fds["state"]))
        else:
            platform = self._platform
            platform.poll_uart(True)
            platform.vcpus.start(platform.power_on())
            self.expect_hellos().on_done(self.announce)

    def _look_for_hellos(self) -> None:
        if self._platform.complete:
            self._hellos.set(None)

    def _hello_overdue(self) -> None:
        links = self._platform.links.values()
        if self._announced:
            return  # a sidecar that is replaced says hello late
        if silent := [link.device_id for link in links if link.state is LinkState.WAITING]:
            self._end(FAILED, "sidecar-failed", f"no hello within {HELLO_SECONDS:g} s from: {', '.join(silent)}")

    def close(self) -> None:
        """Frees the VM. The vCPU threads end first."""
        self._recovery.close()
        self._snapshots.close()
        self._platform.close()

    # incoming.Owner.

    def expect_hellos(self) -> Future[None]:
        """See incoming.Owner, as below."""
        self._loop.call_later(HELLO_SECONDS, self._hello_overdue)
        self._look_for_hellos()
        return self._hellos

    def announce(self) -> None:
        if self._state is qmp.RunState.SHUTDOWN:
            return
        self._announced = True
        self._state = qmp.RunState.PAUSED if self._boot.incoming else qmp.RunState.PRELAUNCH
        if not self._role.paused:
            self._state = qmp.RunState.RUNNING
            self._go()
        self._life.send(messages.Running())

    def fail(self, reason: str) -> None:
        self._end(FAILED, "restore-failed", reason)

    def loaded(self) -> None:
        self._dormant, self._resting, self._leaving = True, False, False
        self._state = qmp.RunState.PAUSED

    # Sidecars and the supervisor.

    def _on_message(self, device_id: str, message: messages.Message) -> None:
        link, device, body = self._platform.links[device_id], self._platform.devices.get(device_id), message.body
        if isinstance(body, messages.Hello) and link.successor and link.kind != PAGER:
            welcome = messages.Welcome(versions.PROTOCOL_VERSION)
            answer = functools.partial(self._server.answer, device_id, message.id, welcome)
            self._recovery.hello(link, _identity(body), answer)
        elif isinstance(body, messages.Hello):
            identity = _identity(body)
            if device is not None:
                device.plug(identity)
            link.hello(whole_memory=body.whole_memory)
            self.hotplug.said_hello(device_id, identity)
            self._server.answer(device_id, message.id, messages.Welcome(versions.PROTOCOL_VERSION))
            self._look_for_hellos()
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
        for link in self._platform.links.values():
            link.ping()

    def kill_sidecar(self, device_id: str, reason: str, *, unless_traced: bool = False) -> None:
        """See platform.Guest."""
        log.error("%s: to be killed: %s", device_id, reason)
        self._life.send(messages.Silent(device_id) if unless_traced else messages.KillSidecar(device_id))

    def _on_life_readable(self) -> None:
        if not self._life.process():
            # Nobody is left to report to; the kernel is about to kill this process as well (PR_SET_PDEATHSIG).
            self.ended = messages.Ended(FAILED, "supervisor-gone")
            self._loop.stop()

    def _on_life(self, life: messages.Life) -> None:
        if isinstance(life, messages.SidecarDied):
            self._sidecar_died(life)
        elif isinstance(life, messages.SidecarReady):
            self._recovery.ready(life)
        elif isinstance(life, messages.SidecarReplaced):
            self._sidecar_replaced(life.device_id, life.pid)
        elif isinstance(life, messages.ShutdownVm):
            self.shut_down()

    def shut_down(self) -> None:
        """Ends the VM at once, disks flushed: the host wants that."""
        self._end(0, "host-signal")

    def _sidecar_replaced(self, device_id: str, pid: int) -> None:
        link = self._platform.links[device_id]
        if self._state is qmp.RunState.SHUTDOWN:
            link.died("it was to end")
        elif link.kind == PAGER:
            link.replaced(pid)
        else:
            self._recovery.replaced(link, pid)

    def _sidecar_died(self, life: messages.SidecarDied) -> None:
        if self.hotplug.died(life.device_id, life.reason):
            return
        link = self._platform.links[life.device_id]
        if link.state is LinkState.GONE:
            return
        if self._state is qmp.RunState.SHUTDOWN:
            link.died(life.reason)
        elif not self._announced:
            link.died(life.reason)
            self._end(FAILED, "sidecar-failed", f"{life.device_id}: {life.reason}")
        elif life.replaced:
            self._recovery.died(link, life.reason)
        else:
            self._recovery.failed(link, life.reason)

    @property
    def quiet(self) -> bool:
        """See recovery.Owner."""
        return self._dormant or self._resting or self._held

    def restart_sidecar(
        self, device_id: str, done: Callable[[QmpError | None], None], *, upgrade: bool = False, path: str = ""
    ) -> None:
        """See qmp.MachineControl."""
        self._started()
        if self._snapshots.busy or self._incoming.busy:
            raise QmpError("a snapshot is being taken or loaded; its end is to be waited for (query-migrate)")
        self._recovery.restart(device_id, path, done, upgrade=upgrade)

    # What the guest does, on its vCPUs' threads.

    def guest_shutdown(self) -> None:
        """See platform.Guest, as below."""
        self._leaving = True
        self._platform.vcpus.request_pause()
        self._loop.call_soon(lambda: self._guest_ended(qmp.RunState.SHUTDOWN, "guest-shutdown"))

    def guest_reset(self) -> None:
        self._leaving = True
        self._platform.vcpus.request_pause()
        self._loop.call_soon(self._on_guest_reset)

    def guest_stopped(self, reason: StopReason, text: str) -> None:
        self._guest_ended(qmp.RunState.INTERNAL_ERROR, reason.value, text)

    def _guest_ended(self, how: qmp.RunState, reason: str, detail: str = "") -> None:
        """The guest's end is the VM's, unless its owner wants to look at it."""
        powered_off = how is qmp.RunState.SHUTDOWN
        if (self._role.on_poweroff if powered_off else self._role.on_crash) != "pause" or not self._announced:
            self._end(0 if powered_off else FAILED, reason, detail, guest=True)
        elif self._over is None:
            why = SnapshotError(f"the guest ended: {reason}")
            self._snapshots.abort(why, lambda: self._loop.call_soon(lambda: self._stay(how, reason)))

    def _stay(self, how: qmp.RunState, reason: str) -> None:
        if self._state is qmp.RunState.SHUTDOWN:
            return
        try:
            self._park()
        except QmpError as e:
            self._end(FAILED, "internal-error", f"the guest ended, {reason}, and {e.desc}", guest=True)
            return
        ran, self._state, self._over = self._state, qmp.RunState.PAUSED, how
        log.info("the guest has ended: %s; the VM stays", reason)
        if how is qmp.RunState.SHUTDOWN:
            self.on_event("SHUTDOWN", {"guest": True, "reason": reason})
        if ran is qmp.RunState.RUNNING:
            self.on_event("STOP", {})

    def _on_guest_reset(self) -> None:
        if self._role.on_reboot == "exit":
            self._end(0, "guest-reset", guest=True)
        elif self._state is not qmp.RunState.SHUTDOWN:
            why = SnapshotError("the guest reset the machine")
            reset = lambda: self._loop.call_soon(self._reset_by_guest)  # noqa: E731
            self._snapshots.abort(why, lambda: self.hotplug.when_idle(reset))

    def _reset_by_guest(self) -> None:
        if self._state is qmp.RunState.SHUTDOWN:
            return
        try:
            self._reset("guest-reset", guest=True)
        except QmpError as e:
            self._end(FAILED, "internal-error", f"the guest's reset failed: {e.desc}", guest=True)

    # Transitions.

    def _park(self) -> None:
        vcpus = self._platform.vcpus
        vcpus.request_pause()
        if not self._loop.run_until(lambda: vcpus.parked, PARK_SECONDS):
            raise QmpError(f"the vCPUs did not stop within {PARK_SECONDS:g} s: a device's sidecar does not answer")

    @contextlib.contextmanager
    def _still(self) -> Iterator[None]:
        """The vCPUs are parked meanwhile, and nobody is told. QmpError where they do not park, or the VM ends."""
        self._started()
        self._park()
        if self._state is qmp.RunState.SHUTDOWN:
            raise QmpError("the VM ends")
        try:
            yield
        finally:
            if self._state is qmp.RunState.RUNNING and not self._held and not self._leaving:
                self._platform.vcpus.resume()

    def _go(self) -> None:
        """Lets the vCPUs run, unless the guest itself wants them to stop."""
        lost_ns = self._wake()
        if not self._leaving:
            self._platform.vcpus.resume(lost_ns)

    def _wake(self) -> int | None:
        """Ends a rest, if there is one. For how long a restored machine did not run, in nanoseconds."""
        lost_ns = None
        if self._dormant:
            lost_ns = self._first_run()
        elif self._resting:
            self._platform.wake()
        self._resting = False
        return lost_ns

    def _first_run(self) -> int:
        """A restored machine is set going: its clocks, which are ahead by the result, its identity, its sidecars."""
        self._dormant = False
        lost_ns = self._platform.clock.start()
        if self._role.generation_id:
            self._platform.write_generation_id(self._role.generation_id)
            self._platform.pm.generation_changed()
        self._platform.wake()
        return lost_ns

    def _reset(self, reason: str, *, guest: bool) -> None:
        self._park()
        self._wake()
        try:
            entry = self._platform.reset()
        except BootError as e:
            self._end(FAILED, "internal-error", f"the kernel cannot be loaded again: {e}")
            return
        self._platform.vcpus.reset(entry)
        self.hotplug.machine_reset()
        self._leaving, self._over = False, None
        self.on_event("RESET", {"guest": guest, "reason": reason})
        if self._state is qmp.RunState.RUNNING:
            self._go()

    def _end(self, status: int, reason: str, detail: str = "", *, guest: bool = False) -> None:
        """Ends the VM: vCPUs, then sidecars, which flush, then the loop. The first reason counts."""
        if self._state is qmp.RunState.SHUTDOWN:
            return
        self._state = qmp.RunState.SHUTDOWN
        log.info("the VM ends: %s %s", reason, detail)
        self.ended = messages.Ended(status, reason, detail[-DETAIL_MAX:])
        if status and not self._announced:
            # Before its sidecars go: the supervisor would take the first that does for the one that failed.
            self._life.send(messages.Failed(self.ended.detail or reason))
        # Not the pager: sidecars that flush may need pages. The supervisor ends it after everybody else.
        vcpus, links = self._platform.vcpus, self._platform.device_links
        vcpus.request_pause()
        self._snapshots.abort(SnapshotError(f"the VM ended: {reason}"))
        self.on_event("SHUTDOWN", {"guest": guest, "reason": reason})
        self._loop.run_until(lambda: vcpus.parked, PARK_SECONDS)
        self._recovery.close()
        self._life.send(messages.Ending())  # who ends now is not to be replaced
        for link in links:
            link.shutdown()
        everyone_gone = self._loop.run_until(
            lambda: all(link.state is LinkState.GONE for link in links), SHUTDOWN_SECONDS
        )
        if not everyone_gone:
            log.error("sidecars that did not end: %s", [x.device_id for x in links if x.state is not LinkState.GONE])
        self._loop.stop()

    # hotplug.Owner.

    def deny_hotplug(self) -> str | None:
        """See hotplug.Owner, as below."""
        if not self._announced or self._state is qmp.RunState.SHUTDOWN:
            return "the machine is starting, or ending"
        if self._snapshots.busy or self._incoming.busy:
            return "a snapshot is being taken; its end is to be waited for (query-migrate)"
        if self._recovery.busy:
            return "a sidecar is being restarted; its end is to be waited for"
        if self._dormant or self._resting:
            return "the machine was restored, or saved, and has not run since; cont first"
        return None

    def go_on(self) -> None:
        if self._state is qmp.RunState.RUNNING and not self._held:
            self._go()

    # coordinator.Owner.

    @property
    def guest_runs(self) -> bool:
        """See coordinator.Owner, as below."""
        return self._state is qmp.RunState.RUNNING

    def hold(self) -> Future[None]:
        self._held = True
        parked = self._platform.park()
        parked.on_done(lambda: self._platform.poll_uart(False))
        return parked

    def let_go(self) -> None:
        self._held = False
        if self._state is qmp.RunState.SHUTDOWN or self._dormant or self._resting:
            return
        self._platform.wake()
        if self._state is qmp.RunState.RUNNING:
            self._go()

    def keep_still(self) -> None:
        self._held = False
        self._resting = not self._dormant
        if self._state is qmp.RunState.RUNNING:
            self._state = qmp.RunState.PAUSED
            self.on_event("STOP", {})

    def snapshot_status(self, status: Status, plan: Plan) -> None:
        if plan.kind is Kind.DUMP and status.over:
            self.on_event("DUMP_COMPLETED", dump.completed(self.dump_report))
        if plan.kind is not Kind.MIGRATION:
            return
        if status is Status.COMPLETED and self._state in (qmp.RunState.PAUSED, qmp.RunState.PRELAUNCH):
            self._state = qmp.RunState.POSTMIGRATE
        self.on_event("MIGRATION", {"status": status.value})

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
        if self._held and self._state is not qmp.RunState.SHUTDOWN:
            return qmp.RunState.FINISH_MIGRATE
        if self._over is not None:
            return self._over
        return self._state

    @property
    def memory_size(self) -> int:
        return self._platform.memory.size

    @property
    def generation_id(self) -> bytes:
        return self._platform.read_generation_id()

    def set_generation_id(self, value: bytes) -> None:
        self._started()
        if self._snapshots.busy:
            raise QmpError("a snapshot is being taken, of the machine with the ID that it has")
        if self._dormant:
            raise QmpError("the machine was restored and has not run yet; it gets its ID when it does")
        self._platform.write_generation_id(value)
        self._platform.pm.generation_changed()

    def vcpus(self) -> Sequence[qmp.Vcpu]:
        return [qmp.Vcpu(index, tid, core=index) for index, tid in enumerate(self._platform.vcpus.tids)]

    def pause(self) -> None:
        self._started()
        if self._state is qmp.RunState.RUNNING:
            self._park()
            self._state = qmp.RunState.PAUSED
            self.on_event("STOP", {})

    def resume(self) -> None:
        self._started()
        if self._state is qmp.RunState.RUNNING:
            return
        if self._over is not None:
            raise QmpError(f"the guest has ended ({self._over}); system_reset starts it again, and cont then")
        if self._held:
            raise QmpError("a snapshot is being taken; the machine can go on when it is over (see query-migrate)")
        self._state = qmp.RunState.RUNNING
        self._go()
        self.on_event("RESUME", {})

    def reset(self, reason: str) -> None:
        self._started()
        if self._snapshots.busy:
            raise QmpError("a snapshot is being taken; end it by migrate_cancel, or wait for its end (query-migrate)")
        if self.hotplug.busy:
            raise QmpError("a device is being added or removed; wait for its end")
        if self._platform.firmware.kernel is None:
            raise QmpError("this machine was restored without its kernel image, which a reset needs")
        self._reset(reason, guest=False)

    def _why_not_now(self) -> str:
        """Why no sidecar can be told to rest or to go on: all of them are at rest, or come to it."""
        if self._held or self._snapshots.busy:
            return "a snapshot is being taken; its end is to be waited for (query-migrate)"
        if self._dormant or self._resting or not self._announced:
            return "the machine is at rest, and its sidecars with it, until it runs"
        return ""

    def _started(self) -> None:
        if not self._announced:
            what = "waits for its template" if self._boot.incoming else "is still starting: its sidecars are not ready"
            raise QmpError(f"the machine {what}")

    def powerdown(self) -> None:
        self._platform.pm.power_button()
        self.on_event("POWERDOWN", {})

    def quit(self, reason: str) -> None:
        # Later: the command's answer goes out before the event.
        self._loop.call_soon(lambda: self._end(0, reason))

    def snapshot(self, plan: Plan, then: Callable[[Report], None] | None = None) -> None:
        self._started()
        if self._incoming.busy:
            raise QmpError("a state of devices is being loaded")
        if self.hotplug.busy:
            raise QmpError("a device is being added or removed; wait for its end")
        if self._recovery.busy:
            raise QmpError("a sidecar is being restarted")
        try:
            self._snapshots.start(plan, then)
        except SnapshotError as e:
            raise QmpError(str(e)) from None

    def migrate_incoming(self, uri: str, done: Callable[[QmpError | None], None], given: int = -1) -> None:
        self._incoming.migrate(uri, given, done)

    def load_devices(self, uri: str, given: int, done: Callable[[QmpError | None], None]) -> None:
        if self.hotplug.busy:
            raise QmpError("a device is being added or removed; wait for its end")
        if self._snapshots.busy:
            raise QmpError("a snapshot is being taken; its end is to be waited for (query-migrate)")
        self._incoming.load(uri, given, done)

    def cancel_snapshot(self) -> None:
        self._snapshots.cancel()

    @property
    def snapshot_report(self) -> Report:
        return self._snapshots.report()

    @property
    def dump_report(self) -> Report:
        return self._snapshots.report(Kind.DUMP)

    def block_devices(self) -> Sequence[qmp.BlockDevice]:
        return inventory.block_devices(self._platform, self.hotplug)

    def spare_nodes(self) -> Sequence[qmp.BlockDevice]:
        return inventory.spare_nodes(self.hotplug)

    def net_devices(self) -> Sequence[qmp.NetDevice]:
        return inventory.net_devices(self._platform)

    def char_devices(self) -> Sequence[qmp.CharDevice]:
        return inventory.char_devices(self._platform)

    def sidecars(self) -> Sequence[qmp.Sidecar]:
        return inventory.sidecars(self._platform, self.watching.depths)

    def sidecar_stats(self, device_id: str, done: Callable[[messages.StatsReport | None], None]) -> None:
        self._link(device_id).stats(done)

    def last_stats(self, device_id: str) -> messages.StatsReport | None:
        return self._link(device_id).last_stats

    def _link(self, device_id: str) -> SidecarLink:
        link = self._platform.links.get(device_id)
        if link is None:
            raise DeviceNotFound(f"no device has the id {device_id}")
        return link


def _identity(hello: messages.Hello) -> Identity:
    return Identity(hello.virtio_type, hello.features, tuple(hello.queue_sizes), hello.config, hello.config_kinds)
