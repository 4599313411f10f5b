"""The supervisor: one a VM, from opening its resources to removing its run directory.

One thread, no ZeroMQ, no mapping of guest memory. What it opens is in resources.py, how it forks in spawn.py, where
its files are in rundir.py. It never waits in one place: everything is an event of one selector.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

from motorcade.orchestrator import lifeline
from motorcade.orchestrator.errors import EXIT_ERROR, UserError
from motorcade.orchestrator.machine import Machine
from motorcade.orchestrator.resources import Resources, slot_info, slot_number
from motorcade.orchestrator.rundir import RunDir
from motorcade.orchestrator.spawn import Child, Helper, Main, load_mains, spawn
from motorcade.orchestrator.vmstate import vm_state
from motorcade.proto import boot, schema
from motorcade.proto.versions import PROTOCOL_VERSION

log = logging.getLogger("motorcade.supervisor")

START_TIMEOUT = 60.0  # seconds from the fork to `running`; imports are done before the fork
END_TIMEOUT = 45.0  # seconds for the core to end the VM, which gives its sidecars 40 to flush, before the kill


class Supervisor:
    """One VM. ``run`` is its whole life."""

    def __init__(
        self, machine: Machine, run: RunDir, line: socket.socket, *, config: str, accel: str, paused: bool
    ) -> None:
        """Owns ``run`` and ``line``. ``config``: the path of machine.yaml, for people."""
        self.machine, self.run_dir, self.line = machine, run, line
        self.config, self.accel, self.paused = config, accel, paused
        self.resources = Resources(machine, run, self.add_helper)
        self.selector = selectors.DefaultSelector()
        self.core: Child | None = None
        self.sidecars: dict[str, Child] = {}
        self.helpers: list[Helper] = []  # processes that backends need: passt
        self.status = "starting"
        self.started = time.time()
        self.attached = True  # vmmctl has not let go of us
        self.ended: schema.Ended | None = None
        self.failure: UserError | None = None
        self.deadline: tuple[float, Callable[[], None]] | None = None  # monotonic, and what happens then
        self.logs: list[int] = []

    def run(self) -> int:
        """Starts the VM, watches it to its end, and leaves nothing behind. Returns its exit status."""
        try:
            self.watch_signals()
            self.open_resources()
            self.fork_processes()
            self.boot_core()
            self.loop()
        except UserError as e:
            self.fail(e)
        except Exception as e:  # a bug of ours must not leave a VM without its supervisor
            log.exception("the supervisor failed")
            self.fail(UserError(f"the supervisor failed: {type(e).__name__}: {e}"))
        finally:
            status = self.leave()
        return status

    # Start.

    def open_resources(self) -> None:
        """Everything the processes need, before there is any."""
        self.write_state()
        self.resources.open(self.progress)
        self.write_state()
        self.progress("loading code")
        # Warm start: what is imported here, no child has to. Frozen, so that the garbage collector's writes do not
        # copy every page of it in every child.
        self.mains = load_mains({device.kind for device in self.resources.devices})
        gc.collect()
        gc.freeze()

    def add_helper(self, role: str, pid: int) -> None:
        """A program that a backend has started."""
        helper = Helper(role, pid, os.pidfd_open(pid))
        self.helpers.append(helper)
        self.selector.register(helper.pidfd, selectors.EVENT_READ, lambda: self.on_helper_exit(helper))

    def fork_processes(self) -> None:
        """The sidecars first: the core's Boot names their pids. They wait for theirs until the core is ready."""
        for device in self.resources.devices:
            self.sidecars[device.id] = self.fork(device.role, device.id, self.mains[device.kind])
        self.core = self.fork("core", "", self.mains["core"])
        self.deadline = (time.monotonic() + START_TIMEOUT, self.start_timed_out)
        self.write_state()
        console = self.console()
        path = str(self.run_dir.path / f"console-{console}.sock") if console else None
        lifeline.send(self.line, event="started", processes=self.processes(), console=path)

    def fork(self, role: str, device_id: str, main: Main) -> Child:
        """A child, watched."""
        log_fd = self.run_dir.open_log(role)
        self.logs.append(log_fd)
        child = spawn(role, device_id, self.machine.name, main, log_fd)
        self.selector.register(child.pidfd, selectors.EVENT_READ, lambda: self.on_exit(child))
        self.selector.register(child.link, selectors.EVENT_READ, lambda: self.on_link(child))
        log.info("%s is pid %d", role, child.pid)
        return child

    def boot_core(self) -> None:
        """Sends the core what it needs. It binds its control socket and says ready."""
        assert self.core is not None
        machine, resources = self.machine, self.resources
        role = schema.CoreBoot(
            uuid=machine.uuid or "",
            cpus=machine.cpus,
            cmdline=machine.kernel.cmdline,
            devices=tuple(
                schema.Slot(d.id, d.kind, slot_number(d), d.queues, self.sidecars[d.id].pid, slot_info(d))
                for d in resources.devices
            ),
            uart=next((d.id for d in resources.devices if d.slot is None), ""),
            paused=self.paused,
            kernel_path=machine.kernel.image,
            initrd_path=machine.kernel.initrd or "",
            on_reboot=machine.on_reboot,
        )
        self.send_boot(self.core, role, resources.core_fds())

    def boot_sidecars(self) -> None:
        """Now that the core listens: connecting before the bind would cost each 100 to 200 ms."""
        for device in self.resources.devices:
            self.send_boot(self.sidecars[device.id], device.boot, self.resources.sidecar_fds(device))

    def send_boot(self, child: Child, role: schema.Role, fds: dict[str, int]) -> None:
        """A child that is gone already shows by its pidfd, not here."""
        message = schema.Boot(
            protocol_version=PROTOCOL_VERSION,
            vm_name=self.machine.name,
            control_socket=str(self.run_dir.path / "core.sock"),
            regions=tuple(self.resources.regions),
            log_level=self.machine.log_level,
            role=role,
        )
        log_fd = self.run_dir.open_log(child.role)
        try:
            boot.send_boot(child.link, message, {**fds, "log": log_fd})
        except boot.BootError as e:
            log.error("%s: %s", child.role, e)
            child.kill()
        finally:
            os.close(log_fd)

    # Events.

    def watch_signals(self) -> None:
        """SIGTERM, SIGINT and SIGHUP end the VM in good order; vmmctl's death does too, unless it detached."""
        receiver, sender = socket.socketpair()
        receiver.setblocking(False)
        sender.setblocking(False)
        self.signal_sockets = (receiver, sender)
        signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)  # the wake-up fd carries it to the loop
        self.selector.register(receiver, selectors.EVENT_READ, self.on_signal)
        self.selector.register(self.line, selectors.EVENT_READ, self.on_line)

    def loop(self) -> None:
        """Until every process is gone."""
        while any(child.alive for child in self.children()):
            timeout = None
            if self.deadline is not None:
                timeout = max(0.0, self.deadline[0] - time.monotonic())
            for key, _ in self.selector.select(timeout):
                # One event may have ended what a later one of the same round is about.
                if key.fd in self.selector.get_map():
                    key.data()
            if self.deadline is not None and time.monotonic() >= self.deadline[0]:
                action, self.deadline = self.deadline[1], None
                action()

    def on_signal(self) -> None:
        """A signal for the VM as a whole."""
        numbers = self.signal_sockets[0].recv(64)
        names = ", ".join(signal.Signals(n).name for n in set(numbers) if n != signal.SIGCHLD)
        if names:
            log.info("%s: ending the VM", names)
            self.shut_down()

    def on_line(self) -> None:
        """vmmctl lets go of the VM, or is gone."""
        try:
            message = lifeline.receive(self.line)
        except ValueError as e:
            log.error("vmmctl: %s", e)
            return
        if message is not None and message.get("do") == "detach":
            log.info("vmmctl detached")
            self.attached = False
        elif message is None:
            self.selector.unregister(self.line)
            if self.attached:
                log.info("vmmctl is gone: ending the VM")
                self.shut_down()

    def on_link(self, child: Child) -> None:
        """A Life message."""
        try:
            life = boot.recv_life(child.link)
        except schema.Malformed as e:
            log.error("%s sent nonsense: %s", child.role, e)
            child.kill()
            return
        if life is None:
            self.selector.unregister(child.link)  # its pidfd says the rest
        elif isinstance(life, schema.Failed):
            child.failure = life.reason
            log.error("%s: %s", child.role, life.reason)
        elif isinstance(life, schema.Ready):
            self.on_ready(child)
        elif child is self.core:
            self.on_core(life)
        else:
            log.error("%s sent %s, which only the core may", child.role, type(life).__name__)

    def on_ready(self, child: Child) -> None:
        """A process is set up and has dropped its privileges."""
        child.state = "ready"
        if child is self.core:
            self.boot_sidecars()

    def on_core(self, life: schema.Life) -> None:
        """What only the core says."""
        if isinstance(life, schema.Running):
            self.on_running()
        elif isinstance(life, schema.Ended):
            log.info("the VM ended: %s (status %d) %s", life.reason, life.status, life.detail)
            self.ended = life
            self.stop_by(END_TIMEOUT)
        elif isinstance(life, schema.KillSidecar):
            if (sidecar := self.sidecars.get(life.device_id)) is not None and sidecar.alive:
                log.error("%s is silent: killing it", sidecar.role)
                sidecar.failure = "silent past a deadline"
                sidecar.kill()
        else:
            log.error("the core sent %s, which is not its to send", type(life).__name__)

    def on_running(self) -> None:
        """The guest runs."""
        self.deadline = None
        self.status = "running"
        for child in self.children():
            child.state = "running" if child.alive else child.state
        log.info("running, %d ms after the start", (time.time() - self.started) * 1000)
        self.write_state()
        lifeline.send(self.line, event="running")

    def on_exit(self, child: Child) -> None:
        """A child is gone."""
        with contextlib.suppress(BlockingIOError, schema.Malformed):
            while child.link.fileno() in self.selector.get_map() and not self.drained(child):
                pass
        for fd in (child.pidfd, child.link.fileno()):
            with contextlib.suppress(KeyError):
                self.selector.unregister(fd)
        how = child.reap()
        log.log(logging.INFO if how == "exited with status 0" else logging.ERROR, "%s %s", child.role, how)
        child.close()
        why = f"{how}: {child.failure}" if child.failure else how
        if child is self.core:
            self.on_core_gone(why)
        elif self.status == "starting":
            self.on_failed_start(child, how)
        else:
            self.on_sidecar_died(child, why)
        self.write_state()

    def on_failed_start(self, child: Child, how: str) -> None:
        """A sidecar ended before the VM ran. The reason may be the core's end, whose own words have arrived by then."""
        assert self.core is not None
        culprit = child
        if self.core.alive:
            with contextlib.suppress(BlockingIOError, schema.Malformed):
                while self.core.link.fileno() in self.selector.get_map() and not self.drained(self.core):
                    pass
            if self.core.failure:
                culprit = self.core
        said = culprit.failure
        self.fail(UserError(f"{culprit.role} {'failed' if said else 'ended'}: {said or how}"))

    def drained(self, child: Child) -> bool:
        """Handles one more of its last words; True when there are none. Errors: BlockingIOError."""
        child.link.setblocking(False)
        before = child.link.fileno()
        self.on_link(child)
        return before not in self.selector.get_map()

    def on_core_gone(self, why: str) -> None:
        """The VM is over. Its sidecars flush and leave by themselves, since their control connection is gone."""
        assert self.core is not None
        if self.status == "starting" and self.ended is None:
            message = f"core failed: {self.core.failure}" if self.core.failure else f"the core {why} at the start"
            self.fail(UserError(message))
            return
        if self.ended is None:
            self.ended = schema.Ended(EXIT_ERROR, "core-died", f"the core {why}")
        self.stop_by(END_TIMEOUT)

    def on_sidecar_died(self, child: Child, why: str) -> None:
        """The VM goes on without that device; or it is ending, and the core waits for its sidecars to be gone."""
        assert self.core is not None
        if self.core.alive:
            boot.send_life(self.core.link, schema.SidecarDied(child.device_id, why[:4000]))
        # Status 0 is that of a sidecar which was asked to end: by the core, whose own end is about to follow, or by a
        # SIGTERM of somebody who knows.
        if self.status == "running" and child.state != "exited with status 0":
            lifeline.send(self.line, event="sidecar-died", role=child.role, reason=why)

    def on_helper_exit(self, helper: Helper) -> None:
        """passt, for one, is gone: its NIC's sidecar sees the end of the stream, and the guest a link that is down."""
        self.selector.unregister(helper.pidfd)
        log.error("%s %s", helper.role, helper.reap())
        lifeline.send(self.line, event="sidecar-died", role=helper.role, reason=helper.state)
        self.write_state()

    # End.

    def shut_down(self) -> None:
        """Asks the core to end the VM at once, flushing the disks."""
        if self.status == "starting":
            self.fail(UserError("ended before the VM ran", EXIT_ERROR))
        elif self.status == "running":
            assert self.core is not None
            boot.send_life(self.core.link, schema.ShutdownVm())
            self.stop_by(END_TIMEOUT)

    def stop_by(self, seconds: float) -> None:
        """From now on processes are expected to end; those that have not by then are killed."""
        if self.status != "stopping":
            self.status = "stopping"
            self.deadline = (time.monotonic() + seconds, self.kill_all)
            self.write_state()

    def kill_all(self) -> None:
        """No patience left."""
        for child in self.children():
            if child.alive:
                log.error("%s did not end in time: killing it", child.role)
                child.kill()

    def start_timed_out(self) -> None:
        """Something never became ready."""
        late = [child.role for child in self.children() if child.state == "starting"]
        what = ", ".join(late) or "the core"
        self.fail(UserError(f"{what} did not become ready within {START_TIMEOUT:g} s"))

    def fail(self, error: UserError) -> None:
        """The VM will not run. The first reason is the one that counts."""
        if self.failure is None and self.ended is None:
            self.failure = error
            log.error("%s", error)
        self.status = "stopping"
        for child in self.children():
            if child.alive:
                child.kill()

    def leave(self) -> int:
        """Ends what is left, tells vmmctl how it was, and removes the run directory."""
        self.deadline = None
        for child in self.children():
            if child.alive:
                child.kill()
                child.reap()
                child.close()
        for helper in self.helpers:
            helper.end()
        for fd in self.logs:
            os.close(fd)
        if self.failure is not None:
            ended = schema.Ended(self.failure.status, "start-failed", str(self.failure))
        else:
            ended = self.ended or schema.Ended(EXIT_ERROR, "core-died", "the core ended without a word")
        self.status = "failed" if self.failure is not None else "ended"
        self.ended = ended
        self.write_state()
        self.resources.close()
        self.run_dir.release()
        # Last, so that whoever hears it finds everything gone.
        if self.failure is not None:
            lifeline.send(self.line, event="failed", message=str(self.failure), status=self.failure.status)
        else:
            lifeline.send(self.line, event="ended", status=ended.status, reason=ended.reason, detail=ended.detail)
        return ended.status

    # For others.

    def children(self) -> list[Child]:
        """Every process of the VM but its supervisor."""
        return [*([self.core] if self.core else []), *self.sidecars.values()]

    def processes(self) -> list[dict[str, Any]]:
        """For state.json and for a person."""
        return [process.describe() for process in (*self.children(), *self.helpers)]

    def console(self) -> str | None:
        """The console that `vmmctl up` and `vmmctl console` attach to when not told: terminal, else the uart."""
        consoles = self.machine.consoles
        chosen = [c for c in consoles if c.backend == "terminal"] or [c for c in consoles if c.type == "uart"]
        return (chosen or consoles)[0].id if consoles else None

    def progress(self, text: str) -> None:
        """Shown by vmmctl if the step takes long."""
        lifeline.send(self.line, event="progress", text=text)

    def write_state(self) -> None:
        """Tells vmmctl ps, status and others how it stands."""
        self.run_dir.write_state(vm_state(self))
