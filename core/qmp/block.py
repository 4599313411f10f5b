"""The disks (QEMU's qapi/block-core.json)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence

import msgspec

from motorcade.core.qmp.errors import DeviceNotFound, QmpError
from motorcade.core.qmp.machine import BlockDevice
from motorcade.core.qmp.registry import Arguments, Context, Deferred, NoArguments, Result, command
from motorcade.proto.messages import StatsReport


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
    image: ImageInfo | None = None
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


def _inserted(disk: BlockDevice) -> Inserted:
    backing = disk.backing or None
    return Inserted(
        file=disk.filename,
        node_name=disk.node or disk.device_id,
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
        image=None if disk.size is None else ImageInfo(disk.filename, disk.driver, disk.size, backing),
        cache=BlockCache(writeback=True, direct=disk.direct, no_flush=False),
        write_threshold=0,
    )


@command("query-block", arguments=NoArguments, returns=list[BlockInfo])
def query_block(ctx: Context, _args: NoArguments) -> list[BlockInfo]:
    """The disks, each with its image."""
    return [
        BlockInfo(disk.device_id, disk.device_id, "unknown", False, False, _inserted(disk))
        for disk in ctx.machine.block_devices()
    ]


class NamedBlockNodes(Arguments, frozen=True):
    """Of query-named-block-nodes. ``flat``: as here always, without what is behind each."""

    flat: bool = True


@command("query-named-block-nodes", arguments=NamedBlockNodes, returns=list[Inserted])
def query_named_block_nodes(ctx: Context, _args: NamedBlockNodes) -> list[Inserted]:
    """The images: those of the disks, under their disk's id or blockdev-add's name, and those that no disk uses."""
    return [_inserted(disk) for disk in (*ctx.machine.block_devices(), *ctx.machine.spare_nodes())]


class DeviceStats(Result, frozen=True, kw_only=True):
    """QEMU's BlockDeviceStats, as far as the sidecar counts: bytes and requests of the guest's since it was started."""

    rd_bytes: int = msgspec.field(name="rd_bytes")
    wr_bytes: int = msgspec.field(name="wr_bytes")
    rd_operations: int = msgspec.field(name="rd_operations")
    wr_operations: int = msgspec.field(name="wr_operations")
    flush_operations: int = msgspec.field(name="flush_operations")
    unmap_operations: int = msgspec.field(name="unmap_operations")
    rd_merged: int = msgspec.field(name="rd_merged")
    wr_merged: int = msgspec.field(name="wr_merged")
    account_invalid: bool = msgspec.field(name="account_invalid")
    account_failed: bool = msgspec.field(name="account_failed")


class BlockStats(Result, frozen=True):
    """Of query-blockstats."""

    device: str
    qdev: str
    node_name: str
    stats: DeviceStats


class QueryBlockstats(Arguments, frozen=True):
    """Of query-blockstats. ``query-nodes``: of the images instead of the disks, which is the same here."""

    query_nodes: bool = False


def _stats(disk: BlockDevice, report: StatsReport) -> BlockStats:
    count = {counter.name: counter.value for counter in report.detail}
    stats = DeviceStats(
        rd_bytes=sum(q.bytes_out for q in report.queues),  # out of the device
        wr_bytes=sum(q.bytes_in for q in report.queues),
        rd_operations=count.get("reads", 0),
        wr_operations=count.get("writes", 0) + count.get("write-zeroes", 0),
        flush_operations=count.get("flushes", 0),
        unmap_operations=count.get("discards", 0),
        rd_merged=0,  # each request is done by itself
        wr_merged=0,
        account_invalid=False,
        account_failed=True,
    )
    return BlockStats(disk.device_id, disk.device_id, disk.node or disk.device_id, stats)


@command("query-blockstats", arguments=QueryBlockstats, returns=list[BlockStats])
def query_blockstats(ctx: Context, _args: QueryBlockstats) -> Deferred:
    """What each disk has done. One whose sidecar does not answer within seconds has what it said last."""
    later, disks = Deferred(), ctx.machine.block_devices()
    reports: dict[str, StatsReport | None] = {}

    def done(name: str, report: StatsReport | None) -> None:
        if report is None:
            with contextlib.suppress(DeviceNotFound):  # it was unplugged meanwhile
                report = ctx.machine.last_stats(name)
        reports[name] = report
        if len(reports) == len(disks):
            later.finish(_all_stats(disks, reports))

    for disk in disks:
        ctx.machine.sidecar_stats(disk.device_id, functools.partial(done, disk.device_id))
    if not disks:
        later.finish([])
    return later


def _all_stats(disks: Sequence[BlockDevice], reports: Mapping[str, StatsReport | None]) -> list[BlockStats] | QmpError:
    stats = []
    for disk in disks:
        report = reports[disk.device_id]
        if report is None:
            return QmpError(f"The sidecar of '{disk.device_id}' gave no counters, now or before; see its log")
        stats.append(_stats(disk, report))
    return stats
