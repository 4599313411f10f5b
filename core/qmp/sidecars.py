"""The backend processes: ours alone (docs/looking-in.md), and QEMU's switches of trace events for what they record."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from typing import Annotated, Literal

import msgspec

from motorcade.core.qmp.errors import QmpError
from motorcade.core.qmp.registry import Arguments, Context, Deferred, Empty, NoArguments, Result, command
from motorcade.proto.messages import Inject, StatsReport
from motorcade.proto.watch import Kind


class QueueDepth(Result, frozen=True):
    """One queue: its size, what the sidecar has in hand, and what waits in the avail ring."""

    index: int
    size: int
    in_flight: int
    waiting: int


class SidecarInfo(Result, frozen=True):
    """Of x-motorcade-sidecars."""

    id: str
    kind: str
    pid: int
    state: str
    slot: int | None = None
    queues: list[QueueDepth] = msgspec.field(default_factory=list)


@command("x-motorcade-sidecars", arguments=NoArguments, returns=list[SidecarInfo])
def x_motorcade_sidecars(ctx: Context, _args: NoArguments) -> list[SidecarInfo]:
    """The backend processes, without asking them."""
    return [
        SidecarInfo(
            s.device_id,
            s.kind,
            s.pid,
            s.state,
            s.slot,
            [QueueDepth(q.index, q.size, q.in_flight, q.waiting) for q in s.queues],
        )
        for s in ctx.machine.sidecars()
    ]


class SidecarId(Arguments, frozen=True):
    """Of commands about one sidecar."""

    id: str


class QueueCounters(Result, frozen=True):
    """Counts of one queue since its device was made. ``latency``: element n counts requests that took 2^n to
    2^(n+1) - 1 nanoseconds, the last what took longer, too."""

    index: int
    requests: int
    bytes_in: int
    bytes_out: int
    errors: int
    kicks: int
    kicks_suppressed: int
    interrupts: int
    suppressed: int
    taken: int
    in_flight: int
    latency_ns: int
    latency: list[int]


class SidecarCounters(Result, frozen=True):
    """Of x-motorcade-sidecar-stats; ``detail`` has what only this kind counts."""

    id: str
    queues: list[QueueCounters]
    detail: dict[str, int]


@command("x-motorcade-sidecar-stats", arguments=SidecarId, returns=SidecarCounters)
def x_motorcade_sidecar_stats(ctx: Context, args: SidecarId) -> Deferred:
    """The counters of one sidecar."""
    later = Deferred()

    def done(report: StatsReport | None) -> None:
        if report is None:
            later.finish(QmpError(f"The sidecar of '{args.id}' gave no counters: it is gone, or hangs; see its log"))
            return
        queues = [
            QueueCounters(
                q.index,
                q.requests,
                q.bytes_in,
                q.bytes_out,
                q.errors,
                q.kicks,
                max(0, q.taken - q.kicks),
                q.interrupts,
                q.suppressed,
                q.taken,
                q.in_flight,
                q.latency_ns,
                list(q.latency),
            )
            for q in report.queues
        ]
        later.finish(SidecarCounters(args.id, queues, {c.name: c.value for c in report.detail}))

    ctx.machine.sidecar_stats(args.id, done)
    return later


def _later(start: Callable[[Callable[[QmpError | None], None]], None]) -> Deferred:
    later = Deferred()
    start(lambda error: later.finish(Empty() if error is None else error))
    return later


@command("x-motorcade-sidecar-pause", arguments=SidecarId)
def x_motorcade_sidecar_pause(ctx: Context, args: SidecarId) -> Deferred:
    """Brings one sidecar to rest; answered when it is."""
    return _later(lambda done: ctx.machine.watching.pause(args.id, done))


@command("x-motorcade-sidecar-resume", arguments=SidecarId)
def x_motorcade_sidecar_resume(ctx: Context, args: SidecarId) -> Deferred:
    """Lets a paused one go on."""
    return _later(lambda done: ctx.machine.watching.resume(args.id, done))


class InjectArguments(Arguments, frozen=True):
    """Of x-motorcade-sidecar-inject. ``count`` requests of ``operation`` are answered with ``status``, or, where that
    is left out, wait ``delay`` milliseconds each; both: they wait, and then fail. ``count`` 0: nothing any more."""

    id: str
    count: Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]
    operation: Literal["any", "read", "write", "flush", "discard", "rx", "tx"] = "any"
    status: Literal["", "ioerr", "unsupp", "drop"] = ""
    delay: Annotated[int, msgspec.Meta(ge=0, le=3_600_000)] = 0


@command("x-motorcade-sidecar-inject", arguments=InjectArguments)
def x_motorcade_sidecar_inject(ctx: Context, args: InjectArguments) -> Deferred:
    """Faults, for testing guests."""
    if args.count and not args.status and not args.delay:
        raise QmpError("Neither a status nor a delay: nothing would happen")
    what = Inject(args.operation, args.count, args.status, args.delay)
    return _later(lambda done: ctx.machine.watching.inject(args.id, what, done))


# QEMU's qapi/trace.json. What is switched on here is recorded in the rings of all sidecars.

_EVENTS = {f"sidecar_{kind.name.lower()}": kind for kind in Kind}


class TraceEventInfo(Result, frozen=True):
    """Of trace-event-get-state."""

    name: str
    state: str


class TraceGet(Arguments, frozen=True):
    """``name`` may be a pattern."""

    name: str
    vcpu: int | None = None


def _matching(name: str, vcpu: int | None) -> list[str]:
    if vcpu is not None:
        raise QmpError("Trace events here are of sidecars; none belongs to a vCPU")
    found = [event for event in _EVENTS if fnmatch.fnmatchcase(event, name)]
    if not found and "*" not in name and "?" not in name:
        raise QmpError(f"unknown event \"{name}\" (there are: {', '.join(_EVENTS)})")
    return found


@command("trace-get-state", arguments=TraceGet, returns=list[TraceEventInfo])  # StratoVirt's name
@command("trace-event-get-state", arguments=TraceGet, returns=list[TraceEventInfo])
def trace_event_get_state(ctx: Context, args: TraceGet) -> list[TraceEventInfo]:
    """Which events are recorded."""
    on = ctx.machine.watching.tracing()
    return [
        TraceEventInfo(name, "enabled" if on >> _EVENTS[name] & 1 else "disabled")
        for name in _matching(args.name, args.vcpu)
    ]


class TraceSet(Arguments, frozen=True):
    """``ignore_unavailable`` is taken, and changes nothing: all events are available."""

    name: str
    enable: bool
    ignore_unavailable: bool = False
    vcpu: int | None = None


@command("trace-set-state", arguments=TraceSet)  # StratoVirt's name
@command("trace-event-set-state", arguments=TraceSet)
def trace_event_set_state(ctx: Context, args: TraceSet) -> Empty:
    """Records events from now on, or no more."""
    bits = sum(1 << _EVENTS[name] for name in _matching(args.name, args.vcpu))
    on = ctx.machine.watching.tracing()
    ctx.machine.watching.trace(on | bits if args.enable else on & ~bits)
    return Empty()


@command("x-motorcade-sidecar-restart", arguments=SidecarId)
def x_motorcade_sidecar_restart(ctx: Context, args: SidecarId) -> Deferred:
    """Puts a new process in the place of a device's sidecar, in good order, or of one that has failed. Answers when
    that serves the guest."""
    return _later(lambda done: ctx.machine.restart_sidecar(args.id, done))


class UpgradeArguments(Arguments, frozen=True):
    """Of x-motorcade-sidecar-upgrade; ``path``: a directory in which modules are looked for first."""

    id: str
    path: str = ""


@command("x-motorcade-sidecar-upgrade", arguments=UpgradeArguments)
def x_motorcade_sidecar_upgrade(ctx: Context, args: UpgradeArguments) -> Deferred:
    """The same with a new interpreter, which runs the code that is on disk now. Code that does not start leaves the
    present sidecar serving, and is this command's error."""
    return _later(lambda done: ctx.machine.restart_sidecar(args.id, done, upgrade=True, path=args.path))
