"""The machine as machine.yaml describes it: its types, and the JSON Schema that editors use."""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

MAX_DISKS = MAX_NICS = 16  # the slots that docs/internals.md gives each kind
MAX_VIRTIO_CONSOLES = MAX_KITS = 8
ID_PATTERN = r"^[A-Za-z0-9][-_.A-Za-z0-9]{0,30}$"
_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"([0-9]+)\s*([BKMGT]?)(?:i?B)?", re.IGNORECASE)


class Size(int):
    """Bytes. In YAML a number of bytes, or text such as ``512M`` (binary units)."""


class Mac(bytes):
    """Six bytes of a unicast Ethernet address. In YAML ``52:54:00:12:34:56``."""

    def __str__(self) -> str:
        return self.hex(":")


Id = Annotated[str, Meta(pattern=ID_PATTERN, description="Letters, digits, - _ and ., at most 31; unique.")]


_DEBUG = "A Python prompt in this device's sidecar: vmmctl sidecar debug. Whoever reaches it can do all that it can."


class _Part(msgspec.Struct, forbid_unknown_fields=True):
    """Strict everywhere: a misspelt key is an error, never ignored."""


class Kernel(_Part):
    """What the guest boots."""

    image: Annotated[str, Meta(description="A bzImage as distributions ship it, or an ELF with a PVH note.")]
    cmdline: Annotated[str, Meta(max_length=4000, description="Kernel command line, e.g. console=ttyS0 root=...")] = ""
    initrd: Annotated[str | None, Meta(description="Initial RAM disk.")] = None


Slot = Annotated[
    Annotated[int, Meta(ge=0, le=15)] | None,
    Meta(description="Its place among its kind, from 0 (vda, eth0); default: the first that is free."),
]


class Disk(_Part):
    """A virtio-blk disk; the first in the list is vda."""

    id: Id
    path: Annotated[str, Meta(description="A raw image or a block device.")]
    readonly: Annotated[bool, Meta(description="The guest may not write; several VMs may share the image.")] = False
    direct: Annotated[bool, Meta(description="Bypass the host's page cache (O_DIRECT).")] = False
    overlay: Annotated[
        bool | str,
        Meta(
            description="Write to a copy-on-write overlay and leave the image untouched. true: NAME-ID.overlay beside "
            "machine.yaml, made when missing; or the overlay's path."
        ),
    ] = False
    layers: Annotated[
        list[str],
        Meta(max_length=63, description="Read-only overlays between the image and its overlay, the lowest first."),
    ] = []
    serial: Annotated[
        Annotated[str, Meta(max_length=20, pattern=r"^[ -~]*$")] | None,
        Meta(description="What the guest reads as the serial; default: the id."),
    ] = None
    queues: Annotated[int, Meta(ge=1, le=16, description="Request queues.")] = 1
    discard: Annotated[bool, Meta(description="Offer DISCARD and WRITE_ZEROES.")] = True
    engine: Annotated[
        Literal["auto", "io_uring", "sync"], Meta(description="How the host does the I/O; auto: io_uring if allowed.")
    ] = "auto"
    slot: Slot = None
    debug: Annotated[bool, Meta(description=_DEBUG)] = False


class Net(_Part):
    """A virtio-net NIC; the first in the list is eth0. Exactly one of tap, user, link and unplugged."""

    id: Id
    tap: Annotated[
        Annotated[str, Meta(min_length=1, max_length=15)] | None,
        Meta(description="An existing tap interface of the host."),
    ] = None
    user: Annotated[bool, Meta(description="Through passt: needs no rights, no set-up, gives no inbound ping.")] = False
    link: Annotated[
        str | None, Meta(description="A directory that two VMs name to be wired together; made when missing.")
    ] = None
    unplugged: Annotated[bool, Meta(description="A NIC without a cable: its link is down.")] = False
    mac: Annotated[Mac | None, Meta(description="Default: stable, made from the machine's name and the id.")] = None
    queues: Annotated[int, Meta(ge=1, le=8, description="Queue pairs; more than 1 needs a multi-queue tap.")] = 1
    mtu: Annotated[
        Annotated[int, Meta(ge=68, le=65535)] | None, Meta(description="Offered to the guest; default: not offered.")
    ] = None
    capture: Annotated[str | None, Meta(description="Append every frame to this pcap file.")] = None
    forward: Annotated[
        list[str], Meta(description="user only: [udp:][ADDRESS:]HOSTPORT:GUESTPORT, e.g. 127.0.0.1:8080:80.")
    ] = []
    slot: Slot = None
    debug: Annotated[bool, Meta(description=_DEBUG)] = False

    @property
    def mode(self) -> Literal["tap", "user", "link", "unplugged"]:
        """Which backend was chosen."""
        if self.unplugged:
            return "unplugged"
        return "tap" if self.tap is not None else "link" if self.link is not None else "user"


class To(_Part):
    """A backend with a path. Exactly one of them."""

    socket: Annotated[str | None, Meta(description="Listen on this unix socket, one client at a time.")] = None
    file: Annotated[str | None, Meta(description="Append the output to this file.")] = None


class Console(_Part):
    """A serial port or a virtio console. `vmmctl console` reaches each, whatever its backend."""

    id: Id
    type: Annotated[
        Literal["uart", "virtio"], Meta(description="uart: ttyS0, the only one; virtio: hvc0, hvc1, ...")
    ] = "virtio"
    backend: Annotated[
        Literal["none", "terminal", "pty"] | To,
        Meta(description="Where bytes go besides `vmmctl console`; terminal: what `vmmctl up` attaches to."),
    ] = "none"
    scrollback: Annotated[Size, Meta(description="Bytes kept for a console that attaches late.")] = msgspec.field(
        default_factory=lambda: Size(1 << 20)
    )
    debug: Annotated[bool, Meta(description=_DEBUG)] = False


class Kit:
    """A device of a kind that is none of the above: rng, or one that an installed package brings (sidecars/kinds.py).

    In YAML one mapping: ``id``, ``kind``, perhaps ``debug``, and what the kind understands. ``options`` are checked in
    config.py, since that takes the kind's own code.
    """

    def __init__(self, id: str, kind: str, options: dict[str, Any], debug: bool = False) -> None:
        self.id, self.kind, self.options, self.debug = id, kind, options, debug

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Kit) and self.plain() == other.plain()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Kit({self.plain()})"

    def plain(self) -> dict[str, Any]:
        """As machine.yaml has it."""
        return {"id": self.id, "kind": self.kind, **({"debug": True} if self.debug else {}), **self.options}


class Removed(_Part):
    """What is left in the slot of a device that was taken away while the guest's driver was bound to it (templates)."""

    kind: Literal["blk", "net"]
    slot: Annotated[int, Meta(ge=0, le=15)]  # of its kind
    queues: Annotated[int, Meta(ge=1, le=16)] = 1  # queue pairs of a NIC
    readonly: bool = False
    discard: bool = True
    mac: Mac | None = None
    mtu: int | None = None


class Balloon(_Part):
    """A virtio-balloon: RAM that the guest does not need goes back to the host."""

    id: Id = "balloon"
    deflate_on_oom: Annotated[
        bool, Meta(description="A guest that runs out of memory takes some back, whatever it was told.")
    ] = False
    free_page_reporting: Annotated[
        bool, Meta(description="The guest says which pages are free, and the host has them until they are used.")
    ] = False
    stats_interval: Annotated[
        int, Meta(ge=0, le=86400, description="Seconds between the guest's statistics; 0: only when asked for.")
    ] = 0

    @property
    def kit(self) -> Kit:
        """As the device that it is."""
        options = {
            "deflate_on_oom": self.deflate_on_oom,
            "free_page_reporting": self.free_page_reporting,
            "stats_interval": self.stats_interval,
        }
        return Kit(self.id, "balloon", {key: value for key, value in options.items() if value})


class Bounds(_Part):
    """What processes may use, by cgroups."""

    cpu: Annotated[
        Annotated[float, Meta(ge=0.01, le=4096)] | None, Meta(description="Processors' worth of time: 0.5, 2.")
    ] = None
    memory: Annotated[Size | None, Meta(description="Bytes, page cache and guest RAM included; beyond it: killed.")] = (
        None
    )
    pids: Annotated[
        Annotated[int, Meta(ge=1, le=1 << 22)] | None, Meta(description="Processes and threads at most.")
    ] = None


class Limits(Bounds):
    """Of all the VM's processes but its supervisor, together."""

    sidecar: Annotated[Bounds | None, Meta(description="Of each sidecar, pager and helper.")] = None


class Machine(_Part, kw_only=True):
    """A virtual machine."""

    name: Annotated[str, Meta(pattern=ID_PATTERN, description="What vmmctl calls it; unique among running VMs.")]
    uuid: Annotated[str | None, Meta(description="Default: stable, made from the name.")] = None
    cpus: Annotated[int, Meta(ge=1, le=255, description="Virtual CPUs.")] = 1
    memory: Annotated[Size, Meta(description="RAM: bytes, or text such as 512M or 2G.")] = msgspec.field(
        default_factory=lambda: Size(512 << 20)
    )
    memory_file: Annotated[
        str | None,
        Meta(description="RAM is this file, on tmpfs or hugetlbfs; made when missing. Default: memory without a name."),
    ] = None
    memory_share: Annotated[
        bool, Meta(description="false: a machine that goes on from a state gets a copy of memory_file on demand.")
    ] = True
    memory_prealloc: Annotated[
        bool, Meta(description="Have the host set all of the RAM aside when a fresh machine starts.")
    ] = False
    accel: Annotated[
        Literal["auto", "kvm", "box"],
        Meta(description="kvm: this host's; box: inside a small Linux with a complete KVM; auto: kvm where it can."),
    ] = "auto"
    kernel: Kernel
    disks: Annotated[list[Disk], Meta(max_length=MAX_DISKS)] = []
    nets: Annotated[list[Net], Meta(max_length=MAX_NICS)] = []
    consoles: list[Console] = []
    devices: Annotated[list[Kit], Meta(max_length=MAX_KITS, description="Devices of other kinds.")] = []
    balloon: Annotated[
        bool | Balloon, Meta(description="Let `vmmctl balloon` take memory from the running guest and give it back.")
    ] = False
    removed: Annotated[list[Removed], Meta(description="In templates: slots that the guest's drivers still hold.")] = []
    uart: Annotated[bool, Meta(description="Give the machine a serial port (ttyS0) even if no console asks.")] = True
    qmp: Annotated[
        list[str], Meta(description="More QMP sockets: unix:PATH or tcp:HOST:PORT (the VM's own is always there).")
    ] = []
    limits: Annotated[Limits | None, Meta(description="By cgroups (version 2); an error where they cannot be set.")] = (
        None
    )
    metrics: Annotated[
        str | None,
        Meta(description="Serve Prometheus metrics at this loopback address too, such as 127.0.0.1:9200."),
    ] = None
    on_reboot: Annotated[
        Literal["reset", "exit"], Meta(description="What the guest's reboot does: boot again, or end the VM.")
    ] = "reset"
    on_poweroff: Annotated[
        Literal["end", "pause"], Meta(description="What the guest's power-off does: end the VM, or keep it, stopped.")
    ] = "end"
    on_crash: Annotated[
        Literal["end", "pause"], Meta(description="What becomes of a guest that cannot go on (a triple fault, say).")
    ] = "end"
    restarts: Annotated[
        int, Meta(ge=0, description="How often within a minute a sidecar may die before its device fails.")
    ] = 10
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="Of all the VM's processes.")
    ] = "info"

    @property
    def the_balloon(self) -> Balloon | None:
        """The balloon, if it has one."""
        return (Balloon() if self.balloon else None) if isinstance(self.balloon, bool) else self.balloon


def schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of machine.yaml."""
    shapes: dict[type, dict[str, Any]] = {
        Size: {"type": ["integer", "string"], "pattern": r"^[0-9]+\s*[BKMGTbkmgt]?(i?[Bb])?$", "minimum": 0},
        Kit: {
            "type": "object",
            "description": "A device of another kind, and what that kind understands (docs/machine-yaml.md).",
            "properties": {
                "id": {"type": "string", "pattern": ID_PATTERN},
                "kind": {"type": "string"},
                "debug": {"type": "boolean", "description": _DEBUG},
            },
            "required": ["id", "kind"],
        },
        Mac: {"type": "string", "pattern": "^([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}$"},
    }
    result: dict[str, Any] = msgspec.json.schema(Machine, schema_hook=lambda kind: shapes[kind])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Motorcade machine.yaml", **result}


def parse_size(value: object) -> Size:
    """Bytes from a number or from text such as 512M. Errors: ValueError."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return Size(value)
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if not match:
        raise ValueError(f"expected a size such as 512M, 2G or a number of bytes, got {shown(value)}")
    return Size(int(match[1]) * _UNITS[match[2].upper()])


def parse_mac(value: object) -> Mac:
    """A unicast address from ``52:54:00:12:34:56``. Errors: ValueError."""
    if not isinstance(value, str) or not re.fullmatch(r"([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}", value):
        raise ValueError(f"expected a MAC address such as 52:54:00:12:34:56, got {shown(value)}")
    mac = Mac.fromhex(value.replace(":", ""))
    if mac[0] & 1 or not any(mac):
        raise ValueError(f"{value} is not a unicast address (the first byte must be even)")
    return mac


def stable_mac(name: str, device_id: str) -> Mac:
    """The same address for the same machine and NIC on every start; in QEMU's locally administered range."""
    return Mac(b"\x52\x54\x00" + hashlib.blake2b(f"{name}/{device_id}".encode(), digest_size=3).digest())


def describe(machine: Machine) -> str:
    """The machine as JSON, as a template keeps it: equal machines give equal text."""
    return msgspec.json.encode(machine, enc_hook=encode).decode()


def encode(value: object) -> object:
    """msgspec's hook for the types above, on the way out."""
    if isinstance(value, Kit):
        return value.plain()
    return int(value) if isinstance(value, Size) else str(value)


def decode(kind: type, value: object) -> object:
    """msgspec's hook for the types above."""
    if kind is Kit:
        return parse_kit(value)
    return parse_size(value) if kind is Size else parse_mac(value)


def parse_kit(value: object) -> Kit:
    """A device from its mapping; its options are not looked at. Errors: ValueError."""
    if not isinstance(value, dict):
        raise ValueError(f"expected a mapping with id and kind, got {shown(value)}")
    for key in ("id", "kind"):
        if not isinstance(value.get(key), str):
            raise ValueError(f"'{key}' is {'not text' if key in value else 'missing'}")
        if not re.fullmatch(ID_PATTERN, value[key]):
            raise ValueError(f"{key} {shown(value[key])}: letters, digits, - _ and . only, at most 31, the first a "
                             "letter or digit")  # fmt: skip
    debug = value.get("debug", False)
    if not isinstance(debug, bool):
        raise ValueError(f"debug: expected true or false, got {shown(debug)}")
    options = {k: v for k, v in value.items() if k not in ("id", "kind", "debug")}
    return Kit(value["id"], value["kind"], options, debug)


def shown(value: object) -> str:
    """A YAML value as its writer would recognise it."""
    if isinstance(value, str):
        return f"'{value}'"
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "a mapping"
    return "nothing" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
