"""The commands. Shapes are QEMU's (qapi/*.json) unless the name begins with ``x-motorcade-``."""

from __future__ import annotations

import os

import msgspec

from motorcade import __version__
from motorcade.core.qmp.errors import QmpError
from motorcade.core.qmp.events import EVENTS
from motorcade.core.qmp.machine import BlockDevice, RunState, Vcpu
from motorcade.core.qmp.registry import (
    Arguments,
    Context,
    Deferred,
    Empty,
    NoArguments,
    Result,
    Then,
    command,
)
from motorcade.proto.messages import StatsReport

_OVER = frozenset({RunState.SHUTDOWN, RunState.INTERNAL_ERROR})
_ALIVE = frozenset(RunState) - _OVER


class Version(Result, frozen=True, omit_defaults=False):
    """The numbers of a version."""

    micro: int
    minor: int
    major: int


class VersionInfo(Result, frozen=True):
    """Of query-version and the greeting. The member's name is the protocol's; the numbers are Motorcade's."""

    qemu: Version
    package: str


def version_info() -> VersionInfo:
    """Our version."""
    major, minor, micro = (
        int("".join(filter(str.isdigit, part)) or 0) for part in (__version__ + ".0.0").split(".")[:3]
    )
    return VersionInfo(Version(micro, minor, major), f"motorcade-{__version__}")


class Capabilities(Arguments, frozen=True):
    """Of qmp_capabilities."""

    enable: list[str] = msgspec.field(default_factory=list)


@command("qmp_capabilities", arguments=Capabilities)
def qmp_capabilities(_ctx: Context, args: Capabilities) -> Empty:
    if args.enable:
        raise QmpError(f"Capability '{args.enable[0]}' is not available: the greeting offers none")
    return Empty()


@command("query-version", arguments=NoArguments, returns=VersionInfo)
def query_version(_ctx: Context, _args: NoArguments) -> VersionInfo:
    return version_info()


class Named(Result, frozen=True):
    """An entry of query-commands and query-events; the answer of query-name."""

    name: str


@command("query-commands", arguments=NoArguments, returns=list[Named])
def query_commands(ctx: Context, _args: NoArguments) -> list[Named]:
    return [Named(name) for name in ctx.registry.names()]


@command("query-events", arguments=NoArguments, returns=list[Named])
def query_events(_ctx: Context, _args: NoArguments) -> list[Named]:
    return [Named(name) for name in sorted(EVENTS)]


class StatusInfo(Result, frozen=True):
    """Of query-status."""

    running: bool
    singlestep: bool
    status: str


@command("query-status", arguments=NoArguments, returns=StatusInfo)
def query_status(ctx: Context, _args: NoArguments) -> StatusInfo:
    state = ctx.machine.run_state
    return StatusInfo(state.runs, False, state.value)


@command("query-name", arguments=NoArguments, returns=Named)
def query_name(ctx: Context, _args: NoArguments) -> Named:
    return Named(ctx.machine.name)


class Uuid(Result, frozen=True):
    """Of query-uuid."""

    uuid: str = msgspec.field(name="UUID")


@command("query-uuid", arguments=NoArguments, returns=Uuid)
def query_uuid(ctx: Context, _args: NoArguments) -> Uuid:
    return Uuid(ctx.machine.uuid)


class KvmInfo(Result, frozen=True):
    """Of query-kvm."""

    enabled: bool
    present: bool


@command("query-kvm", arguments=NoArguments, returns=KvmInfo)
def query_kvm(_ctx: Context, _args: NoArguments) -> KvmInfo:
    return KvmInfo(enabled=True, present=True)  # there is no machine without it


class TargetInfo(Result, frozen=True):
    """Of query-target."""

    arch: str


@command("query-target", arguments=NoArguments, returns=TargetInfo)
def query_target(_ctx: Context, _args: NoArguments) -> TargetInfo:
    return TargetInfo("x86_64")


class CpuProps(Result, frozen=True):
    """Where a vCPU is in the topology."""

    core_id: int
    socket_id: int
    thread_id: int

    @classmethod
    def of(cls, vcpu: Vcpu) -> CpuProps:
        return cls(vcpu.core, vcpu.socket, vcpu.thread)


def _qom_path(vcpu: Vcpu) -> str:
    return f"/machine/unattached/device[{vcpu.index}]"


class CpuInfo(Result, frozen=True):
    """Of query-cpus, which QEMU dropped in 6.0 and StratoVirt's clients use."""

    cpu: int = msgspec.field(name="CPU")
    arch: str
    current: bool
    halted: bool
    props: CpuProps
    qom_path: str = msgspec.field(name="qom_path")
    thread_id: int = msgspec.field(name="thread_id")


@command("query-cpus", arguments=NoArguments, returns=list[CpuInfo])
def query_cpus(ctx: Context, _args: NoArguments) -> list[CpuInfo]:
    # "halted" is KVM's to know with an in-kernel irqchip; QEMU answers false then, too.
    return [
        CpuInfo(v.index, "x86", v.index == 0, False, CpuProps.of(v), _qom_path(v), v.tid) for v in ctx.machine.vcpus()
    ]


class CpuInfoFast(Result, frozen=True):
    """Of query-cpus-fast."""

    cpu_index: int
    qom_path: str
    thread_id: int
    props: CpuProps
    target: str


@command("query-cpus-fast", arguments=NoArguments, returns=list[CpuInfoFast])
def query_cpus_fast(ctx: Context, _args: NoArguments) -> list[CpuInfoFast]:
    return [CpuInfoFast(v.index, _qom_path(v), v.tid, CpuProps.of(v), "x86_64") for v in ctx.machine.vcpus()]


class HotpluggableCpu(Result, frozen=True):
    """Of query-hotpluggable-cpus."""

    props: CpuProps
    qom_path: str
    type: str
    vcpus_count: int


@command("query-hotpluggable-cpus", arguments=NoArguments, returns=list[HotpluggableCpu])
def query_hotpluggable_cpus(ctx: Context, _args: NoArguments) -> list[HotpluggableCpu]:
    return [HotpluggableCpu(CpuProps.of(v), _qom_path(v), "host-x86-cpu", 1) for v in ctx.machine.vcpus()]


class ImageInfo(Result, frozen=True):
    """What a disk's file is."""

    filename: str
    format: str
    virtual_size: int
    backing_filename: str | None = None


class BlockCache(Result, frozen=True):
    """Which caches a disk's requests pass."""

    writeback: bool
    direct: bool
    no_flush: bool


class Inserted(Result, frozen=True, kw_only=True):
    """QEMU's BlockDeviceInfo, as far as it is true here: no throttling, no encryption, no thresholds."""

    file: str
    node_name: str
    ro: bool
    drv: str
    backing_file: str | None = msgspec.field(name="backing_file", default=None)
    backing_file_depth: int = msgspec.field(name="backing_file_depth")
    encrypted: bool
    detect_zeroes: str = msgspec.field(name="detect_zeroes")
    bps: int
    bps_rd: int = msgspec.field(name="bps_rd")
    bps_wr: int = msgspec.field(name="bps_wr")
    iops: int
    iops_rd: int = msgspec.field(name="iops_rd")
    iops_wr: int = msgspec.field(name="iops_wr")
    image: ImageInfo
    cache: BlockCache
    write_threshold: int = msgspec.field(name="write_threshold")


class BlockInfo(Result, frozen=True):
    """Of query-block."""

    device: str
    qdev: str
    type: str
    removable: bool
    locked: bool
    inserted: Inserted


def _block_info(disk: BlockDevice) -> BlockInfo:
    backing = disk.backing or None
    inserted = Inserted(
        file=disk.filename,
        node_name=disk.device_id,
        ro=disk.readonly,
        drv=disk.driver,
        backing_file=backing,
        backing_file_depth=1 if backing else 0,
        encrypted=False,
        detect_zeroes="off",
        bps=0,
        bps_rd=0,
        bps_wr=0,
        iops=0,
        iops_rd=0,
        iops_wr=0,
        image=ImageInfo(disk.filename, disk.driver, disk.size, backing),
        cache=BlockCache(writeback=True, direct=disk.direct, no_flush=False),
        write_threshold=0,
    )
    return BlockInfo(disk.device_id, disk.device_id, "unknown", False, False, inserted)


@command("query-block", arguments=NoArguments, returns=list[BlockInfo])
def query_block(ctx: Context, _args: NoArguments) -> list[BlockInfo]:
    return [_block_info(disk) for disk in ctx.machine.block_devices()]


class ChardevInfo(Result, frozen=True):
    """Of query-chardev."""

    label: str
    filename: str
    frontend_open: bool


@command("query-chardev", arguments=NoArguments, returns=list[ChardevInfo])
def query_chardev(ctx: Context, _args: NoArguments) -> list[ChardevInfo]:
    return [ChardevInfo(c.label, c.filename, c.frontend_open) for c in ctx.machine.char_devices()]


@command("stop", arguments=NoArguments, states=_ALIVE)
def stop(ctx: Context, _args: NoArguments) -> Empty:
    ctx.machine.pause()
    return Empty()


@command("cont", arguments=NoArguments, states=_ALIVE)
def cont(ctx: Context, _args: NoArguments) -> Empty:
    ctx.machine.resume()
    return Empty()


@command("system_reset", arguments=NoArguments, states=_ALIVE)
def system_reset(ctx: Context, _args: NoArguments) -> Empty:
    ctx.machine.reset("host-qmp-system-reset")
    return Empty()


@command("system_powerdown", arguments=NoArguments, states=_ALIVE)
def system_powerdown(ctx: Context, _args: NoArguments) -> Empty:
    ctx.machine.powerdown()
    return Empty()


@command("quit", arguments=NoArguments)
def quit_(ctx: Context, _args: NoArguments) -> Then:
    return Then(Empty(), lambda: ctx.machine.quit("host-qmp-quit"))


class DescriptorName(Arguments, frozen=True):
    """Of getfd and closefd."""

    fdname: str


@command("getfd", arguments=DescriptorName)
def getfd(ctx: Context, args: DescriptorName) -> Empty:
    ctx.descriptors.add(args.fdname, ctx.received)
    return Empty()


@command("closefd", arguments=DescriptorName)
def closefd(ctx: Context, args: DescriptorName) -> Empty:
    os.close(ctx.descriptors.take(args.fdname))
    return Empty()


class SidecarInfo(Result, frozen=True):
    """Of x-motorcade-sidecars."""

    id: str
    kind: str
    pid: int
    state: str
    slot: int | None = None


@command("x-motorcade-sidecars", arguments=NoArguments, returns=list[SidecarInfo])
def x_motorcade_sidecars(ctx: Context, _args: NoArguments) -> list[SidecarInfo]:
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
