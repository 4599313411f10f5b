"""Guest memory for debuggers, by QEMU's commands (qapi/dump.json)."""

from __future__ import annotations

import enum
from collections.abc import Mapping

import msgspec

from motorcade.core.qmp.errors import QmpError
from motorcade.core.qmp.events import DumpResult, DumpStatus
from motorcade.core.qmp.machine import RunState
from motorcade.core.qmp.migration import failure, finished, given, start
from motorcade.core.qmp.registry import Arguments, Context, Deferred, Empty, NoArguments, Result, command
from motorcade.core.snapshot.plan import Plan, Report, Status

_RAM_IS_THERE = frozenset(RunState) - {RunState.INMIGRATE}  # of a guest that has crashed, too: that is what it is for


class DumpFormat(enum.StrEnum):
    """What dumps can be."""

    ELF = "elf"


class DumpGuestMemory(Arguments, frozen=True):
    """Of dump-guest-memory. ``protocol``: ``file:PATH``, absolute, or ``fd:NAME``."""

    protocol: str
    paging: bool
    detach: bool = False
    begin: int | None = None
    length: int | None = None
    format: DumpFormat = DumpFormat.ELF


@command("dump-guest-memory", arguments=DumpGuestMemory, states=_RAM_IS_THERE)
def dump_guest_memory(ctx: Context, args: DumpGuestMemory) -> Empty | Deferred:
    """Writes guest memory as an ELF core file. Event DUMP_COMPLETED."""
    scheme, _, rest = args.protocol.partition(":")
    if scheme not in ("file", "fd") or not rest:
        raise QmpError(f"'{args.protocol}' is no place for a dump: file:PATH or fd:NAME")
    if args.paging:
        raise QmpError("Parameter 'paging' must be false: the dump has guest physical addresses")
    if args.begin is not None or args.length is not None:
        raise QmpError("Parameters 'begin' and 'length' are not supported: all of memory is dumped")
    plan = Plan(args.protocol, what="dump", given=given(ctx, args.protocol))
    if not args.detach:
        return finished(ctx, plan)
    start(ctx, plan)
    return Empty()


def completed(report: Report) -> Mapping[str, object]:
    """What the event DUMP_COMPLETED says."""
    data: dict[str, object] = {"result": msgspec.to_builtins(_info(report))}
    if report.status is not Status.COMPLETED:
        data["error"] = failure(report).desc
    return data


def _info(report: Report) -> DumpResult:
    over = {Status.COMPLETED: DumpStatus.COMPLETED, Status.FAILED: DumpStatus.FAILED, Status.NONE: DumpStatus.NONE}
    status = over.get(report.status, DumpStatus.FAILED if report.status.over else DumpStatus.ACTIVE)
    return DumpResult(status, report.ram_total - report.ram_remaining, report.ram_total)


@command("query-dump", arguments=NoArguments, returns=DumpResult)
def query_dump(ctx: Context, _args: NoArguments) -> DumpResult:
    """How the present dump, or the last, is going."""
    return _info(ctx.machine.dump_report)


class DumpCapability(Result, frozen=True):
    """Of query-dump-guest-memory-capability."""

    formats: list[DumpFormat]


@command("query-dump-guest-memory-capability", arguments=NoArguments, returns=DumpCapability)
def query_dump_guest_memory_capability(_ctx: Context, _args: NoArguments) -> DumpCapability:
    """The formats of dumps."""
    return DumpCapability(list(DumpFormat))
