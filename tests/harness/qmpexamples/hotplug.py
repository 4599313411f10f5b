"""Disks and NICs that come and go. The micro-guest has no drivers, so it never acknowledges what comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.qmpexamples.example import Example, Group, Place


def _machine(folder: Path) -> dict[str, Any]:
    (folder / "plug.img").write_bytes(bytes(1 << 20))
    return {}


def _blockdev(name: str, image: str = "plug.img", **more: object) -> Example:
    def arguments(at: Place) -> dict[str, object]:
        file = {"driver": "file", "filename": str(at.folder / image)}
        return {"node-name": name, "driver": "raw", "file": file, **more}

    return Example("blockdev-add", arguments)


def _deleted(device: str) -> Example:
    return Example("device_del", {"id": device}, events=[("DEVICE_DELETED", {"device": device, "path": device})])


def _names(entries: list[dict[str, Any]], member: str) -> list[str]:
    return [entry[member] for entry in entries]


GROUP = Group(
    "hotplug",
    machine=_machine,
    examples=[
        _blockdev("drive-0", **{"read-only": False, "cache": {"direct": False}, "aio": "threads"}),
        Example("device_add", {"id": "drive-0", "driver": "virtio-blk-mmio", "addr": "0x5"}),
        Example("blockdev-del", {"node-name": "drive-0"}, error="GenericError", desc="device 'drive-0' uses it"),
        Example(
            "device_add",
            {"id": "other", "driver": "virtio-blk-mmio", "drive": "drive-0"},
            error="GenericError",
            desc="in use by device 'drive-0'",
        ),
        _deleted("drive-0"),
        Example("query-named-block-nodes", answer=lambda nodes: _names(nodes, "node-name")[-1] == "drive-0"),
        Example("device_add", {"id": "d1", "driver": "virtio-blk-device", "drive": "drive-0", "lun": 7, "serial": "S"}),
        Example("query-block", answer=lambda disks: _names(disks, "device")[-1] == "d1"),
        Example("query-blockstats", answer=lambda disks: _names(disks, "node-name")[-1] == "drive-0"),
        _deleted("d1"),
        Example("blockdev-del", {"node-name": "drive-0"}),
        Example("blockdev-del", {"node-name": "drive-0"}, error="GenericError", desc="Failed to find node"),
        Example("netdev_add", {"id": "net-0", "ifname": "no-such-tap"}, error="GenericError", desc="no such interface"),
        Example("netdev_add", {"id": "net-1", "type": "user"}),  # as with ifname, which needs a tap of the host's
        Example("device_add", {"id": "eth1", "driver": "virtio-net-mmio", "netdev": "net-1", "addr": "0x1"}),
        _deleted("eth1"),
        Example("netdev_del", {"id": "net-1"}),
        Example("netdev_del", {"id": "net-0"}, error="DeviceNotFound", desc="'net-0' not found"),
        Example(
            "device_add",
            {"id": "net-0", "driver": "virtio-net-mmio", "addr": "0x0", "mac": "12:34:56:78:9a:bc"},
            error="GenericError",
            desc="can't find network backend 'net-0'",
        ),
        Example("device_del", {"id": "nobody"}, error="DeviceNotFound", desc="'nobody' not found"),
        Example("x-motorcade-device-add", {"net": {"id": "lan", "unplugged": True}}),
        _deleted("lan"),
    ],
)
