"""The disks (QEMU's qapi/block-core.json)."""

from __future__ import annotations

import msgspec

from motorcade.core.qmp.machine import BlockDevice
from motorcade.core.qmp.registry import Context, NoArguments, Result, command


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
    """The disks, each with its image."""
    return [_block_info(disk) for disk in ctx.machine.block_devices()]
