"""Reading machine.yaml. Its reference for users is docs/machine-yaml.md, its types are in machine.py.

``load`` turns a file into a ``Machine``, or raises ``ConfigError`` with every problem that it found, each naming
file, line, column and field. What depends on the host (files, RAM, other VMs) is checked in hostcheck.py.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import sys
import uuid as uuid_module
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from motorcade.orchestrator import yamlpos
from motorcade.orchestrator.errors import EXIT_USAGE, UserError
from motorcade.orchestrator.machine import (
    MAX_KITS,
    MAX_VIRTIO_CONSOLES,
    Console,
    Disk,
    Kit,
    Machine,
    Net,
    To,
    decode,
    shown,
    stable_mac,
)

MAX_OPTIONS = 16 << 10  # bytes of JSON (KitBoot)
PAGER_ID = "pager"  # on the control plane (proto/messages.py)
_UUID_SPACE = uuid_module.UUID("7b0c6d5e-52a6-5f0b-9b35-6d6f746f7263")  # our own, for UUIDs made from names
_FORWARD = re.compile(r"(?:(tcp|udp):)?(?:([0-9.]+|\[[0-9a-fA-F:]+\]):)?([0-9]{1,5}):([0-9]{1,5})")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and where."""

    where: str  # FILE:LINE:COLUMN
    field: str  # disks[1].path; empty: the file as a whole
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.field + ': ' if self.field else ''}{self.message}"


class ConfigError(UserError):
    """machine.yaml is wrong. ``str()`` is one line a problem."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)), EXIT_USAGE)
        self.problems = problems


class Source:
    """A machine.yaml as written: names places in it for messages, and collects problems."""

    def __init__(self, path: Path, document: yamlpos.Document) -> None:
        self.path = path
        self.document = document
        self.problems: list[Problem] = []

    @property
    def name(self) -> str:
        """Where the machine is described, for people."""
        return str(self.path.absolute())

    another_name = "--name starts another from the same file"
    """How to start a second one beside a VM that has the machine's name."""

    def called(self, path: yamlpos.Path) -> str:
        """What the value at ``path`` is to whoever wrote it."""
        return field_name(path)

    def problem(self, path: yamlpos.Path, message: str) -> None:
        """Notes that the value at ``path`` is wrong."""
        at = self.document.position(path)
        self.problems.append(Problem(f"{self.path}:{at.line}:{at.column}", field_name(path), message))

    def raise_problems(self) -> None:
        """Raises ConfigError if anything was noted."""
        if self.problems:
            raise ConfigError(sorted(self.problems, key=lambda p: [int(n) for n in p.where.rsplit(":", 2)[1:]]))


def field_name(path: yamlpos.Path) -> str:
    """``("disks", 1, "path")`` as ``disks[1].path``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def load(path: str | os.PathLike[str], *, name: str | None = None, accel: str | None = None) -> tuple[Machine, Source]:
    """Reads and validates ``path`` (-: standard input); relative paths in the result are made absolute from its folder.

    ``name`` and ``accel`` replace what the file says. Errors: ConfigError; OSError if the file cannot be read.
    """
    file = Path(path)
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError([Problem(f"{file}:1:1", "", "not UTF-8 text")]) from None
    try:
        document = yamlpos.parse(text)
    except yamlpos.YamlError as e:
        raise ConfigError([Problem(f"{file}:{e.position.line}:{e.position.column}", "", e.message)]) from None
    source = Source(file, document)
    data = document.data
    if isinstance(data, dict):
        if name is not None:
            data["name"] = name
        if accel is not None:
            data["accel"] = accel
    return complete(data, source, file.absolute().parent), source


def complete(data: object, source: Source, folder: Path) -> Machine:
    """The machine that ``data`` describes, whose places ``source`` knows; relative paths start at ``folder``.

    Errors: ConfigError.
    """
    try:
        machine = msgspec.convert(data, Machine, strict=True, dec_hook=decode)
    except msgspec.ValidationError as e:
        where, message = _explain(str(e), data)
        source.problem(where, message)
        raise ConfigError(source.problems) from None
    _check(machine, source)
    source.raise_problems()
    _complete(machine, folder)
    return machine


def machine_of_template(description: str, path: Path) -> tuple[Machine, Source]:
    """The machine that a template in ``path`` describes: what ``load`` gave when it was made. Errors: ConfigError."""
    source = Source(path, yamlpos.Document(None, {}))
    try:
        machine = msgspec.json.decode(description, type=Machine, strict=True, dec_hook=decode)
    except (msgspec.ValidationError, msgspec.DecodeError) as e:
        raise ConfigError([Problem(str(path), "", f"its machine is not one that this program knows: {e}")]) from None
    _check(machine, source)
    source.raise_problems()
    return machine, source


_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "a mapping",
    "null": "nothing",
}


def _explain(error: str, data: object, root: type = Machine) -> tuple[yamlpos.Path, str]:
    """msgspec's message as a path and words for a person who has never heard of msgspec. ``root``: what ``data`` was to
    be."""
    message, _, at = error.partition(" - at `$")
    path: yamlpos.Path = tuple(int(i) if i else k for i, k in re.findall(r"\[(\d+)\]|\.([^.\[`]+)", at))
    value = data
    for part in path:
        value = value[part]  # type: ignore[index]  # msgspec has walked this path before us
    if match := re.fullmatch(r"Object contains unknown field `(.*)`", message, re.DOTALL):
        known = _fields_at(path, root)
        close = difflib.get_close_matches(match[1], known, 1)
        hint = f"; did you mean '{close[0]}'?" if close else f" (there are: {', '.join(known)})"
        return (*path, match[1]), f"unknown key{hint}"
    if match := re.fullmatch(r"Object missing required field `(.*)`", message):
        return path, f"'{match[1]}' is missing"
    if match := re.fullmatch(r"Expected `(.*)`, got `(.*)`", message):
        wanted = " or ".join(_KINDS.get(kind, kind) for kind in match[1].split(" | "))
        hint = ""
        if "str" in match[1].split(" | ") and isinstance(value, bool | int | float):
            hint = ' (put it in "quotes")'
        return path, f"expected {wanted}, got {shown(value)}{hint}"
    if "matching regex '^[A-Za-z0-9]" in message:
        return path, f"{shown(value)}: letters, digits, - _ and . only, at most 31, the first a letter or digit"
    if "matching regex" in message:
        return path, f"{shown(value)}: plain ASCII text only"
    if match := re.fullmatch(r"Expected `(\w+)` (>=|<=) ([\d.]+)", message):
        bound = "small (the least" if match[2] == ">=" else "large (the most"
        return path, f"{shown(value)} is too {bound} is {match[3]})"
    if match := re.fullmatch(r"Expected `(\w+)` of length (>=|<=) (\d+)", message):
        unit = "characters" if match[1] == "str" else "entries"
        return path, f"too {'short (the least' if match[2] == '>=' else 'long (the most'} is {match[3]} {unit})"
    if match := re.fullmatch(r"Invalid enum value (.*)", message):
        return path, f"{shown(value)} is not one of {', '.join(_choices(path, root))}"
    return path, message


def _field_type(path: yamlpos.Path, root: type) -> object:
    """The msgspec type node at ``path`` of a ``root``."""
    from msgspec import inspect

    kind: object = inspect.type_info(root)
    for part in path:
        options = kind.types if isinstance(kind, inspect.UnionType) else (kind,)
        for option in options:
            if isinstance(part, int) and isinstance(option, inspect.ListType):
                kind = option.item_type
                break
            if isinstance(option, inspect.StructType):
                kind = next(f.type for f in option.fields if f.encode_name == part)
                break
        while isinstance(kind, inspect.Metadata):
            kind = kind.type
    return kind


def _fields_at(path: yamlpos.Path, root: type) -> list[str]:
    from msgspec import inspect

    kind = _field_type(path, root)
    options = kind.types if isinstance(kind, inspect.UnionType) else (kind,)
    return [f.encode_name for option in options if isinstance(option, inspect.StructType) for f in option.fields]


def _choices(path: yamlpos.Path, root: type) -> list[str]:
    from msgspec import inspect

    kind = _field_type(path, root)
    options = kind.types if isinstance(kind, inspect.UnionType) else (kind,)
    words = [str(v) for option in options if isinstance(option, inspect.LiteralType) for v in option.values]
    return words + [f"{{{name}: PATH}}" for name in (_fields_at(path, root) if len(options) > 1 else [])]


def _check(machine: Machine, source: Source) -> None:
    """What types alone cannot say, and the host does not matter for."""
    if machine.memory < 1 << 20 or machine.memory % 4096:
        source.problem(("memory",), "RAM must be at least 1M and a multiple of 4096 bytes")
    if machine.memory_file == "":
        source.problem(("memory_file",), "empty")
    if not machine.memory_share and machine.memory_file is None:
        source.problem(("memory_share",), "false goes with a memory_file")
    if machine.uuid is not None:
        try:
            uuid_module.UUID(machine.uuid)
        except ValueError:
            source.problem(("uuid",), f"{shown(machine.uuid)} is not a UUID")
    if not machine.kernel.image:
        source.problem(("kernel", "image"), "empty")
    if "\0" in machine.kernel.cmdline or "\n" in machine.kernel.cmdline:
        source.problem(("kernel", "cmdline"), "line breaks and NULs cannot be part of a command line")
    _check_ids(machine, source)
    _check_slots(machine, source)
    for i, disk in enumerate(machine.disks):
        if not disk.path:
            source.problem(("disks", i, "path"), "empty")
        if disk.overlay == "":
            source.problem(("disks", i, "overlay"), "empty")
        if disk.overlay and disk.readonly:
            source.problem(("disks", i, "overlay"), "a read-only disk never writes to its overlay; drop one of the two")
        if disk.layers and not disk.overlay:
            source.problem(("disks", i, "layers"), "layers lie under an overlay; say overlay: true, or its path")
        for k, layer in enumerate(disk.layers):
            if not layer:
                source.problem(("disks", i, "layers", k), "empty")
    for i, net in enumerate(machine.nets):
        _check_net(net, ("nets", i), source)
    _check_consoles(machine, source)
    for i, kit in enumerate(machine.devices):
        _check_kit(kit, ("devices", i), source)
    if machine.the_balloon is not None and len(machine.devices) >= MAX_KITS:
        source.problem(("balloon",), f"there is room for {MAX_KITS} devices of this sort, and `devices` has them all")
    for i, address in enumerate(machine.qmp):
        if problem := qmp_address_problem(address):
            source.problem(("qmp", i), problem)
    if machine.limits is not None and (most := machine.limits.memory) is not None and most < machine.memory:
        ram = f"{machine.memory >> 20}M"
        source.problem(("limits", "memory"), f"{most >> 20}M is less than the RAM ({ram}), which counts as theirs")
    if machine.metrics is not None and (problem := metrics_address_problem(machine.metrics)):
        source.problem(("metrics",), problem)


def _check_ids(machine: Machine, source: Source) -> None:
    first: dict[str, str] = {}
    macs: dict[bytes, str] = {}
    for path, part in devices(machine):
        if part.id == PAGER_ID:
            source.problem(
                (*path, "id"), f"'{PAGER_ID}' is what fills the memory of a restored machine; choose another"
            )
        if part.id in first:
            source.problem((*path, "id"), f"'{part.id}' is already the id of {first[part.id]}")
        first.setdefault(part.id, source.called(path))
        if isinstance(part, Net):
            mac = part.mac or stable_mac(machine.name, part.id)
            if mac in macs:
                source.problem((*path, "mac"), f"{mac} is already the address of {macs[mac]}")
            macs.setdefault(mac, source.called(path))


def _check_slots(machine: Machine, source: Source) -> None:
    for section in ("disks", "nets"):
        first: dict[int, str] = {}
        for i, part in enumerate(getattr(machine, section)):
            if part.slot in first:
                source.problem((section, i, "slot"), f"{part.slot} is already the slot of {first[part.slot]}")
            if part.slot is not None:
                first.setdefault(part.slot, field_name((section, i)))


def devices(machine: Machine) -> Iterator[tuple[yamlpos.Path, Disk | Net | Console | Kit]]:
    """Every device with its place in machine.yaml."""
    for section in ("disks", "nets", "consoles", "devices"):
        for i, part in enumerate(getattr(machine, section)):
            yield (section, i), part
    if machine.the_balloon is not None:
        yield ("balloon",), machine.the_balloon.kit


def _check_net(net: Net, path: yamlpos.Path, source: Source) -> None:
    given = {"tap": net.tap is not None, "user": net.user, "link": net.link is not None, "unplugged": net.unplugged}
    chosen = [k for k, on in given.items() if on]
    if len(chosen) != 1:
        source.problem(path, f"give exactly one of tap, user, link and unplugged, not {' and '.join(chosen) or 'none'}")
    if net.tap is not None and ("/" in net.tap or any(c.isspace() for c in net.tap)):
        source.problem((*path, "tap"), f"{shown(net.tap)} is not the name of an interface")
    if net.queues > 1 and net.tap is None and not net.unplugged:
        source.problem((*path, "queues"), "only a tap has several queue pairs")
    if net.forward and not net.user:
        source.problem((*path, "forward"), "only 'user' networking forwards ports")
    for i, rule in enumerate(net.forward):
        match = _FORWARD.fullmatch(rule)
        if not match or not all(0 < int(port) < 65536 for port in match.groups()[2:]):
            source.problem((*path, "forward", i), f"{shown(rule)} is not [udp:][ADDRESS:]HOSTPORT:GUESTPORT")


def _check_consoles(machine: Machine, source: Source) -> None:
    uarts = [i for i, c in enumerate(machine.consoles) if c.type == "uart"]
    for i in uarts[1:]:
        source.problem(("consoles", i, "type"), "the machine has one uart; use type: virtio for more consoles")
    if uarts and not machine.uart:
        source.problem(("uart",), f"false, but consoles[{uarts[0]}] is a uart")
    if len(machine.consoles) - len(uarts) > MAX_VIRTIO_CONSOLES:
        source.problem(("consoles",), f"at most {MAX_VIRTIO_CONSOLES} virtio consoles")
    taken = {path[0] for path, part in devices(machine) if part.id == "ttyS0"} if not uarts and machine.uart else set()
    for section in sorted(map(str, taken)):
        source.problem((section,), "the id ttyS0 is the serial port's; choose another (or set uart: false)")
    terminals = [i for i, c in enumerate(machine.consoles) if c.backend == "terminal"]
    for i in terminals[1:]:
        source.problem(("consoles", i, "backend"), f"consoles[{terminals[0]}] has the terminal already")
    for i, console in enumerate(machine.consoles):
        if isinstance(console.backend, To) and bool(console.backend.socket) == bool(console.backend.file):
            source.problem(("consoles", i, "backend"), "give exactly one of socket and file")
        if console.scrollback > 256 << 20:
            source.problem(("consoles", i, "scrollback"), "at most 256M")


def _check_kit(kit: Kit, path: yamlpos.Path, source: Source) -> None:
    """The kind is installed, and understands its options."""
    from motorcade.sidecars import kinds

    if kit.kind in kinds.ELSEWHERE:
        source.problem((*path, "kind"), f"the {kit.kind} is a key of the machine itself: {kit.kind}: true")
        return
    try:
        options = kinds.find(kit.kind).Options
    except kinds.UnknownKind as e:
        source.problem((*path, "kind"), str(e))
        return
    try:
        # As the sidecar will get them, or nearly: YAML has numbers that JSON has not.
        data = msgspec.json.encode(kit.options)
        decoded = msgspec.json.decode(data, type=options)
    except (OverflowError, TypeError, ValueError) as e:
        if not isinstance(e, msgspec.ValidationError):
            source.problem(path, f"its options cannot be passed on: {e}")
            return
        where, message = _explain(str(e), kit.options, options)
        source.problem((*path, *where), message)
        return
    try:
        for key, message in decoded.problems():
            source.problem((*path, key) if key in kit.options else path, message)
    except Exception as e:  # of somebody else's package
        source.problem(path, f"the kind's own check of its options failed: {type(e).__name__}: {e}")
    if len(data) > MAX_OPTIONS:
        source.problem(path, f"{len(data)} bytes of options are too many (the most is {MAX_OPTIONS})")


def qmp_address_problem(address: str) -> str | None:
    """What is wrong with ``unix:PATH`` or ``tcp:HOST:PORT`` (QEMU's ``,server,nowait`` may follow)."""
    kind, _, rest = address.removesuffix(",server,nowait").partition(":")
    host, _, port = rest.rpartition(":")
    if kind == "unix" and rest:
        return None if len(os.fsencode(rest)) <= 107 else "the path is too long for a unix socket (107 bytes)"
    if kind == "tcp" and host and port.isdecimal() and int(port) < 65536:
        return None
    return f"{shown(address)} is neither unix:PATH nor tcp:HOST:PORT"


def metrics_address_problem(address: str) -> str | None:
    """What is wrong with ``HOST:PORT``, which must be this host's own: there is no password."""
    host, _, port = address.rpartition(":")
    try:
        loopback = ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        loopback = False
    if loopback and port.isdecimal() and 0 < int(port) < 65536:
        return None
    return f"{shown(address)} is not a loopback address and a port, such as 127.0.0.1:9200"


def part(machine: Machine, kind: str, options: dict[str, Any], folder: Path) -> Disk | Net:
    """A disk (``kind`` blk) or a NIC (net) that joins ``machine``, from its keys in machine.yaml; relative paths are
    from ``folder``. Errors: UserError, one line."""
    cls: type[Disk | Net] = Disk if kind == "blk" else Net
    section = "disks" if kind == "blk" else "nets"
    try:
        new: Disk | Net = msgspec.convert(options, cls, strict=True, dec_hook=decode)
    except msgspec.ValidationError as e:
        where, message = _explain(str(e), options, cls)
        raise UserError(f"{field_name(where)}: {message}" if where else message) from None
    parts = [*getattr(machine, section), new]
    source = Source(Path("-"), yamlpos.Document(None, {}))
    _check(msgspec.structs.replace(machine, **{section: parts}), source)
    at = field_name((section, len(parts) - 1))
    if problems := [p for p in source.problems if p.field == at or p.field.startswith(f"{at}.")]:
        field = problems[0].field.removeprefix(at).removeprefix(".")
        raise UserError(f"{field}: {problems[0].message}" if field else problems[0].message)
    if isinstance(new, Disk):
        _complete_disk(new, machine.name, folder)
    else:
        _complete_net(new, machine.name, folder)
    return new


def _complete_disk(disk: Disk, name: str, folder: Path) -> None:
    disk.path = os.path.normpath(folder / disk.path)
    if disk.overlay is True:
        disk.overlay = f"{name}-{disk.id}.overlay"
    if disk.overlay:
        disk.overlay = os.path.normpath(folder / disk.overlay)
    disk.layers = [os.path.normpath(folder / layer) for layer in disk.layers]
    if disk.serial is None:
        disk.serial = disk.id[:20]


def _complete_net(net: Net, name: str, folder: Path) -> None:
    net.mac = net.mac or stable_mac(name, net.id)
    net.link = os.path.normpath(folder / net.link) if net.link is not None else None
    net.capture = os.path.normpath(folder / net.capture) if net.capture is not None else None


def _complete(machine: Machine, folder: Path) -> None:
    """Fills in the defaults that depend on other fields; makes paths absolute."""

    def absolute(path: str) -> str:
        return os.path.normpath(folder / path)

    machine.uuid = str(uuid_module.UUID(machine.uuid) if machine.uuid else uuid_module.uuid5(_UUID_SPACE, machine.name))
    machine.kernel.image = absolute(machine.kernel.image)
    if machine.kernel.initrd is not None:
        machine.kernel.initrd = absolute(machine.kernel.initrd)
    if machine.memory_file is not None:
        machine.memory_file = absolute(machine.memory_file)
    for disk in machine.disks:
        _complete_disk(disk, machine.name, folder)
    for net in machine.nets:
        _complete_net(net, machine.name, folder)
    if machine.uart and all(c.type != "uart" for c in machine.consoles):
        machine.consoles = [Console(id="ttyS0", type="uart"), *machine.consoles]
    for console in machine.consoles:
        if isinstance(console.backend, To):
            console.backend.socket = absolute(console.backend.socket) if console.backend.socket else None
            console.backend.file = absolute(console.backend.file) if console.backend.file else None
    for i, address in enumerate(machine.qmp):
        kind, _, rest = address.removesuffix(",server,nowait").partition(":")
        machine.qmp[i] = f"unix:{absolute(rest)}" if kind == "unix" else f"tcp:{rest}"
