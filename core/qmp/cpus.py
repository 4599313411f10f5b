"""The vCPUs (QEMU's qapi/machine.json, and query-cpus as it was before 6.0)."""

from __future__ import annotations

import msgspec

from motorcade.core.qmp.machine import Vcpu
from motorcade.core.qmp.registry import Context, NoArguments, Result, command


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
    """The vCPUs and their host threads, as QEMU said it before 6.0."""
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
    """The vCPUs and their host threads."""
    return [CpuInfoFast(v.index, _qom_path(v), v.tid, CpuProps.of(v), "x86_64") for v in ctx.machine.vcpus()]


class HotpluggableCpu(Result, frozen=True):
    """Of query-hotpluggable-cpus."""

    props: CpuProps
    qom_path: str
    type: str
    vcpus_count: int


@command("query-hotpluggable-cpus", arguments=NoArguments, returns=list[HotpluggableCpu])
def query_hotpluggable_cpus(ctx: Context, _args: NoArguments) -> list[HotpluggableCpu]:
    """The places of vCPUs in the topology."""
    return [HotpluggableCpu(CpuProps.of(v), _qom_path(v), "host-x86-cpu", 1) for v in ctx.machine.vcpus()]
