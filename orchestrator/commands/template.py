"""vmmctl template: look at templates, check them, remove them."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motorcade.orchestrator.commands.common import size, table, tell
from motorcade.orchestrator.errors import EXIT_ERROR, EXIT_NOT_FOUND, EXIT_OK, UserError

if TYPE_CHECKING:
    from motorcade.orchestrator.restore import Plan
    from motorcade.proto.template import Template

_CONTENT = re.compile(r"memory|state|working-set(\.[0-9]+\.part)?|disk-[-_.A-Za-z0-9]+\.(raw|overlay)")
_STEP = 1024  # chunks between two looks at the clock: 64 MiB
_SHOW = 1.0  # seconds after which progress is shown

_EPILOG = """\
examples:
  vmmctl template ls /templates
  vmmctl template inspect /templates/web
  vmmctl template verify /templates/web     read all of it, and of what it builds on
  vmmctl template rm /templates/web

exit status: 0 it did its work, and all is well; 1 an error, or a damaged template; 3 no such template.
"""


def add_parser(commands: Any) -> None:
    """Adds ``template`` with its own commands."""
    p = commands.add_parser(
        "template",
        help="frozen machines: ls, inspect, verify, rm",
        description="Look at the templates that `vmmctl snapshot` makes, check them, remove them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub = p.add_subparsers(dest="template_command", metavar="COMMAND", required=True)
    ls = sub.add_parser("ls", help="list them", description="List templates, or those in folders.")
    ls.add_argument("dirs", metavar="DIR", nargs="*", type=Path, help="a template or a folder of them (default: .)")
    ls.add_argument("--json", action="store_true", help="for programs")
    ls.set_defaults(run=run_ls)
    inspect = sub.add_parser("inspect", help="what is in one", description="Say what a template holds.")
    inspect.add_argument("dir", metavar="DIR", type=Path)
    inspect.add_argument("--json", action="store_true", help="everything, for programs")
    inspect.set_defaults(run=run_inspect)
    verify = sub.add_parser(
        "verify",
        help="read all of one",
        description="Read a template and what it builds on, and compare all memory with its checksums. Disks are "
        "recognised as a restore recognises them: by size, time and samples.",
    )
    verify.add_argument("dir", metavar="DIR", type=Path)
    verify.set_defaults(run=run_verify)
    rm = sub.add_parser(
        "rm", help="remove one", description="Remove a template. Clones that run keep what they have open."
    )
    rm.add_argument("dir", metavar="DIR", type=Path)
    rm.add_argument("--force", action="store_true", help="even if templates beside it are based on it")
    rm.set_defaults(run=run_rm)


@dataclass(frozen=True)
class Found:
    """A template as it lies there. Sizes in bytes."""

    path: Path
    template: Template
    identity: bytes
    made: float  # seconds since the epoch, by the file system: a template itself has no date

    @property
    def machine(self) -> dict[str, Any]:
        """The description; nothing where it is none."""
        try:
            value = json.loads(self.template.description)
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    @property
    def devices(self) -> list[str]:
        """Their ids."""
        parts = [part for section in ("disks", "nets", "consoles") for part in self.machine.get(section) or []]
        return [str(part.get("id", "?")) for part in parts if isinstance(part, dict)]

    @property
    def allocated(self) -> int:
        """What it takes on the disk."""
        return sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in os.scandir(self.path))


def find(path: Path) -> Found:
    """The template in ``path``. Errors: UserError."""
    from motorcade.proto import template

    folder = path.absolute()
    state = folder / "state"
    try:
        fd = os.open(state, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: not a template: there is no state in it", EXIT_NOT_FOUND) from None
    try:
        return Found(folder, template.read(fd), template.identity(fd), os.fstat(fd).st_mtime)
    except template.TemplateError as e:
        raise UserError(f"{state}: {e}") from None
    finally:
        os.close(fd)


def is_template(folder: Path) -> bool:
    """Whether ``folder`` has a state file, of any version and in whatever condition."""
    from motorcade.proto.template import MAGIC

    try:
        with (folder / "state").open("rb") as f:
            return f.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


# ls


def run_ls(args: argparse.Namespace) -> int:
    """One line a template; those that cannot be read are told apart."""
    found: list[tuple[str, Found]] = []
    status = EXIT_OK
    for name, folder in _listed(args.dirs or [Path()]):
        try:
            found.append((name, find(folder)))
        except UserError as e:
            tell(str(e))
            status = EXIT_ERROR
    if args.json:
        print(json.dumps([_summary(one) for _, one in found], indent=1))
        return status
    rows = [["NAME", "SIZE", "RAM", "DATE", "DEVICES", "BASE"]]
    for name, one in found:
        base = _base(one)
        row = [name, _about(one.allocated), size(one.template.memory_size), _date(one.made)]
        rows.append([*row, ",".join(one.devices) or "-", base])
    table(rows)
    return status


def _listed(dirs: list[Path]) -> Iterator[tuple[str, Path]]:
    """What to call each template, and where it is."""
    for path in dirs:
        if is_template(path):
            yield str(path), path
            continue
        try:
            inside = sorted(path.iterdir())
        except NotADirectoryError:
            raise UserError(f"{path}: neither a template nor a folder", EXIT_NOT_FOUND) from None
        for folder in inside:
            # One that is being written has its state last, and another name until then.
            if folder.suffix != ".part" and is_template(folder):
                yield str(folder) if len(dirs) > 1 else folder.name, folder


def _base(one: Found) -> str:
    from motorcade.orchestrator import restore

    if not one.template.parents:
        return "-"
    parent = one.template.parents[0]
    try:
        place = restore.parent_folder(one.path, parent)
    except (UserError, OSError):
        return f"{parent.path} (missing)"
    return place.name if place.parent == one.path.parent else str(place)


def _summary(one: Found) -> dict[str, Any]:
    return {
        "path": str(one.path),
        "made": one.made,
        "allocated": one.allocated,
        "memory": one.template.memory_size,
        "name": one.machine.get("name"),
        "devices": one.devices,
        "parents": [{"path": p.path, "identity": p.identity.hex()} for p in one.template.parents],
        "identity": one.identity.hex(),
    }


# inspect


def run_inspect(args: argparse.Namespace) -> int:
    """All about one."""
    from motorcade.core.snapshot import cpu
    from motorcade.proto.template import CHUNK, VERSION

    one = find(args.dir)
    t = one.template
    counts = [t.layers.count(layer) for layer in range(len(t.parents) + 2)]
    if args.json:
        more = {
            "format": VERSION,
            "machine": one.machine,
            "cpu": {
                "model": cpu.model(t.cpu),
                "features": cpu.features(t.cpu),
                "msrs": list(t.cpu.msrs),
                "xsave_size": t.cpu.xsave_size,
            },
            "chunks": {"size": CHUNK, "zero": counts[0], "layers": counts[1:]} if t.has_memory else None,
            "disks": _disks(one),
            "components": [{"name": c.name, "version": c.version, "size": len(c.data)} for c in t.components],
        }
        print(json.dumps({**_summary(one), **more}, indent=1))
        return EXIT_OK
    rows = [
        ["path", str(one.path)],
        ["made", _date(one.made)],
        ["identity", one.identity.hex()],
        ["machine", f"{one.machine.get('name', '?')}: {one.machine.get('cpus', '?')} CPUs, {size(t.memory_size)}"],
        ["processor", f"{cpu.model(t.cpu)}, {len(t.cpu.msrs)} MSRs"],
    ]
    if t.has_memory:
        rows.append(["memory", f"{_about(counts[1] * CHUNK)} here, {_about(counts[0] * CHUNK)} zero"])
        rows += [
            ["" if n else "base", f"{parent.path}: {_about(counts[n + 2] * CHUNK)}"]
            for n, parent in enumerate(t.parents)
        ]
    else:
        rows.append(["memory", "none of it is here"])
    for disk in _disks(one):
        files = ", ".join(str(file.get("path")) for file in disk.get("files", []))
        rows.append([f"disk {disk.get('id')}", f"{_about(int(disk.get('size', 0)))}: {files}"])
    rows.append(["components", ", ".join(f"{c.name} v{c.version}" for c in t.components)])
    table(rows)
    return EXIT_OK


def _disks(one: Found) -> list[dict[str, Any]]:
    try:
        value = json.loads(one.template.disks)
    except ValueError:
        return []
    return [disk for disk in value if isinstance(disk, dict)] if isinstance(value, list) else []


# verify


def run_verify(args: argparse.Namespace) -> int:
    """Says what is wrong, a line each, or that nothing is."""
    from motorcade.orchestrator import restore

    one = find(args.dir)
    plan = restore.read(args.dir)
    problems = [*_verify_memory(one, plan), *_verify_disks(plan)]
    if problems:
        raise UserError("\n".join(problems))
    parts = [f"{size(one.template.memory_size)} of memory", _count(len(plan.disks), "disk")]
    if below := len(plan.memory) - 1:
        parts.append(f"{_count(below, 'template')} below it")
    print(f"{one.path}: whole ({', '.join(parts)})")
    return EXIT_OK


def _verify_memory(one: Found, plan: Plan) -> Iterator[str]:
    from motorcade.core.snapshot import ram
    from motorcade.proto.template import CHUNK

    t = one.template
    fds: list[int] = []
    damaged: dict[int, list[int]] = {}  # layer to chunks
    progress = _Progress()
    try:
        for path in plan.memory:
            fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            if (length := os.fstat(fds[-1]).st_size) != t.memory_size:
                yield f"{path} has {length} bytes, the machine's memory has {t.memory_size}"
        for start in range(0, len(t.layers), _STEP):
            end = min(start + _STEP, len(t.layers))
            at = start
            while (bad := ram.verify(t, tuple(fds), at, end)) is not None:
                damaged.setdefault(t.layers[bad], []).append(bad)
                at = bad + 1
            progress.show(end * CHUNK, len(t.layers) * CHUNK)
    finally:
        progress.end()
        for fd in fds:
            os.close(fd)
    for layer, chunks in sorted(damaged.items()):
        count = f"{_count(len(chunks), 'chunk')} of 64 KiB damaged or missing"
        yield f"{plan.memory[layer - 1]}: {count}, from offset {chunks[0] * CHUNK:#x} on"


def _verify_disks(plan: Plan) -> Iterator[str]:
    from motorcade.orchestrator.frozendisks import Restored, check_file
    from motorcade.sidecars.blk.overlay import OverlayError

    for disk in plan.disks:
        for file in disk.files:
            path = Restored(str(plan.path), disk).path(file)
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as e:
                yield f"disk {disk.id}: {path}: {e.strerror}"
                continue
            try:
                check_file(fd, path, file)
            except (UserError, OverlayError) as e:
                yield f"disk {disk.id}: {e}"
            finally:
                os.close(fd)


class _Progress:
    """One line on a terminal's stderr, when it takes long."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.shown = False

    def show(self, done: int, total: int) -> None:
        """In bytes."""
        if sys.stderr.isatty() and time.monotonic() - self.start >= _SHOW:
            print(f"\r\x1b[K{done >> 20} of {total >> 20} MiB", end="", file=sys.stderr, flush=True)
            self.shown = True

    def end(self) -> None:
        """Clears the line."""
        if self.shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


# rm


def run_rm(args: argparse.Namespace) -> int:
    """Removes what is a template and nothing else."""
    folder = args.dir.absolute()
    try:
        mode = folder.lstat().st_mode
    except FileNotFoundError:
        raise UserError(f"{folder}: no such template", EXIT_NOT_FOUND) from None
    if not stat.S_ISDIR(mode):
        raise UserError(f"{folder}: not a directory")
    if not is_template(folder):
        raise UserError(f"{folder}: not a template: it stays")
    if other := sorted(e.name for e in folder.iterdir() if not (_CONTENT.fullmatch(e.name) and _is_file(e))):
        raise UserError(f"{folder}: it has {other[0]} in it, which is no part of a template: it stays")
    if not args.force and (names := [path.name for path in _based_on(folder)]):
        raise UserError(
            f"{folder}: {', '.join(names)} {'is' if len(names) == 1 else 'are'} based on it (--force removes it)"
        )
    # It disappears at once, as it appeared; what is left of this process, if it is killed now, the next snapshot to
    # the same place takes for what a killed snapshot left, and removes (orchestrator/templates.py).
    going = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    folder.rename(going)
    for path in going.glob("working-set*"):
        path.unlink()
    shutil.rmtree(going)
    return EXIT_OK


def _is_file(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)


def _based_on(folder: Path) -> Iterator[Path]:
    """Templates beside ``folder`` that cannot be restored without it."""
    from motorcade.proto import template

    with (folder / "state").open("rb") as f:
        identity = template.identity(f.fileno())
    for other in sorted(folder.parent.iterdir()):
        if other == folder or not is_template(other):
            continue
        try:
            parents = find(other).template.parents
        except UserError as e:
            tell(f"{e}: whether it is based on {folder.name} is not known")
            continue
        if any(parent.identity == identity for parent in parents):
            yield other


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _about(n: int) -> str:
    """Bytes for a person: 1.4G."""
    value = float(n)
    for unit in ("", "K", "M", "G"):
        if value < 1000:
            return f"{value:.0f}{unit}" if value >= 10 or value == int(value) else f"{value:.1f}{unit}"
        value /= 1024
    return f"{value:.1f}T"


def _date(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(when))
