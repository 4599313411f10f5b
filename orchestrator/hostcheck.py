"""What machine.yaml asks of this host: the checks that need its files and its size. All problems at once."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from motorcade.orchestrator import memoryfile
from motorcade.orchestrator.config import Source
from motorcade.orchestrator.frozendisks import Incoming
from motorcade.orchestrator.machine import Disk, Machine, To
from motorcade.orchestrator.yamlpos import Path as FieldPath

SECTOR = 512  # bytes (virtio 1.2, 5.2.4)


def check(machine: Machine, source: Source, incoming: Incoming | None = None) -> None:
    """Errors: ConfigError, naming the place in machine.yaml. Nothing is opened or locked here. ``incoming``: the
    machine is restored; frozen disks are looked at when they are opened, and the kernel is in memory already."""
    total = host_memory()
    if machine.memory > total:
        source.problem(("memory",), f"{machine.memory >> 20}M is more RAM than this host has ({total >> 20}M)")
    if machine.memory_file is not None:
        _check_memory_file(machine, source, machine.memory_file, restored=incoming is not None)
    if incoming is None:
        _check_file(source, ("kernel", "image"), machine.kernel.image)
        if machine.kernel.initrd is not None:
            _check_file(source, ("kernel", "initrd"), machine.kernel.initrd)
    frozen = {restored.disk.id for restored in incoming.disks} if incoming is not None else set()
    writers: dict[tuple[int, int], str] = {}
    readers: dict[tuple[int, int], str] = {}
    for i, disk in enumerate(machine.disks):
        if disk.id not in frozen:
            _check_disk(disk, i, source, writers, readers)
    for i, net in enumerate(machine.nets):
        if net.capture is not None:
            _check_folder(source, ("nets", i, "capture"), net.capture)
        if net.link is not None and not Path(net.link).is_dir():  # the meeting place of the two is made when missing
            _check_folder(source, ("nets", i, "link"), net.link)
    default = len(machine.consoles) - _written(source, "consoles")  # the serial port that nobody wrote down is first
    for i, console in enumerate(machine.consoles):
        if isinstance(console.backend, To):
            key, path = ("socket", console.backend.socket) if console.backend.socket else ("file", console.backend.file)
            _check_folder(source, ("consoles", i - default, "backend", key), path or "")
    for i, address in enumerate(machine.qmp):
        if address.startswith("unix:"):
            _check_folder(source, ("qmp", i), address.removeprefix("unix:"))
    source.raise_problems()


def _check_memory_file(machine: Machine, source: Source, path: str, *, restored: bool) -> None:
    """What is there has the RAM's size; what is not there can be made."""
    if not machine.memory_share and not restored:
        source.problem(("memory_share",), "false is for a machine that goes on from a state (vmmctl up --incoming)")
    if problem := memoryfile.problem(Path(path), int(machine.memory), needed=restored):
        source.problem(("memory_file",), problem)


def host_memory() -> int:
    """Bytes of RAM."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _written(source: Source, section: str) -> int:
    """How many entries of a section stand in the file; the default console stands in none."""
    data = source.document.data
    entries = data.get(section, []) if isinstance(data, dict) else []
    return len(entries) if isinstance(entries, list) else 0


def _check_file(source: Source, at: FieldPath, path: str) -> os.stat_result | None:
    """A regular file that can be read."""
    try:
        info = Path(path).stat()
    except OSError as e:
        source.problem(at, f"no such file: {path}" if isinstance(e, FileNotFoundError) else f"{path}: {e.strerror}")
        return None
    if not stat.S_ISREG(info.st_mode):
        source.problem(at, f"not a file: {path}")
    elif not os.access(path, os.R_OK):
        source.problem(at, f"not permitted to read {path}")
    elif info.st_size == 0:
        source.problem(at, f"empty file: {path}")
    return info


def _check_folder(source: Source, at: FieldPath, path: str) -> None:
    """A file that will be made: its folder must be there."""
    folder = Path(path).parent
    if not folder.is_dir():
        source.problem(at, f"no such folder: {folder}")
    elif Path(path).is_dir():
        source.problem(at, f"a folder, not a file: {path}")


def _check_disk(
    disk: Disk, i: int, source: Source, writers: dict[tuple[int, int], str], readers: dict[tuple[int, int], str]
) -> None:
    at: FieldPath = ("disks", i, "path")
    try:
        info = Path(disk.path).stat()
    except OSError as e:
        missing = isinstance(e, FileNotFoundError)
        source.problem(at, f"no such file: {disk.path}" if missing else f"{disk.path}: {e.strerror}")
        return
    writes = not (disk.readonly or disk.overlay)
    if not (stat.S_ISREG(info.st_mode) or stat.S_ISBLK(info.st_mode)):
        source.problem(at, f"neither a file nor a block device: {disk.path}")
        return
    if not os.access(disk.path, os.R_OK | (os.W_OK if writes else 0)):
        hint = " (readonly: true or an overlay would do without writing)" if os.access(disk.path, os.R_OK) else ""
        source.problem(at, f"not permitted to {'write' if hint else 'read'} {disk.path}{hint}")
    if stat.S_ISREG(info.st_mode) and (info.st_size == 0 or info.st_size % SECTOR):
        source.problem(at, f"{disk.path} has {info.st_size} bytes, not a whole number of {SECTOR}-byte sectors")
    if disk.overlay:
        _check_folder(source, ("disks", i, "overlay"), str(disk.overlay))
    for k, layer in enumerate(disk.layers):
        _check_file(source, ("disks", i, "layers", k), layer)
    # The same image under two names is the same image. Several readers are fine, a writer wants it alone.
    key = (0, info.st_rdev) if stat.S_ISBLK(info.st_mode) else (info.st_dev, info.st_ino)
    taken = writers.get(key) or (readers.get(key) if writes else None)
    if taken:
        source.problem(at, f"the same image as {taken}, and one of them writes to it")
    (writers if writes else readers).setdefault(key, source.called(("disks", i)))
