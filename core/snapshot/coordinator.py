"""The coordinator: takes snapshots of the whole machine, one at a time, while the loop goes on serving everybody.

The sequence is ``Coordinator._take``, from top to bottom, as docs/internals.md has it ("Snapshots"). It waits only in
``await``. Whatever goes wrong (a sidecar's refusal, silence or death, the disk being full, ``abort`` by a client, a
guest that resets) is an exception at one of these, and the ``finally`` clauses put everything back: sidecars and guest
go on, the dirty log is off, the thread that writes RAM has ended, the supervisor has removed what there was of it.

Only what the clean-up itself waits for cannot be aborted: the end of a round of RAM, which ``cancel`` brings about, and
the supervisor's answers, which come always.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from motorcade.core.life import LifeLink
from motorcade.core.link import QUIESCE_MS, SAVE_MS, LinkState, SidecarError
from motorcade.core.platform import Platform
from motorcade.core.snapshot import components, cpu, dump
from motorcade.core.snapshot.dirty import DirtyPages, SharedLog
from motorcade.core.snapshot.plan import Cancelled, Kind, Plan, Report, SnapshotError, Status
from motorcade.core.snapshot.ram import Base, RamError, RamWriter
from motorcade.core.snapshot.target import Target, open_target, write_all
from motorcade.core.task import Future, Task, every, in_thread
from motorcade.proto import messages, template
from motorcade.proto.memory import PAGE

log = logging.getLogger(__name__)

T = TypeVar("T")

PARK_SECONDS = 60.0  # a vCPU may wait for a sidecar's answer to a reset before it parks
POPULATE_MS = 3_600_000  # all of guest memory is read from a template; it can be cancelled
LITTLE = 8 << 20  # bytes of dirty memory at which the pause is short enough
MAX_ROUNDS = 8
STASH_MAX = 256 << 20  # bytes set aside in the core's memory at most; what is more is written during the pause


class Owner(Protocol):
    """The machine, which knows whether its guest is to run."""

    @property
    def guest_runs(self) -> bool:
        """Whether it runs, but for us."""

    def hold(self) -> Future[None]:
        """Parks the vCPUs, and keeps them so whatever else happens until ``let_go``."""

    def let_go(self) -> None:
        """Has sidecars, interrupts and (if they are to run) vCPUs go on."""

    def keep_still(self) -> None:
        """Instead of ``let_go``: the machine is stopped, and its sidecars are quiet, until it is to run."""

    def snapshot_status(self, status: Status, plan: Plan) -> None:
        """It has changed."""


@dataclass
class _Ram:
    """RAM on its way out."""

    writer: RamWriter
    parents: tuple[template.Parent, ...]
    dirty: DirtyPages
    stashed: bool = False  # the last pages wait in our memory


@dataclass
class _Frozen:
    """What was read while everything stood still."""

    parts: tuple[template.Component, ...] = ()
    vcpus: tuple[dump.Vcpu, ...] = ()
    disks: str = "[]"


@dataclass
class _Run:
    """The snapshot at hand."""

    plan: Plan
    report: Report
    stopped: float | None = None  # time.monotonic(): since then everything stands still
    ran: bool = False  # the guest, until then
    aborted: SnapshotError | None = None
    waiting: Future[object] | None = None
    round: Future[None] | None = None  # the end of one of RAM
    after: list[Callable[[], None]] = field(default_factory=list)


class Coordinator:
    """Of one VM. Everything on the main thread."""

    def __init__(self, platform: Platform, owner: Owner, life: LifeLink, memfd: int, dirty_fd: int | None) -> None:
        """``memfd``: guest memory. ``dirty_fd``: the log of what the other processes write into it; without one (no
        supervisor's VM is) there is no live snapshot. Both stay the caller's, and open."""
        self._platform, self._owner, self._life, self._memfd = platform, owner, life, memfd
        self._log = SharedLog(dirty_fd, platform.memory.size) if dirty_fd is not None else None
        self._run: _Run | None = None
        self._ram: _Ram | None = None
        self._reports = {kind: Report() for kind in Kind}

    @property
    def busy(self) -> bool:
        """Whether a snapshot is being taken."""
        return self._run is not None

    def report(self, kind: Kind = Kind.MIGRATION) -> Report:
        """Of the last one of this kind: a copy, with the numbers as they are now."""
        if self._run is not None and self._ram is not None:
            self._note_progress(self._run, self._ram)
        return Report(**vars(self._reports[kind]))

    def start(self, plan: Plan, then: Callable[[Report], None] | None = None) -> None:
        """Begins; the rest shows in ``report``, and ``then`` gets the last one. Takes ``plan.given``.

        Errors: SnapshotError where it cannot even begin; nothing is taken then.
        """
        if self._run is not None:
            raise SnapshotError("a snapshot is being taken already; migrate_cancel ends it")
        report = self._reports[plan.kind] = Report(started=time.monotonic())
        self._run = _Run(plan, report)
        if then is not None:
            self._run.after.append(lambda: then(self.report(plan.kind)))
        self._enter(Status.SETUP, self._run)
        Task(self._take(self._run), self._ended)

    def cancel(self) -> None:
        """Ends the snapshot at hand, if any; status CANCELLED follows unless it is over by itself first."""
        self.abort(Cancelled("cancelled"))

    def abort(self, why: SnapshotError, then: Callable[[], None] | None = None) -> None:
        """Ends the snapshot at hand, if any. ``then`` is called when nothing is left of it; at once without one."""
        run = self._run
        if run is None:
            if then is not None:
                then()
            return
        if then is not None:
            run.after.append(then)
        if run.aborted is None:
            run.aborted = why
            if run.waiting is not None:
                run.waiting.fail(why)

    def close(self) -> None:
        """For the VM's end: nothing is under way any more when this returns, nor the thread that writes RAM."""
        self.abort(SnapshotError("the VM ended"))
        run = self._run
        if run is not None and run.round is not None and self._ram is not None:
            self._ram.writer.cancel()
            run.round.set(None)  # whoever goes on from it waits for the thread
        self._life.close()

    # The sequence.

    async def _take(self, run: _Run) -> None:
        plan = run.plan
        target = await open_target(self._life, plan)
        keep = False
        try:
            if run.aborted is not None:
                raise run.aborted
            if missing := plan.labels - target.fds.keys():
                raise SnapshotError(f"the supervisor opened a target without {', '.join(sorted(missing))}")
            if plan.needs_ram:
                await self._populate(run)
            ram = self._ram = self._open_ram(run, target)
            self._enter(Status.ACTIVE, run)
            try:
                frozen = await self._copy_and_freeze(run, ram)
                if ram is not None:
                    if ram.stashed:
                        ram.writer.start_stash()
                        await self._round(run, ram)
                    ram.writer.start_sync()
                    await self._round(run, ram)
                await self._write_state(run, target, ram, frozen)
            finally:
                self._close_ram(run, ram)
            keep = True
        finally:
            target.close()
            closed, _ = await self._life.ask(messages.CloseTarget(keep), messages.TargetClosed)
        if closed.error:
            raise SnapshotError(closed.error)

    async def _populate(self, run: _Run) -> None:
        """A restored machine whose memory still is in its own template: all of it is fetched."""
        if (pager := self._platform.pager) is not None:
            await self._wait(run, pager.ask(messages.Populate(), POPULATE_MS))

    def _open_ram(self, run: _Run, target: Target) -> _Ram | None:
        plan, platform = run.plan, self._platform
        size = run.report.ram_total = platform.memory.size
        run.report.ram_remaining = size if plan.needs_ram else 0
        if plan.ram_label is None:
            return None
        start = dump.start(len(platform.vcpus.vcpus), len(platform.memory.regions)) if plan.is_dump else 0
        base: Base | None = None
        parents: tuple[template.Parent, ...] = ()
        if plan.base:
            state = target.fds["base.state"]
            of = template.read(state)
            base = Base.of(of, target.bases)
            parents = (template.Parent(plan.base, template.identity(state)), *of.parents)
        writer = RamWriter(self._memfd, size, target.fds[plan.ram_label], base, start=start)
        return _Ram(writer, parents, DirtyPages(size))

    async def _copy_and_freeze(self, run: _Run, ram: _Ram | None) -> _Frozen:
        """RAM, while the guest runs and then at rest; the machine's state, at rest."""
        if ram is None or not run.plan.live or not self._owner.guest_runs or self._log is None:
            return await self._freeze(run, ram, None)
        self._platform.vm.start_dirty_log()
        try:
            await self._precopy(run, ram, self._log)
            return await self._freeze(run, ram, self._log)
        finally:
            self._platform.vm.stop_dirty_log()

    async def _precopy(self, run: _Run, ram: _Ram, shared: SharedLog) -> None:
        """All of RAM while the guest runs, then again what it has written since, until that is little."""
        shared.take_into(ram.dirty)  # from before the first round
        ram.dirty.clear()
        ram.writer.start_all()
        await self._round(run, ram)
        last = self._platform.memory.size
        for _ in range(MAX_ROUNDS):
            self._collect(ram, shared)
            size = len(ram.dirty) * PAGE
            # The pages stay in there for the next round, or for the last.
            if size <= LITTLE or size > last * 3 // 4:
                return
            last = size
            ram.writer.start_dirty(ram.dirty)
            ram.dirty.clear()
            await self._round(run, ram)

    def _collect(self, ram: _Ram, shared: SharedLog) -> None:
        """Adds the pages written since the last time. The bits first, the copies afterwards."""
        self._platform.vm.take_dirty(ram.dirty)
        shared.take_into(ram.dirty)

    async def _freeze(self, run: _Run, ram: _Ram | None, shared: SharedLog | None) -> _Frozen:
        """Brings everything to rest, takes its state, and lets it go on. ``shared``: a live snapshot's."""
        run.stopped, run.ran = time.monotonic(), self._owner.guest_runs
        try:
            await self._wait(run, self._within(PARK_SECONDS, self._owner.hold()))
            frozen = _Frozen()
            if run.plan.is_dump:
                # No sidecar is asked for anything: what one of them has done may be what the dump is wanted for.
                frozen.vcpus = tuple(dump.Vcpu.of(vcpu.save()) for vcpu in self._platform.vcpus.vcpus)
            else:
                frozen.parts = await self._save(run)
            if run.plan.asks_supervisor:
                frozen.disks = await self._copy_disks(run)
            if ram is not None:
                await self._last_round(run, ram, shared)
            return frozen
        finally:
            if not run.plan.rest:
                self._thaw(run)

    def _thaw(self, run: _Run) -> None:
        """The machine goes on."""
        self._owner.let_go()
        if run.stopped is not None and run.ran:
            run.report.downtime = time.monotonic() - run.stopped
        run.stopped = None

    def _within(self, seconds: float, future: Future[None]) -> Future[None]:
        why = f"the vCPUs did not stop within {seconds:g} s: a device's sidecar does not answer"
        self._platform.loop.call_later(seconds, lambda: future.fail(SnapshotError(why)))
        return future

    async def _save(self, run: _Run) -> tuple[template.Component, ...]:
        links = self._platform.device_links
        for link in links:
            if link.state is LinkState.GONE:
                raise SnapshotError(f"{link.device_id}: its sidecar is gone, and its state with it: {link.gone_reason}")
        await self._wait(run, every([link.ask(messages.Quiesce(), QUIESCE_MS) for link in links]))
        answers = await self._wait(run, every([link.ask(messages.Save(), SAVE_MS) for link in links]))
        states = {
            link.device_id: answer.state
            for link, answer in zip(links, answers, strict=True)
            if isinstance(answer, messages.Saved)
        }
        return components.save(self._platform, states)

    async def _copy_disks(self, run: _Run) -> str:
        copied, _ = await self._wait(run, self._life.ask(messages.CopyDisks(), messages.DisksCopied))
        if copied.error:
            raise SnapshotError(copied.error)
        return copied.disks

    async def _last_round(self, run: _Run, ram: _Ram, shared: SharedLog | None) -> None:
        if shared is None:
            ram.writer.start_all()
            await self._round(run, ram)
            return
        self._collect(ram, shared)
        if len(ram.dirty) * PAGE <= STASH_MAX:
            ram.writer.stash(ram.dirty)
            ram.stashed = True
        else:
            ram.writer.start_dirty(ram.dirty)
            await self._round(run, ram)

    async def _write_state(self, run: _Run, target: Target, ram: _Ram | None, frozen: _Frozen) -> None:
        platform = self._platform
        whole = template.Template(
            description=target.description,
            cpu=cpu.describe(platform.kvm, platform.vcpus.vcpus),
            memory_size=platform.memory.size,
            layers=ram.writer.layers if ram is not None else b"",
            sums=ram.writer.sums if ram is not None else b"",
            parents=ram.parents if ram is not None else (),
            disks=frozen.disks,
            components=frozen.parts,
        )
        fd = os.dup(target.fds["state"])  # the thread's own: an abort does not wait for a pipe that nobody reads

        def write() -> None:
            try:
                if run.plan.is_dump:
                    dump.finish(fd, platform.memory.regions, frozen.vcpus)
                else:
                    write_all(fd, template.encode(whole))
            finally:
                os.close(fd)

        await self._wait(run, in_thread(platform.loop, write, "snapshot-state"))

    # Its parts.

    async def _wait(self, run: _Run, future: Future[T]) -> T:
        """``future``'s result; raises the abort that comes before it."""
        if run.aborted is not None:
            raise run.aborted
        run.waiting = future  # type: ignore[assignment]
        try:
            return await future
        finally:
            run.waiting = None

    async def _round(self, run: _Run, ram: _Ram) -> None:
        """The end of the round that the writer has begun; it has ended in every case."""
        loop, writer = self._platform.loop, ram.writer
        ended = run.round = Future()
        loop.add_control(writer.fileno(), lambda: ended.set(None))
        try:
            wanted: Future[None] = Future()
            ended.on_done(lambda: wanted.set(None))
            await self._wait(run, wanted)
        except SnapshotError:
            writer.cancel()
            await ended
            with contextlib.suppress(RamError):  # cancelled, or failed by itself: the abort came first
                writer.finish()
            raise
        finally:
            run.round = None
            loop.remove_control(writer.fileno())
        writer.finish()

    def _note_progress(self, run: _Run, ram: _Ram) -> None:
        now = ram.writer.progress
        run.report.transferred = now.written
        run.report.ram_remaining = now.total - now.done

    def _close_ram(self, run: _Run, ram: _Ram | None) -> None:
        if ram is not None:
            self._note_progress(run, ram)
            ram.writer.close()
        self._ram = None

    def _enter(self, status: Status, run: _Run) -> None:
        now = time.monotonic()
        run.report.status = status
        if status is Status.ACTIVE:
            run.report.active = now
        elif status.over:
            run.report.ended = now
        self._owner.snapshot_status(status, run.plan)

    def _ended(self, error: Exception | None) -> None:
        run, self._run = self._run, None
        assert run is not None
        if run.stopped is not None:  # to rest
            if error is None:
                self._owner.keep_still()
            else:
                self._thaw(run)
        if error is None:
            run.report.ram_remaining = 0
            self._enter(Status.COMPLETED, run)
        elif isinstance(error, Cancelled):
            self._enter(Status.CANCELLED, run)
        else:
            if not isinstance(error, SnapshotError | SidecarError | RamError | OSError | ValueError):
                log.error("the snapshot failed in a way that it should not", exc_info=error)
            log.warning("no snapshot: %s", error)
            run.report.error = _explain(error)
            self._enter(Status.FAILED, run)
        for then in run.after:
            then()


def _explain(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"the snapshot cannot be written: {error.strerror}"
    return str(error) or type(error).__name__
