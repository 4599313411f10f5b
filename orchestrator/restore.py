"""From a template to a machine: what vmmctl reads of it, and what the supervisor gets to know.

The core has the last word on whether the machine and the template fit; here it is said before anything has started,
and in words of machine.yaml.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from msgspec import structs

from motorcade.orchestrator.commands.common import size
from motorcade.orchestrator.config import Source
from motorcade.orchestrator.config import machine_of_template as _machine
from motorcade.orchestrator.errors import EXIT_USAGE, UserError
from motorcade.orchestrator.frozendisks import FrozenDisk, Incoming, Restored, decode
from motorcade.orchestrator.machine import ID_PATTERN, Console, Disk, Kit, Machine, Net
from motorcade.orchestrator.yamlpos import Document
from motorcade.orchestrator.yamlpos import Path as FieldPath

GENERATION_ID = 16  # bytes


@dataclass(frozen=True)
class Plan:
    """A template as read. Paths are absolute."""

    path: Path
    machine: Machine
    source: Source  # for messages about ``machine``
    memory: list[Path]  # none: a state that leaves it in its memory_file
    disks: list[FrozenDisk]
    start: int = 0  # bytes: where memory begins in the first


def read(path: str | os.PathLike[str]) -> Plan:
    """Reads the template in the directory ``path``, or the state in the file. Errors: UserError, which names it."""
    from motorcade.proto import template

    folder = Path(path).absolute()
    if folder.is_file():
        fd = open_state(folder)
        try:
            return of_state(fd, folder)
        finally:
            os.close(fd)
    state = folder / "state"
    try:
        fd = os.open(state, os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = template.read(fd)
        finally:
            os.close(fd)
        if not found.has_memory:
            raise UserError(f"{folder}: it has no memory, only the state of a machine")
        memory = [folder / "memory"] + [parent_folder(folder, parent) / "memory" for parent in found.parents]
        for file in memory:
            file.stat()
        machine, source = _machine(found.description, state)
        machine.memory_file, machine.memory_share = None, True  # where its memory was; now it is here
        disks = decode(found.disks)
        if [disk.id for disk in disks] != [disk.id for disk in machine.disks]:
            raise UserError("its machine and what it says of its disks do not agree")
    except template.TemplateError as e:
        raise UserError(f"{state}: {e}") from None
    except OSError as e:
        if isinstance(e, FileNotFoundError) and e.filename == str(state):
            what = f"not a template: there is no {state.name} in it" if folder.is_dir() else "no such directory"
            raise UserError(f"{folder}: {what}") from None
        raise UserError(f"{e.filename or folder}: {e.strerror}") from None
    except UserError as e:
        text = str(e)
        raise UserError(text if text.startswith(str(folder)) else f"{folder}: {text}", e.status) from None
    return Plan(folder, machine, source, memory, disks)


def open_state(path: Path) -> int:
    """The file of a state, the caller's. Errors: UserError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO does not make us wait
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UserError(f"{path}: not a file")
    return fd


def of_state(fd: int, path: Path) -> Plan:
    """What a state without memory says, whose file is ``fd``, the caller's. ``path``: where it is, for messages.

    Errors: UserError.
    """
    from motorcade.orchestrator import savefile
    from motorcade.proto import template

    try:
        if savefile.is_one(fd):
            raise UserError(f"{path}: a checkpoint; vmmctl restore goes on from it")
        found = template.read(fd)
    except template.TemplateError as e:
        raise UserError(f"{path}: {e}") from None
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    if found.has_memory:
        raise UserError(f"{path}: the state of a template; what is restored is its directory")
    machine, source = _machine(found.description, path)
    return Plan(path, machine, source, [], [])


def uri_path(uri: str) -> Path:
    """The path of ``file:PATH``, absolute. Errors: UserError."""
    kind, _, rest = uri.partition(":")
    if kind != "file" or not rest:
        raise UserError(f"{uri}: a template is named by file:DIR, a state without memory by file:PATH")
    return Path(rest).absolute()


def _memory(machine: Machine, plan: Plan) -> list[str]:
    """The files that ``machine``'s memory is filled from. Errors: UserError."""
    if plan.memory:
        if machine.memory_file is not None:
            raise UserError(f"{plan.path} has the machine's memory; memory_file is for a state that has none")
        return [str(path) for path in plan.memory]
    if machine.memory_file is None:
        raise UserError(f"{plan.path} has no memory, and there is no memory_file to say where that is")
    return [] if machine.memory_share else [machine.memory_file]


def parent_folder(folder: Path, parent: object) -> Path:
    """Where a template is that ``folder`` builds on: at its recorded place; or beside ``folder``, both moved.

    Errors: UserError without the template's name; OSError.
    """
    from motorcade.proto import template

    assert isinstance(parent, template.Parent)
    recorded = Path(parent.path)
    found = ""
    for place in (recorded, folder.with_name(recorded.name)):
        try:
            fd = os.open(place / "state", os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            continue
        try:
            if template.identity(fd) == parent.identity:
                return place
            found = f"{place} is another one now"
        finally:
            os.close(fd)
    raise UserError(f"it builds on the template {recorded}, {'but ' + found if found else 'which is missing'}")


def check(machine: Machine, source: Source, plan: Plan) -> None:
    """Whether the machine of a machine.yaml is the template's. Errors: ConfigError, every difference with its place."""
    recorded = plan.machine

    def same(path: FieldPath, here: object, there: object) -> None:
        if here != there:
            source.problem(path, f"{here}, but the template {plan.path} was made with {there}")

    same(("cpus",), machine.cpus, recorded.cpus)
    same(("memory",), size(machine.memory), size(recorded.memory))
    for section, kind in (("disks", "disk"), ("nets", "net"), ("consoles", "console"), ("devices", "device")):
        ours, theirs = getattr(machine, section), getattr(recorded, section)
        ids, recorded_ids = [part.id for part in ours], [part.id for part in theirs]
        if ids != recorded_ids:
            there = ", ".join(recorded_ids) or "none"
            source.problem((section,), f"{', '.join(ids) or 'none'}, but the template {plan.path} has {kind}s {there}")
            continue
        for i, (here, there) in enumerate(zip(ours, theirs, strict=True)):
            for name in _FIXED[type(here)]:
                same((section, i, name), getattr(here, name), getattr(there, name))
    for i, disk in enumerate(machine.disks):
        _check_rebound(disk, i, source, plan)
    source.raise_problems()


# What the guest knows of a device: it cannot be another one when it goes on.
_FIXED: dict[type, tuple[str, ...]] = {
    Disk: ("readonly", "queues", "discard"),
    Net: ("queues", "mtu"),
    Console: ("type",),
    Kit: ("kind",),
}


def _check_rebound(disk: Disk, i: int, source: Source, plan: Plan) -> None:
    frozen = next((f for f in plan.disks if f.id == disk.id), None)
    if frozen is None or not _is_rebound(disk, plan):
        return
    try:
        fd = os.open(disk.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        source.problem(("disks", i, "path"), f"{disk.path}: {e.strerror}")
        return
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)
    if size != frozen.size:
        source.problem(("disks", i, "path"), f"{disk.path} has {size} bytes, the template's disk has {frozen.size}")


def _is_rebound(disk: Disk, plan: Plan) -> bool:
    """Another image than the one that the template froze."""
    recorded = next((d for d in plan.machine.disks if d.id == disk.id), None)
    return recorded is not None and disk.path != recorded.path


def renamed(machine: Machine, *, name: str | None = None, accel: str | None = None) -> Machine:
    """``machine`` under another name, or somewhere else. Errors: UserError."""
    changes = {key: value for key, value in (("name", name), ("accel", accel)) if value is not None}
    if name is not None and not re.fullmatch(ID_PATTERN, name):
        raise UserError(
            f"'{name}': letters, digits, - _ and . only, at most 31, the first a letter or digit", EXIT_USAGE
        )
    return structs.replace(machine, **changes)


def incoming(machine: Machine, plan: Plan, *, generation_id: bytes, overlays: Path | None = None) -> Incoming:
    """What ``machine`` (the template's own, or one that ``check`` has passed) needs of the template.

    ``overlays``: a folder for overlays that stay, NAME-ID.overlay each. Errors: UserError.
    """
    recorded = {disk.id: disk for disk in plan.machine.disks}
    frozen = {disk.id: disk for disk in plan.disks}
    disks = []
    for disk in machine.disks:
        if _is_rebound(disk, plan) or disk.id not in frozen:
            continue
        # The overlay that the template was made with is frozen, and lies beneath; another one is a wish.
        overlay = str(disk.overlay) if disk.overlay and disk.overlay != recorded[disk.id].overlay else None
        if overlays is not None and overlay is None and not disk.readonly:
            overlay = str(overlays / f"{machine.name}-{disk.id}.overlay")
        disks.append(Restored(str(plan.path), frozen[disk.id], overlay))
    return Incoming(str(plan.path), _memory(machine, plan), disks, generation_id, plan.start)


def named_later(machine: Machine, config: str, plan: Plan) -> Incoming:
    """What a ``machine`` that runs already, from the machine.yaml ``config``, needs of ``plan``: its disks it has.

    Errors: UserError."""
    check(machine, Source(Path(config), Document(None, {})), plan)
    return Incoming(str(plan.path), _memory(machine, plan), start=plan.start)
