"""Snapshots and restoring, by QEMU's names for migration (qapi/migration.json), and ours."""

from __future__ import annotations

import enum
import os
from collections.abc import Callable

from motorcade.core.qmp.errors import QmpError
from motorcade.core.qmp.machine import RunState
from motorcade.core.qmp.registry import Arguments, Context, Deferred, Empty, NoArguments, Result, command
from motorcade.core.snapshot.plan import Plan, Report, Status


class Wish(enum.StrEnum):
    """What a snapshot can do. QEMU's MigrationCapability, as far as it applies here, and ours."""

    EVENTS = "events"
    IGNORE_SHARED = "x-ignore-shared"
    LIVE = "x-motorcade-live"


MAX_PLACE = 4096
"""Bytes of a URI or a path: as many as the supervisor takes (proto/messages.py, Line), and as the kernel does."""
_OVER = frozenset({RunState.SHUTDOWN, RunState.INTERNAL_ERROR})
MACHINE_IS_THERE = frozenset(RunState) - _OVER - {RunState.INMIGRATE}


class Capability(Arguments, frozen=True):
    """Of migrate-set-capabilities."""

    capability: Wish
    state: bool


class SetCapabilities(Arguments, frozen=True):
    """Of migrate-set-capabilities."""

    capabilities: list[Capability]


class CapabilityStatus(Result, frozen=True, omit_defaults=False):
    """Of query-migrate-capabilities."""

    capability: Wish
    state: bool


@command("migrate-set-capabilities", arguments=SetCapabilities)
def migrate_set_capabilities(ctx: Context, args: SetCapabilities) -> Empty:
    """Sets what the next snapshots do."""
    if not ctx.machine.snapshot_report.status.over:
        raise QmpError("A snapshot is being taken; its capabilities cannot be changed any more")
    for wish in args.capabilities:
        (ctx.capabilities.add if wish.state else ctx.capabilities.discard)(wish.capability)
    return Empty()


@command("query-migrate-capabilities", arguments=NoArguments, returns=list[CapabilityStatus])
def query_migrate_capabilities(ctx: Context, _args: NoArguments) -> list[CapabilityStatus]:
    """What the next snapshots do."""
    return [CapabilityStatus(name, name in ctx.capabilities) for name in Wish]


class Migrate(Arguments, frozen=True):
    """``blk``, ``inc`` and ``detach`` mean nothing, as in QEMU today."""

    uri: str
    blk: bool = False
    inc: bool = False
    detach: bool = True


@command("migrate", arguments=Migrate, states=MACHINE_IS_THERE)
def migrate(ctx: Context, args: Migrate) -> Empty:
    """Begins a snapshot of the machine, which stays. Events MIGRATION."""
    scheme, colon, rest = args.uri.partition(":")
    if not colon or scheme not in ("file", "exec", "fd") or not rest:
        raise QmpError(f"'{args.uri}' is no place for a snapshot: file:DIRECTORY, exec:COMMAND or fd:NAME")
    what = "state" if Wish.IGNORE_SHARED in ctx.capabilities else "template"
    if what == "template" and scheme != "file":
        raise QmpError(f"Only a state without RAM (capability {Wish.IGNORE_SHARED}) can be written to {scheme}:")
    live = what == "template" and Wish.LIVE in ctx.capabilities
    # RAM that is left where it is must stay as it is: the machine does not go on from a state by itself.
    start(ctx, Plan(args.uri, what=what, live=live, rest=what == "state", given=given(ctx, args.uri)))
    return Empty()


def given(ctx: Context, uri: str) -> int:
    """The descriptor that ``uri`` names, the caller's to hand on; -1 where it names none. Raises QmpError."""
    check_place(uri)
    scheme, _, name = uri.partition(":")
    return ctx.descriptors.take(name) if scheme == "fd" else -1


def check_place(text: str) -> None:
    """Raises QmpError for what can be no place on any host."""
    if len(os.fsencode(text)) > MAX_PLACE:
        raise QmpError(f"The place '{text[:40]}...' has more than {MAX_PLACE} bytes")
    if "\0" in text:
        raise QmpError("The name of a place cannot have a zero byte in it")


def start(ctx: Context, plan: Plan, then: Callable[[Report], None] | None = None) -> None:
    """Begins a snapshot, which takes ``plan.given`` in every case. Raises QmpError."""
    try:
        check_place(plan.uri)
        check_place(plan.base)
        ctx.machine.snapshot(plan, then)
    except QmpError:
        if plan.given >= 0:
            os.close(plan.given)
        raise


def finished(ctx: Context, plan: Plan) -> Deferred:
    """Begins a snapshot; the answer comes when it is over. Raises QmpError."""
    later = Deferred()
    start(ctx, plan, lambda report: later.finish(Empty() if report.status is Status.COMPLETED else failure(report)))
    return later


def failure(report: Report) -> QmpError:
    """Why there is no snapshot."""
    return QmpError(report.error or "it was cancelled")


class Snapshot(Arguments, frozen=True):
    """``dir`` and ``base``: absolute paths."""

    dir: str
    base: str | None = None
    live: bool = False


@command("x-motorcade-snapshot", arguments=Snapshot, states=MACHINE_IS_THERE)
def x_motorcade_snapshot(ctx: Context, args: Snapshot) -> Empty:
    """Begins a template, if wanted one that differs from another. Events MIGRATION."""
    for name, path in (("dir", args.dir), ("base", args.base)):
        if path is not None and not path.startswith("/"):
            raise QmpError(f"Parameter '{name}' must be an absolute path")
    start(ctx, Plan(f"file:{args.dir}", base=args.base or "", live=args.live))
    return Empty()


class Save(Arguments, frozen=True):
    """Of x-motorcade-save. ``file``: an absolute path. Without ``leave-running`` the machine is stopped afterwards."""

    file: str
    leave_running: bool = False


@command("x-motorcade-save", arguments=Save, states=MACHINE_IS_THERE)
def x_motorcade_save(ctx: Context, args: Save) -> Empty:
    """Begins a checkpoint: all but the disks, in one file. Events MIGRATION."""
    if not args.file.startswith("/"):
        raise QmpError("Parameter 'file' must be an absolute path")
    start(ctx, Plan(f"file:{args.file}", what="save", rest=not args.leave_running))
    return Empty()


@command("migrate_cancel", arguments=NoArguments)
def migrate_cancel(ctx: Context, _args: NoArguments) -> Empty:
    """Ends the snapshot at hand, if any; the guest goes on."""
    ctx.machine.cancel_snapshot()
    return Empty()


command("migrate-cancel", arguments=NoArguments)(migrate_cancel)


class RamInfo(Result, frozen=True, omit_defaults=False):
    """Sizes in bytes."""

    total: int
    transferred: int
    remaining: int


class MigrationInfo(Result, frozen=True):
    """Of query-migrate. Times in milliseconds."""

    status: Status
    error_desc: str | None = None
    ram: RamInfo | None = None
    total_time: int | None = None
    setup_time: int | None = None
    downtime: int | None = None


@command("query-migrate", arguments=NoArguments, returns=MigrationInfo)
def query_migrate(ctx: Context, _args: NoArguments) -> MigrationInfo:
    """How the present snapshot, or the last, is going."""
    return _info(ctx.machine.snapshot_report, ctx.now())


def _info(report: Report, now: float) -> MigrationInfo:
    if report.status is Status.NONE:
        return MigrationInfo(Status.NONE)
    end = report.ended if report.status.over else now
    active = report.active or end

    def ms(seconds: float) -> int:
        return int(seconds * 1000)

    return MigrationInfo(
        status=report.status,
        error_desc=report.error or None,
        ram=RamInfo(report.ram_total, report.transferred, report.ram_remaining),
        total_time=ms(end - report.started),
        setup_time=ms(active - report.started),
        downtime=ms(report.downtime) if report.status is Status.COMPLETED else None,
    )


class MigrateIncoming(Arguments, frozen=True):
    """Of migrate-incoming."""

    uri: str


@command("migrate-incoming", arguments=MigrateIncoming)
def migrate_incoming(ctx: Context, args: MigrateIncoming) -> Deferred:
    """Names the template to a machine that waits for one."""
    later = Deferred()
    fd = given(ctx, args.uri)
    try:
        ctx.machine.migrate_incoming(args.uri, lambda error: later.finish(Empty() if error is None else error), fd)
    except QmpError:
        if fd >= 0:
            os.close(fd)
        raise
    return later
