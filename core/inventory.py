"""What QMP is told about a machine's devices: from what the supervisor said of them, and their sidecars."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from motorcade.core.hotplug import Hotplug, is_held
from motorcade.core.platform import NO_SLOT, PAGER, Platform
from motorcade.core.qmp import machine as qmp
from motorcade.proto import messages


def block_devices(platform: Platform, hotplug: Hotplug) -> Sequence[qmp.BlockDevice]:
    """The disks in slot order."""
    disks = [slot for slot in platform.slots if slot.kind == "blk" and not is_held(slot.device_id)]
    nodes = {user: backend for backend, user in hotplug.users.items()}
    return [
        _block_device(platform, slot, nodes.get(slot.device_id, slot.device_id))
        for slot in sorted(disks, key=lambda slot: slot.index)
    ]


def spare_nodes(hotplug: Hotplug) -> Sequence[qmp.BlockDevice]:
    """The images that blockdev-add has opened and no disk uses."""
    unused = sorted(name for name, kind in hotplug.backends.items() if kind == "blk" and name not in hotplug.users)
    return [
        qmp.BlockDevice("", options["path"], "raw", None, options["readonly"], options["direct"], node=name)
        for name, options in ((name, hotplug.options[name]) for name in unused)
    ]


def _block_device(platform: Platform, slot: messages.Slot, node: str) -> qmp.BlockDevice:
    info = json.loads(slot.info)
    identity = platform.devices[slot.device_id].identity
    # Configuration space begins with the capacity in sectors of 512 bytes (virtio 1.2, 5.2.4).
    capacity = int.from_bytes(identity.config[:8], "little") * 512 if identity else 0
    return qmp.BlockDevice(
        device_id=slot.device_id,
        filename=info["file"],
        driver=info["driver"],
        size=capacity,
        readonly=info["ro"],
        direct=info["direct"],
        backing=info["backing-file"] or "",
        node=node,
    )


def char_devices(platform: Platform) -> Sequence[qmp.CharDevice]:
    """The consoles, the 16550's first."""
    serial = [slot for slot in platform.slots if slot.kind == "serial"]
    serial.sort(key=lambda slot: (slot.index != NO_SLOT, slot.index))
    infos = [json.loads(slot.info) for slot in serial]
    return [qmp.CharDevice(i["label"], i["filename"], i["frontend-open"]) for i in infos]


def net_devices(platform: Platform) -> Sequence[qmp.NetDevice]:
    """The NICs in slot order."""
    nets = [slot for slot in platform.slots if slot.kind == "net" and not is_held(slot.device_id)]
    nets.sort(key=lambda slot: slot.index)
    infos = [(slot.device_id, json.loads(slot.info)) for slot in nets]
    return [qmp.NetDevice(name, i["mac"], f"tap {i['ifname']}" if i["ifname"] else i["backend"]) for name, i in infos]


def sidecars(
    platform: Platform, depths: Callable[[str], Sequence[qmp.QueueDepth]]
) -> Sequence[qmp.Sidecar]:
    """The backend processes in slot order, and the pager."""
    return [
        qmp.Sidecar(
            slot.device_id,
            slot.kind,
            platform.links[slot.device_id].pid,
            "paused" if platform.links[slot.device_id].paused else platform.links[slot.device_id].state.value,
            None if slot.index == NO_SLOT else slot.index,
            depths(slot.device_id),
        )
        for slot in sorted(platform.slots, key=lambda slot: slot.kind == PAGER)
    ]
