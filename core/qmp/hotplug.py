"""Disks and NICs that come and go: blockdev-add, netdev_add, device_add and their opposites (docs/hotplug.md)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import msgspec

from motorcade.core.hotplug import AddDevice
from motorcade.core.layout import SLOTS_A_KIND
from motorcade.core.qmp.errors import QmpError
from motorcade.core.qmp.machine import RunState
from motorcade.core.qmp.registry import Arguments, Context, Deferred, Empty, command

_STATES = frozenset(RunState) - {RunState.SHUTDOWN, RunState.INTERNAL_ERROR}
_DRIVERS = {
    "virtio-blk-device": "blk",
    "virtio-blk-mmio": "blk",
    "virtio-net-device": "net",
    "virtio-net-mmio": "net",
}
_ID = re.compile(r"[A-Za-z0-9][-_.A-Za-z0-9]{0,30}")
_AIO = {"io_uring": "io_uring", "native": "auto", "threads": "sync"}


def _finish(later: Deferred) -> Callable[[QmpError | None], None]:
    return lambda error: later.finish(Empty() if error is None else error)


def _check_id(what: str, value: str) -> str:
    if not _ID.fullmatch(value):
        raise QmpError(
            f"Parameter '{what}' expects an identifier: letters, digits, - _ and . only, at most 31, the first a "
            "letter or digit"
        )
    return value


class BlockFile(Arguments, frozen=True):
    """The protocol layer under a raw disk."""

    filename: str
    driver: str = "file"


class BlockCacheOptions(Arguments, frozen=True):
    """Of blockdev-add."""

    direct: bool = False
    no_flush: bool = False


class BlockdevAdd(Arguments, frozen=True):
    """Of blockdev-add. ``aio``: io_uring, native or threads; ``discard``: unmap, or ignore for a disk without it."""

    node_name: str
    driver: str
    file: BlockFile
    read_only: bool = False
    cache: BlockCacheOptions = msgspec.field(default_factory=BlockCacheOptions)
    aio: str | None = None
    discard: str = "unmap"


@command("blockdev-add", arguments=BlockdevAdd, states=_STATES)
def blockdev_add(ctx: Context, args: BlockdevAdd) -> Deferred:
    """Opens a raw image, for a disk that device_add is to make of it."""
    name = _check_id("node-name", args.node_name)
    if args.driver != "raw":
        raise QmpError(f"Parameter 'driver': '{args.driver}' is none that is here; disks are raw")
    if args.file.driver not in ("file", "host_device"):
        raise QmpError(f"Parameter 'file.driver': '{args.file.driver}' is neither file nor host_device")
    if args.cache.no_flush:
        raise QmpError("Parameter 'cache.no-flush': what the guest has flushed is kept; true is not possible")
    if args.aio is not None and args.aio not in _AIO:
        raise QmpError(f"Parameter 'aio': '{args.aio}' is none of {', '.join(_AIO)}")
    if args.discard not in ("ignore", "off", "unmap", "on"):
        raise QmpError(f"Parameter 'discard': '{args.discard}' is neither ignore nor unmap")
    options: dict[str, Any] = {
        "id": name,
        "path": args.file.filename,
        "readonly": args.read_only,
        "direct": args.cache.direct,
        "engine": _AIO[args.aio] if args.aio is not None else "auto",
        "discard": args.discard in ("unmap", "on"),
    }
    later = Deferred()
    ctx.machine.hotplug.open("blk", name, options, (), _finish(later))
    return later


class NodeName(Arguments, frozen=True):
    """Of blockdev-del."""

    node_name: str


@command("blockdev-del", arguments=NodeName, states=_STATES)
def blockdev_del(ctx: Context, args: NodeName) -> Deferred:
    """Lets go of an image that no device uses."""
    later = Deferred()
    ctx.machine.hotplug.close(args.node_name, "blk", _finish(later))
    return later


class NetdevAdd(Arguments, frozen=True, rename=None):
    """Of netdev_add. ``fd``, ``fds``: names of getfd, separated by colons, each a queue of a tap."""

    id: str
    type: str = "tap"
    ifname: str | None = None
    fd: str | None = None
    fds: str | None = None
    queues: int = 1


@command("netdev_add", arguments=NetdevAdd, states=_STATES)
def netdev_add(ctx: Context, args: NetdevAdd) -> Deferred:
    """Opens the host's side of a NIC, for device_add: a tap (by name, or descriptors of getfd), or passt."""
    name = _check_id("id", args.id)
    if args.type not in ("tap", "user"):
        raise QmpError(f"Parameter 'type': '{args.type}' is neither tap nor user")
    if not 1 <= args.queues <= 8:
        raise QmpError("Parameter 'queues' expects 1 to 8 queue pairs")
    given = [word for word in (args.ifname, args.fd, args.fds) if word is not None]
    if len(given) != (args.type == "tap"):
        what = "exactly one of ifname, fd and fds" if args.type == "tap" else "none of ifname, fd and fds"
        raise QmpError(f"Parameter 'id': a network backend of type {args.type} takes {what}")
    options: dict[str, Any] = {"id": name, "queues": args.queues}
    names: list[str] = []
    if args.type == "user":
        options["user"] = True
    elif args.ifname is not None:
        options["tap"] = args.ifname
    else:
        names = given[0].split(":")
        if args.fd is not None and len(names) > 1:
            raise QmpError("Parameter 'fd' names one descriptor; 'fds' several, with colons between them")
        if args.queues not in (1, len(names)):
            raise QmpError(f"Parameter 'queues' is {args.queues}, but {len(names)} descriptors are named")
        options |= {"unplugged": True, "queues": len(names)}
    later = Deferred()
    ctx.machine.hotplug.open("net", name, options, ctx.descriptors.take_all(names), _finish(later))
    return later


class DeviceId(Arguments, frozen=True):
    """Of netdev_del and device_del."""

    id: str


@command("netdev_del", arguments=DeviceId, states=_STATES)
def netdev_del(ctx: Context, args: DeviceId) -> Deferred:
    """Lets go of a network backend that no device uses."""
    later = Deferred()
    ctx.machine.hotplug.close(args.id, "net", _finish(later))
    return later


class DeviceAdd(Arguments, frozen=True):
    """Of device_add. ``addr``: the slot, such as "0x1"; ``lun``: the slot - 1."""

    id: str
    driver: str
    addr: str | None = None
    lun: int | None = None
    drive: str | None = None
    netdev: str | None = None
    mac: str | None = None
    serial: str | None = None


def _slot(args: DeviceAdd) -> int | None:
    if args.addr is not None and args.lun is not None:
        raise QmpError("Parameters 'addr' and 'lun' both say the slot; give one")
    if args.lun is not None:
        return args.lun + 1
    if args.addr is None:
        return None
    try:
        return int(args.addr, 16)
    except ValueError:
        most = SLOTS_A_KIND - 1
        raise QmpError(f"Parameter 'addr' expects a slot from 0x0 to {most:#x}, not '{args.addr}'") from None


@command("device_add", arguments=DeviceAdd, states=_STATES)
def device_add(ctx: Context, args: DeviceAdd) -> Deferred:
    """Puts a disk or a NIC into a slot; the guest sees it come."""
    kind = _DRIVERS.get(args.driver)
    if kind is None:
        raise QmpError(f"'{args.driver}' is not a valid device model name; there are: {', '.join(sorted(_DRIVERS))}")
    _check_id("id", args.id)
    backend, other, foreign = args.drive, "netdev", args.netdev
    if kind == "net":
        backend, other, foreign = args.netdev, "drive", args.drive
    of_other = ("mac", args.mac) if kind == "blk" else ("serial", args.serial)
    if wrong := [name for name, value in ((other, foreign), of_other) if value is not None]:
        raise QmpError(f"Property '{args.driver}.{wrong[0]}' not found")
    if args.serial is not None and (len(args.serial.encode()) > 20 or not args.serial.isprintable()):
        raise QmpError("Parameter 'serial' expects at most 20 printable characters")
    if args.mac is not None and not _is_mac(args.mac):
        raise QmpError(f"Parameter 'mac' expects a unicast address such as 52:54:00:12:34:56, not '{args.mac}'")
    device = AddDevice(args.id, kind, args.id if backend is None else backend, _slot(args), args.serial, args.mac)
    later = Deferred()
    ctx.machine.hotplug.add(device, _finish(later))
    return later


def _is_mac(text: str) -> bool:
    if not re.fullmatch("([0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}", text):
        return False
    mac = bytes.fromhex(text.replace(":", ""))
    return any(mac) and not mac[0] & 1


@command("device_del", arguments=DeviceId, states=_STATES)
def device_del(ctx: Context, args: DeviceId) -> Deferred:
    """Takes a disk or a NIC away; the guest sees it go. Event DEVICE_DELETED."""
    later = Deferred()

    def done(error: QmpError | None) -> None:
        if error is None:
            ctx.machine.on_event("DEVICE_DELETED", {"device": args.id, "path": args.id})
        later.finish(Empty() if error is None else error)

    ctx.machine.hotplug.remove(args.id, done)
    return later


class AddDeviceOfYaml(Arguments, frozen=True):
    """Of x-motorcade-device-add: an entry of ``disks`` or ``nets``, as machine.yaml has it."""

    disk: dict[str, Any] | None = None
    net: dict[str, Any] | None = None


@command("x-motorcade-device-add", arguments=AddDeviceOfYaml, states=_STATES)
def x_motorcade_device_add(ctx: Context, args: AddDeviceOfYaml) -> Deferred:
    """Opens and plugs a disk or a NIC as machine.yaml describes it; device_del takes all of it away."""
    if (args.disk is None) == (args.net is None):
        raise QmpError("Give one of 'disk' and 'net'")
    kind, given = ("blk", args.disk) if args.disk is not None else ("net", args.net)
    assert given is not None
    options = dict(given)
    slot = options.pop("slot", None)
    if slot is not None and (not isinstance(slot, int) or isinstance(slot, bool)):
        raise QmpError("'slot' expects a whole number")
    device_id = options.get("id")
    if not isinstance(device_id, str):
        raise QmpError("'id' is missing")
    _check_id("id", device_id)
    mac = options.get("mac")
    if mac is not None and (not isinstance(mac, str) or not _is_mac(mac)):
        raise QmpError(f"'mac' expects a unicast address such as 52:54:00:12:34:56, not '{mac}'")
    device = AddDevice(device_id, kind, device_id, slot, options.get("serial"), mac, keep=False)
    later = Deferred()
    ctx.machine.hotplug.open_and_add(device, options, _finish(later))
    return later
