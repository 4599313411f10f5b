"""The machine as machine.yaml describes it: its types, and the JSON Schema that editors use."""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

MAX_DISKS = MAX_NICS = MAX_VIRTIO_CONSOLES = 16  # the slots that docs/internals.md gives each kind
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


class _Part(msgspec.Struct, forbid_unknown_fields=True):
    """Strict everywhere: a misspelt key is an error, never ignored."""


class Kernel(_Part):
    """What the guest boots."""

    image: Annotated[str, Meta(description="A bzImage as distributions ship it, or an ELF with a PVH note.")]
    cmdline: Annotated[str, Meta(max_length=4000, description="Kernel command line, e.g. console=ttyS0 root=...")] = ""
    initrd: Annotated[str | None, Meta(description="Initial RAM disk.")] = None


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
    serial: Annotated[
        Annotated[str, Meta(max_length=20, pattern=r"^[ -~]*$")] | None,
        Meta(description="What the guest reads as the serial; default: the id."),
    ] = None
    queues: Annotated[int, Meta(ge=1, le=16, description="Request queues.")] = 1
    discard: Annotated[bool, Meta(description="Offer DISCARD and WRITE_ZEROES.")] = True
    engine: Annotated[
        Literal["auto", "io_uring", "sync"], Meta(description="How the host does the I/O; auto: io_uring if allowed.")
    ] = "auto"


class Net(_Part):
    """A virtio-net NIC; the first in the list is eth0. Exactly one of tap, user and link."""

    id: Id
    tap: Annotated[
        Annotated[str, Meta(min_length=1, max_length=15)] | None,
        Meta(description="An existing tap interface of the host."),
    ] = None
    user: Annotated[bool, Meta(description="Through passt: needs no rights, no set-up, gives no inbound ping.")] = False
    link: Annotated[
        str | None, Meta(description="A directory that two VMs name to be wired together; made when missing.")
    ] = None
    mac: Annotated[Mac | None, Meta(description="Default: stable, made from the machine's name and the id.")] = None
    queues: Annotated[int, Meta(ge=1, le=8, description="Queue pairs; more than 1 needs a multi-queue tap.")] = 1
    mtu: Annotated[
        Annotated[int, Meta(ge=68, le=65535)] | None, Meta(description="Offered to the guest; default: not offered.")
    ] = None
    capture: Annotated[str | None, Meta(description="Append every frame to this pcap file.")] = None
    forward: Annotated[
        list[str], Meta(description="user only: [udp:][ADDRESS:]HOSTPORT:GUESTPORT, e.g. 127.0.0.1:8080:80.")
    ] = []

    @property
    def mode(self) -> Literal["tap", "user", "link"]:
        """Which backend was chosen."""
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


class Machine(_Part, kw_only=True):
    """A virtual machine."""

    name: Annotated[str, Meta(pattern=ID_PATTERN, description="What vmmctl calls it; unique among running VMs.")]
    uuid: Annotated[str | None, Meta(description="Default: stable, made from the name.")] = None
    cpus: Annotated[int, Meta(ge=1, le=255, description="Virtual CPUs.")] = 1
    memory: Annotated[Size, Meta(description="RAM: bytes, or text such as 512M or 2G.")] = msgspec.field(
        default_factory=lambda: Size(512 << 20)
    )
    accel: Annotated[
        Literal["auto", "kvm", "box"],
        Meta(description="kvm: this host's; box: inside a small Linux with a complete KVM; auto: kvm where it can."),
    ] = "auto"
    kernel: Kernel
    disks: Annotated[list[Disk], Meta(max_length=MAX_DISKS)] = []
    nets: Annotated[list[Net], Meta(max_length=MAX_NICS)] = []
    consoles: list[Console] = []
    uart: Annotated[bool, Meta(description="Give the machine a serial port (ttyS0) even if no console asks.")] = True
    qmp: Annotated[
        list[str], Meta(description="More QMP sockets: unix:PATH or tcp:HOST:PORT (the VM's own is always there).")
    ] = []
    on_reboot: Annotated[
        Literal["reset", "exit"], Meta(description="What the guest's reboot does: boot again, or end the VM.")
    ] = "reset"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="Of all the VM's processes.")
    ] = "info"


def schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of machine.yaml."""
    shapes: dict[type, dict[str, Any]] = {
        Size: {"type": ["integer", "string"], "pattern": r"^[0-9]+\s*[BKMGTbkmgt]?(i?[Bb])?$", "minimum": 0},
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


def decode(kind: type, value: object) -> object:
    """msgspec's hook for the types above."""
    return parse_size(value) if kind is Size else parse_mac(value)


def shown(value: object) -> str:
    """A YAML value as its writer would recognise it."""
    if isinstance(value, str):
        return f"'{value}'"
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "a mapping"
    return "nothing" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
