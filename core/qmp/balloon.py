"""The balloon (QEMU's qapi/machine.json), and what its guest says of itself."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from motorcade.core.link import SidecarError
from motorcade.core.qmp.errors import DeviceNotActive, QmpError
from motorcade.core.qmp.registry import Arguments, Context, Deferred, Empty, NoArguments, Result, command
from motorcade.core.task import Task

if TYPE_CHECKING:
    from motorcade.core.balloon import Balloon


class BalloonInfo(Result, frozen=True, omit_defaults=False):
    """Of query-balloon. ``actual``: bytes of RAM that the guest has."""

    actual: int


@command("query-balloon", arguments=NoArguments, returns=BalloonInfo)
def query_balloon(ctx: Context, _args: NoArguments) -> BalloonInfo:
    """How much of its RAM the guest has."""
    return BalloonInfo(_balloon(ctx).actual)


class BalloonSize(Arguments, frozen=True):
    """Of balloon. ``value``: bytes of RAM that the guest is to be left with; more than it has at boot are all."""

    value: int


@command("balloon", arguments=BalloonSize)
def balloon(ctx: Context, args: BalloonSize) -> Deferred:
    """Asks the guest to give RAM back, or to take it again: it does what it can, and BALLOON_CHANGED tells of it."""
    target = _balloon(ctx)
    if not 0 < args.value < 1 << 63:
        raise QmpError("Parameter 'value' expects a size: bytes that the guest is to be left with")
    later = Deferred()

    async def ask() -> None:
        await target.set_target(args.value)
        later.finish(Empty())

    return _run(ask(), later)


class BalloonStats(Result, frozen=True, omit_defaults=False):
    """Of x-motorcade-balloon-stats. Bytes: ``size`` of RAM, ``target`` and ``actual`` as of balloon and query-balloon.
    ``driver``: the guest has one. ``stats``: what it says of itself, by QEMU's names (bytes, and counts of pages and
    faults); ``last-update``: when, in seconds since the epoch, 0 for never."""

    size: int
    target: int
    actual: int
    driver: bool
    stats: dict[str, int]
    last_update: int


@command("x-motorcade-balloon-stats", arguments=NoArguments, returns=BalloonStats)
def x_motorcade_balloon_stats(ctx: Context, _args: NoArguments) -> Deferred:
    """The balloon, and the guest's memory statistics, which a guest that runs is asked for now."""
    of = _balloon(ctx)
    later = Deferred()
    fresh = ctx.machine.run_state.runs and of.driven

    async def ask() -> None:
        said = await of.statistics(fresh=fresh)
        later.finish(BalloonStats(of.size, of.target, of.actual, of.driven, said.stats, said.last_update))

    return _run(ask(), later)


def _run(steps: Coroutine[Any, Any, None], later: Deferred) -> Deferred:
    def ended(error: Exception | None) -> None:
        if isinstance(error, SidecarError):
            later.finish(QmpError(str(error)))
        elif error is not None:
            raise error

    Task(steps, ended)
    return later


def _balloon(ctx: Context) -> Balloon:
    found = ctx.machine.balloon
    if found is None:
        raise DeviceNotActive("No balloon device has been activated")
    return found
