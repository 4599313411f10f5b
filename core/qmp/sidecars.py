"""The backend processes: ours alone."""

from __future__ import annotations

from motorcade.core.qmp.errors import QmpError
from motorcade.core.qmp.registry import Arguments, Context, Deferred, NoArguments, Result, command
from motorcade.proto.messages import StatsReport


class SidecarInfo(Result, frozen=True):
    """Of x-motorcade-sidecars."""

    id: str
    kind: str
    pid: int
    state: str
    slot: int | None = None


@command("x-motorcade-sidecars", arguments=NoArguments, returns=list[SidecarInfo])
def x_motorcade_sidecars(ctx: Context, _args: NoArguments) -> list[SidecarInfo]:
    """The backend processes."""
    return [SidecarInfo(s.device_id, s.kind, s.pid, s.state, s.slot) for s in ctx.machine.sidecars()]


class SidecarStats(Arguments, frozen=True):
    """Of x-motorcade-sidecar-stats."""

    id: str


class QueueCounters(Result, frozen=True):
    """Counts of one queue since its sidecar started."""

    index: int
    requests: int
    bytes_in: int
    bytes_out: int
    errors: int
    kicks: int
    interrupts: int
    suppressed: int


class SidecarCounters(Result, frozen=True):
    """Of x-motorcade-sidecar-stats; ``detail`` has what only this kind counts."""

    id: str
    queues: list[QueueCounters]
    detail: dict[str, int]


@command("x-motorcade-sidecar-stats", arguments=SidecarStats, returns=SidecarCounters)
def x_motorcade_sidecar_stats(ctx: Context, args: SidecarStats) -> Deferred:
    """The counters of one sidecar."""
    later = Deferred()

    def done(report: StatsReport | None) -> None:
        if report is None:
            later.finish(QmpError(f"The sidecar of '{args.id}' gave no counters; see its log"))
            return
        queues = [
            QueueCounters(q.index, q.requests, q.bytes_in, q.bytes_out, q.errors, q.kicks, q.interrupts, q.suppressed)
            for q in report.queues
        ]
        later.finish(SidecarCounters(args.id, queues, {c.name: c.value for c in report.detail}))

    ctx.machine.sidecar_stats(args.id, done)
    return later
