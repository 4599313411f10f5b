"""The supervisor: one a VM, from opening its resources to removing its run directory.

One thread, no ZeroMQ, no mapping of guest memory. What it opens is in resources.py, how it forks in spawn.py, where
its files are in rundir.py. It never waits in one place: everything is an event of one selector.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from motorcade.orchestrator import lifeline, pagers
from motorcade.orchestrator.errors import EXIT_ERROR, UserError
from motorcade.orchestrator.frozendisks import Incoming
from motorcade.orchestrator.hotplug import Hotplug
from motorcade.orchestrator.incomings import Incomings
from motorcade.orchestrator.kitplace import last_words
from motorcade.orchestrator.machine import Machine
from motorcade.orchestrator.processes import Processes
from motorcade.orchestrator.resources import Resources
from motorcade.orchestrator.rundir import RunDir
from motorcade.orchestrator.snapshots import Snapshots
from motorcade.orchestrator.spawn import Child, Helper, is_traced
from motorcade.orchestrator.vmlook import VmLook
from motorcade.orchestrator.vmstate import vm_state
from motorcade.orchestrator.watching import Watching
from motorcade.proto import boot, schema

log = logging.getLogger("motorcade.supervisor")

START_TIMEOUT = 60.0  # seconds from the fork to `running`; imports are done before the fork
DAMAGED_TIMEOUT = 5.0  # for its sidecars to flush what they have; one that waits for a page would wait for ever
END_TIMEOUT = 45.0  # seconds for the core to end the VM, which gives its sidecars 40 to flush, before the kill


class Supervisor:
    """One VM. ``run`` is its whole life."""

    def __init__(
        self,
        machine: Machine,
        run: RunDir,
        line: socket.socket,
        *,
        config: str,
        accel: str,
        paused: bool,
        incoming: Incoming | None = None,
    ) -> None:
        """Owns ``run`` and ``line``. ``config``: the path of machine.yaml, for people. ``incoming``: the machine goes
        on from a template."""
        self.machine, self.run_dir, self.line = machine, run, line
        self.config, self.accel, self.paused = config, accel, paused
        self.resources = Resources(machine, run, self.add_helper, incoming)
        self.processes = Processes(machine, run, self.resources, self)
        self.selector = selectors.DefaultSelector()
        tell_core = self.processes.tell_core
        self.snapshots = Snapshots(machine, self.resources, self.selector, tell_core)
        self.incomings = Incomings(machine, config, self.resources, self.selector, tell_core, self.on_template_opened)
        self.watching = Watching(machine, run, self.selector, VmLook(self))
        self.hotplug = Hotplug(self)
        self.status = "starting"
        self.started = time.time()
        self.attached = True  # vmmctl has not let go of us
        self.ended: schema.Ended | None = None
        self.failure: UserError | None = None
        self.deadline: tuple[float, Callable[[], None]] | None = None  # monotonic, and what happens then

    def run(self) -> int:
        """Starts the VM, watches it to its end, and leaves nothing behind. Returns its exit status."""
        try:
            self.watch_signals()
            self.open_resources()
            self.processes.fork_all()
            self.deadline = (time.monotonic() + START_TIMEOUT, self.start_timed_out)
            pager = self.processes.pager
            if pager is not None and pager.eager and self.resources.template:
                self.progress("copying the memory")
                self.boot_pager()  # the others follow when all is there
            else:
                self.boot_machine()
            self.tell_started()  # while they work
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
        self.processes.limit()
        self.resources.open(self.progress)
        self.watching.open()
        self.progress("loading code")
        self.processes.load()

    def add_helper(self, role: str, pid: int, *, gentle: bool = False) -> None:
        """A program that a backend has started."""
        helper = Helper(role, pid, os.pidfd_open(pid), gentle=gentle)
        gone = [h for h in self.processes.helpers if h.role == role and not h.alive]
        for before in gone:
            before.close()
            self.processes.helpers.remove(before)
        self.processes.helpers.append(helper)
        self.processes.bound(role, pid)
        self.selector.register(helper.pidfd, selectors.EVENT_READ, lambda: self.on_helper_exit(helper))
        if self.status != "starting":
            self.write_state()

    def tell_started(self) -> None:
        """The processes are there, and the sockets listen."""
        if self.run_dir.pidfile is not None and self.processes.core is not None:
            self.run_dir.pidfile.write(self.processes.core.pid)
        self.write_state()
        console = self.console()
        path = str(self.run_dir.path / f"console-{console}.sock") if console else None
        lifeline.send(self.line, event="started", processes=self.processes.describe(), console=path)

    def boot_machine(self) -> None:
        """See Processes, as below."""
        self.processes.boot_machine(paused=self.paused)

    def boot_pager(self) -> None:
        self.processes.boot_pager()

    def watch(self, child: Child) -> None:
        """See processes.Watcher."""
        self.selector.register(child.pidfd, selectors.EVENT_READ, lambda: self.on_exit(child))
        self.selector.register(child.link, selectors.EVENT_READ, lambda: self.on_link(child))

    def changed(self, role: str, text: str) -> None:
        """See processes.Watcher."""
        lifeline.send(self.line, event="sidecar-died", role=role, reason=text)
        self.write_state()

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
        while any(child.alive for child in self.processes.all()):
            for key, _ in self.selector.select(self.patience()):
                # One event may have ended what a later one of the same round is about.
                if key.fd in self.selector.get_map():
                    key.data()
            if self.deadline is not None and time.monotonic() >= self.deadline[0]:
                action, self.deadline = self.deadline[1], None
                action()
            self.look_after_pager()
            self.watching.work()
            self.processes.revival.look()

    def patience(self) -> float | None:
        """Seconds until something is due by itself."""
        pager = self.processes.pager
        due = [pager.due if pager is not None else None, self.deadline[0] if self.deadline is not None else None]
        due += [self.watching.due, self.processes.revival.due()]
        times = [time_ for time_ in due if time_ is not None]
        return max(0.0, min(times) - time.monotonic()) if times else None

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
            life, fds = boot.recv_life_fds(child.link)
        except schema.Malformed as e:
            log.error("%s sent nonsense: %s", child.role, e)
            child.kill()
            return
        try:
            self.on_life(child, life, fds)
        finally:
            for fd in fds:
                os.close(fd)

    def on_life(self, child: Child, life: schema.Life | None, fds: list[int]) -> None:
        """One message, with descriptors that are the caller's."""
        if life is None:
            self.selector.unregister(child.link)  # its pidfd says the rest
        elif isinstance(life, schema.Failed):
            child.failure = life.reason.rstrip()
            log.error("%s: %s", child.role, child.failure)
        elif isinstance(life, schema.Ready):
            self.on_ready(child)
        elif isinstance(life, schema.LazyReady) and self.processes.pager is not None and len(fds) == 1:
            self.processes.pager.add(f"{child.role}.{child.pid}", os.dup(fds[0]), life.mappings)
            self.on_ready(child)
        elif isinstance(life, schema.Reopen):
            self.processes.reopen(child)
        elif child is self.processes.core:
            self.on_core(life, fds)
        elif self.processes.is_pager(child):
            self.on_pager(life)
        else:
            log.error("%s sent %s, which is not its to send", child.role, type(life).__name__)

    def on_ready(self, child: Child) -> None:
        """A process is set up and has dropped its privileges; a sidecar's filter comes before its hello to the core."""
        core, pager = self.processes.core, self.processes.pager
        child.state = "ready" if self.status == "starting" else "running"
        if pager is not None and pager.child is child and pager.eager and core is not None:
            # All of the memory is there.
            if core.state == "starting":
                self.boot_machine()
            else:
                self.answer_incoming()
        if self.status != "starting":
            self.processes.revival.ready(child)
            self.write_state()
        elif self.processes.is_deferred and all(c.state == "ready" for c in self.processes.booted()):
            self.on_deferred()

    def on_core(self, life: schema.Life, fds: Sequence[int]) -> None:
        """What only the core says. ``fds`` stay the caller's."""
        if isinstance(life, schema.Running):
            self.on_running()
        elif isinstance(life, schema.Ended):
            log.info("the VM ended: %s (status %d) %s", life.reason, life.status, life.detail)
            self.ended = life
            self.stop_by(END_TIMEOUT)
        elif isinstance(life, schema.KillSidecar | schema.Silent):
            sidecar = self.processes.by_device(life.device_id)
            if sidecar is not None and sidecar.alive and isinstance(life, schema.Silent) and is_traced(sidecar.pid):
                log.warning("%s: no sign of life, but a debugger is attached to it", sidecar.role)
            elif sidecar is not None and sidecar.alive:
                log.error("%s is silent: killing it", sidecar.role)
                sidecar.failure = "silent past a deadline"
                sidecar.kill()
        elif isinstance(life, schema.RestartSidecar):
            self.processes.revival.restart(life)
        elif isinstance(life, schema.HandOver):
            self.processes.revival.hand_over(life)
        elif isinstance(life, schema.Ending):
            self.processes.revival.ending()
        elif isinstance(life, schema.OpenTarget | schema.CopyDisks | schema.CloseTarget):
            self.snapshots.on(life)
        elif isinstance(life, schema.Hotplug):
            self.hotplug.on(life, fds)
        elif isinstance(life, schema.OpenIncoming):
            self.incomings.on(life, fds)
        else:
            log.error("the core sent %s, which is not its to send", type(life).__name__)

    def on_deferred(self) -> None:
        """All is ready but the template, which QMP's migrate-incoming is to name."""
        self.deadline = None
        self.status = "incoming"
        self.write_state()
        lifeline.send(self.line, event="running")

    def on_template_opened(self) -> None:
        """Of a VM that was started without one."""
        if self.processes.pager is not None:
            self.boot_pager()
        if self.processes.pager is None or self.resources.lazy:
            self.answer_incoming()
        # Else when the pager has copied all of the memory.

    def answer_incoming(self) -> None:
        """The template's state, for the core that asked."""
        self.processes.tell_core(schema.Incoming(""), [self.resources.template["state"]])

    def on_pager(self, life: schema.Life) -> None:
        """What only the pager says."""
        incoming = self.resources.incoming
        assert incoming is not None
        if isinstance(life, schema.Damaged):
            self.end_damaged(life.reason)
        elif isinstance(life, schema.WorkingSet):
            if Path(incoming.template).is_dir():
                pagers.keep_working_set(Path(incoming.template), life.chunks)
        else:
            log.error("the pager sent %s, which is not its to send", type(life).__name__)

    def end_damaged(self, reason: str) -> None:
        """The VM's memory cannot be had. Nothing of it goes on: the guest would see other bytes than it wrote."""
        if self.status == "starting":
            self.fail(UserError(f"the template is damaged: {reason}"))
        elif self.ended is None:
            log.error("the template is damaged: %s", reason)
            self.ended = schema.Ended(EXIT_ERROR, "template-damaged", reason)
            core = self.processes.core
            if core is not None and core.alive:
                core.kill()  # its vCPUs may wait for a page for ever
            self.stop_by(DAMAGED_TIMEOUT)

    def look_after_pager(self) -> None:
        """Replaces it when that is due, and ends it when nobody is left who could need it."""
        pager = self.processes.pager
        if pager is None or pager.child is None:
            return
        if not any(child.alive for child in self.processes.all() if child is not pager.child):
            pager.due = None
            if pager.child.alive:
                pager.child.kill()
        elif pager.due is not None and time.monotonic() >= pager.due:
            self.processes.replace_pager()
            self.write_state()

    def on_running(self) -> None:
        """The guest runs."""
        self.deadline = None
        self.status = "running"
        for child in self.processes.all():
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
        self.watching.note(child.device_id or child.role, how)
        child.close()
        why = f"{how}: {child.failure}" if child.failure else how
        if self.processes.pager is not None:
            self.processes.pager.forget(f"{child.role}.{child.pid}")
        if child is self.processes.core:
            self.on_core_gone(why)
        elif self.status == "starting":
            self.on_failed_start(child, how)
        elif self.processes.is_pager(child):
            self.on_pager_died(why)
        elif self.hotplug.is_moving(child):
            self.hotplug.on_exit(child, why)
        else:
            self.on_sidecar_died(child, why)
        self.write_state()

    def on_failed_start(self, child: Child, how: str) -> None:
        """A sidecar ended before the VM ran. The reason may be the core's end, whose own words have arrived by then."""
        core = self.processes.core
        assert core is not None
        culprit = child
        if core.alive:
            with contextlib.suppress(BlockingIOError, schema.Malformed):
                while core.link.fileno() in self.selector.get_map() and not self.drained(core):
                    pass
            if core.failure:
                culprit = core
        said = culprit.failure
        if said and culprit is child:
            said += last_words(self.run_dir, f"backend-{child.device_id}")
        self.fail(UserError(f"{culprit.role} {'failed' if said else 'ended'}: {said or how}"))

    def hear(self, child: Child) -> None:
        """Takes in everything that it has said so far."""
        try:
            while child.link.fileno() in self.selector.get_map() and not self.drained(child):
                pass
        except (BlockingIOError, schema.Malformed):
            child.link.setblocking(True)  # it lives on, and is written to

    def drained(self, child: Child) -> bool:
        """Handles one more of its last words; True when there are none. Errors: BlockingIOError."""
        child.link.setblocking(False)
        before = child.link.fileno()
        self.on_link(child)
        return before not in self.selector.get_map()

    def on_core_gone(self, why: str) -> None:
        """The VM is over. Its sidecars flush and leave by themselves, since their control connection is gone."""
        core = self.processes.core
        assert core is not None
        self.snapshots.close()
        self.incomings.close()
        if self.status == "starting" and self.ended is None:
            message = f"core failed: {core.failure}" if core.failure else f"the core {why} at the start"
            self.fail(UserError(message))
            return
        if self.ended is None:
            self.ended = schema.Ended(EXIT_ERROR, "core-died", f"the core {why}")
        self.stop_by(END_TIMEOUT)

    def on_sidecar_died(self, child: Child, why: str) -> None:
        """Another takes its place; or the VM is ending, and the core waits for its sidecars to be gone."""
        core = self.processes.core
        if core is not None and core.alive and self.status == "running":
            # The core says that the VM ends before it has its sidecars end.
            self.hear(core)
            if core.dying:
                return  # which its sidecars have seen before its pidfd says so
        if self.status == "running" and core is not None and core.alive:
            self.processes.revival.died(child, why)
        else:
            self.processes.tell_core(schema.SidecarDied(child.device_id, why[:4000]))

    def on_pager_died(self, why: str) -> None:
        """Another takes its place: whoever touches memory that is missing waits until then."""
        pager, core = self.processes.pager, self.processes.core
        assert pager is not None
        if self.failure is not None or core is None or not core.alive:
            return  # which it may have seen before us; nobody will miss it any more
        if self.status != "stopping":
            lifeline.send(self.line, event="sidecar-died", role=pagers.ID, reason=f"{why}; it is replaced")
        try:
            pager.died()
        except UserError as e:
            self.end_damaged(f"{e}: {why}")

    def on_helper_exit(self, helper: Helper) -> None:
        """passt, for one, is gone: its NIC's sidecar sees the end of the stream, and the guest a link that is down."""
        self.selector.unregister(helper.pidfd)
        if self.hotplug.is_dismissed(helper):
            log.info("%s %s", helper.role, helper.reap())
            self.write_state()
            return
        log.error("%s %s", helper.role, helper.reap())
        if self.status == "starting" and helper.gentle:
            self.fail(UserError(f"{helper.role} {helper.state}{last_words(self.run_dir, helper.role)}"))
            return
        # One that ends by itself when its device does (virtiofsd) is no news; the device says so if it misses it.
        if not helper.gentle or helper.state != "exited with status 0":
            lifeline.send(self.line, event="sidecar-died", role=helper.role, reason=helper.state)
        self.write_state()

    # End.

    def shut_down(self) -> None:
        """Asks the core to end the VM at once, flushing the disks."""
        if self.status == "starting":
            self.fail(UserError("ended before the VM ran", EXIT_ERROR))
        elif self.status in {"running", "incoming"}:
            self.processes.tell_core(schema.ShutdownVm())
            self.stop_by(END_TIMEOUT)

    def stop_by(self, seconds: float) -> None:
        """From now on processes are expected to end; those that have not by then are killed."""
        if self.status != "stopping":
            self.status = "stopping"
            self.deadline = (time.monotonic() + seconds, self.kill_all)
            self.write_state()

    def kill_all(self) -> None:
        """No patience left."""
        late = [child.role for child in self.processes.all() if child.alive]
        log.error("%s did not end in time: killing what is left", ", ".join(late))
        self.processes.kill_all()

    def start_timed_out(self) -> None:
        """Something never became ready."""
        late = [child.role for child in self.processes.all() if child.state == "starting"]
        what = ", ".join(late) or "the core"
        self.fail(UserError(f"{what} did not become ready within {START_TIMEOUT:g} s"))

    def fail(self, error: UserError) -> None:
        """The VM will not run. The first reason is the one that counts."""
        if self.failure is None and self.ended is None:
            self.failure = error
            log.error("%s", error)
        self.status = "stopping"
        self.processes.kill_all()

    def leave(self) -> int:
        """Ends what is left, tells vmmctl how it was, and removes the run directory."""
        self.deadline = None
        self.processes.close()
        self.snapshots.close()
        self.incomings.close()
        self.watching.close()
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
