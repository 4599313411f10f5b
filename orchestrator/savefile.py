"""A checkpoint: a whole machine but its disks in one file, which vmmctl save writes and vmmctl restore goes on from.

    0        a line: MOTORCADE CHECKPOINT 1 LENGTH CRC32, then LENGTH bytes of JSON (Header), for people too; zeros
    map      a byte per chunk of memory, whether it is there (1) or zero (0); then 4 bytes per chunk, its CRC-32C
    memory   RAM as it was, page for page; zero pages are holes
    state    a template's state file (proto/template.py) that has no memory of its own

Each part begins at a multiple of 64 KiB; where, the header says. It is written last, so a file that was not finished is
not one. ``memory`` and ``map`` are written by a process of its own (snapshots.py), ``state`` by the core. Disks are
named, not copied; each is what it was, or nobody goes on. Bytes of a file are hostile.
"""

from __future__ import annotations

import dataclasses
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec
from msgspec import structs

from motorcade.orchestrator import frozendisks, templates
from motorcade.orchestrator.errors import UserError

if TYPE_CHECKING:
    from motorcade.orchestrator.frozendisks import FrozenDisk
    from motorcade.orchestrator.machine import Disk, Machine
    from motorcade.orchestrator.restore import Plan
    from motorcade.proto.template import Template

T = TypeVar("T")

MAGIC = b"MOTORCADE CHECKPOINT "
VERSION = 1
_HEADER = 128 << 10  # bytes of room; a machine's description has 16 KiB at most (snapshots.py)
_LINE = re.compile(rb"MOTORCADE CHECKPOINT ([0-9]{1,9}) ([0-9]{1,9}) ([0-9a-f]{8})\n")
_ALIGN = 64 << 10
_STEP = 1024  # chunks that are verified between two looks at the progress


class CheckpointError(UserError):
    """A file that is no checkpoint, is damaged, or is of a format that this program does not know."""


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes and places in bytes."""

    machine: msgspec.Raw  # machine.py's description
    memory_size: int
    map_start: int
    map_crc: int  # CRC-32
    memory_start: int
    state_start: int
    state_size: int


def _up(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where everything is, of a machine with so much memory."""

    memory_size: int

    @property
    def chunks(self) -> int:
        return -(-self.memory_size // _ALIGN)

    @property
    def map_start(self) -> int:
        return _HEADER

    @property
    def memory_start(self) -> int:
        return _HEADER + _up(5 * self.chunks)

    @property
    def state_start(self) -> int:
        return self.memory_start + _up(self.memory_size)


# Writing.


def described(machine: Machine, disks: Sequence[frozendisks.Open]) -> Machine:
    """``machine`` as it goes on by itself: each disk is the files that it really has. Errors: UserError."""
    by_id = {disk.id: disk for disk in disks}
    return structs.replace(machine, disks=[_described(disk, by_id[disk.id]) for disk in machine.disks])


def _described(disk: Disk, opened: frozendisks.Open) -> Disk:
    if opened.unnamed:
        raise UserError(
            f"disk {disk.id}: what it writes goes to a file without a name, and a checkpoint names the disks' files; "
            "a clone that is to be saved wants --keep-overlays, or take a template of it (vmmctl snapshot)"
        )
    paths = [source.path for source in opened.files]
    overlay = opened.written if opened.overlay is not None else False
    return structs.replace(disk, path=paths[0], layers=paths[1:], overlay=overlay)


class SaveFile(templates.File):
    """A checkpoint in the making: descriptor "state", whose offset is where the state belongs."""

    def __init__(self, place: Path, description: str, memory_size: int) -> None:
        """Makes ``PLACE.PID.part``. ``description``: the machine. Errors: TargetError."""
        super().__init__(place)
        self._description = description
        self._layout = _Layout(memory_size)
        os.lseek(self.fds["state"], self._layout.state_start, os.SEEK_SET)

    def write_memory(self, memfd: int) -> None:
        """RAM and its map, for good; blocks. In a process of its own. Errors: TargetError."""
        from motorcade.core.snapshot.ram import RamError, RamWriter

        layout, fd = self._layout, self.fds["state"]
        try:
            writer = RamWriter(memfd, layout.memory_size, fd, start=layout.memory_start)
            try:
                writer.start_all()
                writer.finish()
                _pwrite(fd, writer.layers + writer.sums, layout.map_start)
                writer.start_sync()
                writer.finish()
            finally:
                writer.close()
        except (RamError, OSError) as e:
            why = e.strerror if isinstance(e, OSError) else e
            raise templates.TargetError(f"{self.place}: {why}") from None

    def finish(self, *, keep: bool) -> bool:
        """See Target."""
        if keep:
            try:
                _pwrite(self.fds["state"], self._header(), 0)
            except (OSError, CheckpointError) as e:
                super().finish(keep=False)
                raise templates.TargetError(f"{self.place}: {e.strerror if isinstance(e, OSError) else e}") from None
        return super().finish(keep=keep)

    def _header(self) -> bytes:
        layout, fd = self._layout, self.fds["state"]
        header = Header(
            machine=msgspec.Raw(self._description.encode()),
            memory_size=layout.memory_size,
            map_start=layout.map_start,
            map_crc=zlib.crc32(_pread(fd, 5 * layout.chunks, layout.map_start)),
            memory_start=layout.memory_start,
            state_start=layout.state_start,
            state_size=os.fstat(fd).st_size - layout.state_start,
        )
        text = msgspec.json.encode(header)
        pretty = msgspec.json.format(text, indent=1)
        for body in (pretty, text):
            line = MAGIC + b"%d %d %08x\n" % (VERSION, len(body), zlib.crc32(body))
            if len(line) + len(body) < _HEADER:
                return (line + body + b"\n").ljust(_HEADER, b"\0")
        raise CheckpointError("the machine's description is too long for a checkpoint")


# Reading.


def is_one(fd: int) -> bool:
    """Whether the file ``fd`` begins as a checkpoint."""
    return os.pread(fd, len(MAGIC), 0) == MAGIC


def read(path: Path) -> Plan:
    """What vmmctl restore needs of the checkpoint ``path``, every byte of which is looked at. Errors: UserError."""
    return _reading(path, lambda fd: _plan(path, fd))


def incoming(plan: Plan, generation_id: bytes) -> frozendisks.Incoming:
    """What a machine that goes on from there needs. Its disks are its own, which it opens as any machine does."""
    return frozendisks.Incoming(str(plan.path), [str(plan.path)], generation_id=generation_id, start=plan.start)


def verify(path: Path, progress: Callable[[int, int], None] = lambda _done, _total: None) -> None:
    """Looks at all of the memory. ``progress``: bytes, of how many. Errors: CheckpointError."""

    def look(fd: int) -> None:
        from motorcade.core.snapshot import ram

        header = _header(fd)
        whole = _whole(fd, header)
        count = len(whole.layers)
        for first in range(0, count, _STEP):
            progress(first * _ALIGN, header.memory_size)
            bad = ram.verify(whole, (fd,), first, first + _STEP, start=header.memory_start)
            if bad is not None:
                raise CheckpointError(f"its memory at {bad * _ALIGN:#x} is damaged: its checksum is wrong")
        _check_zeros(fd, header, whole.layers)

    _reading(path, look)


def open_state(path: Path) -> int:
    """A file with the checkpoint's state as a template with memory has it, for the core and the pager; the caller's.

    Errors: CheckpointError.
    """
    from motorcade.proto import template

    state = _reading(path, lambda fd: template.encode(_whole(fd, _header(fd))))
    fd = os.memfd_create("motorcade-state", os.MFD_CLOEXEC)
    try:
        _pwrite(fd, state, 0)
    except OSError as e:
        os.close(fd)
        raise CheckpointError(f"{path}: {e.strerror}") from None
    return fd


def _reading(path: Path, what: Callable[[int], T]) -> T:
    """``what`` of the open file; errors begin with its name."""
    from motorcade.proto.template import TemplateError

    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return what(fd)
        finally:
            os.close(fd)
    except OSError as e:
        raise CheckpointError(f"{path}: {e.strerror}") from None
    except (UserError, TemplateError) as e:
        raise CheckpointError(f"{path}: {e}") from None


def _plan(path: Path, fd: int) -> Plan:
    from motorcade.orchestrator import config, restore

    header = _header(fd)
    whole = _whole(fd, header)
    machine, source = config.machine_of_template(whole.description, path)
    machine.memory_file, machine.memory_share = None, True  # where its memory was; now it is here
    disks = frozendisks.decode(whole.disks)
    if [disk.id for disk in disks] != [disk.id for disk in machine.disks]:
        raise CheckpointError("its machine and what it says of its disks do not agree")
    return restore.Plan(path, machine, source, [path], disks, header.memory_start)


def check_disks(disks: list[FrozenDisk]) -> None:
    """Whether each is what it was when it was saved. Errors: UserError."""
    for disk in disks:
        for file in disk.files:
            try:
                fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as e:
                raise UserError(f"disk {disk.id}: {file.path}: {e.strerror}") from None
            try:
                frozendisks.check_file(fd, file.path, file)
            except UserError as e:
                raise UserError(
                    f"disk {disk.id}: {e}".replace("the template was made", "the machine was saved")
                ) from None
            finally:
                os.close(fd)


def _header(fd: int) -> Header:
    raw = _pread(fd, _HEADER, 0)
    match = _LINE.match(raw)
    if match is None:
        raise CheckpointError("not a checkpoint")
    version, length, crc = int(match[1]), int(match[2]), int(match[3], 16)
    if version > VERSION:
        raise CheckpointError(f"its format is version {version}, newer than this program, which reads up to {VERSION}")
    body = raw[match.end() : match.end() + length]
    if len(raw) < _HEADER:
        raise CheckpointError(f"it is truncated at {len(raw)} bytes, within its header")
    if zlib.crc32(body) != crc or raw[match.end() + length :].strip(b"\0") != b"\n":
        raise CheckpointError("its header is damaged")
    try:
        header = msgspec.json.decode(body, type=Header)
    except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError) as e:
        raise CheckpointError(f"its header is malformed: {e}") from None
    _check(fd, header)
    return header


def _check(fd: int, header: Header) -> None:
    from motorcade.proto.template import MAX_MEMORY

    if not 0 < header.memory_size <= MAX_MEMORY or header.memory_size % 4096:
        raise CheckpointError(f"its header is malformed: {header.memory_size} bytes of memory")
    layout = _Layout(header.memory_size)
    places = (header.map_start, header.memory_start, header.state_start)
    if places != (layout.map_start, layout.memory_start, layout.state_start) or header.state_size < 0:
        raise CheckpointError("its header is malformed: its parts are not where they belong")
    size, wanted = os.fstat(fd).st_size, header.state_start + header.state_size
    if size != wanted:
        how = "is truncated at" if size < wanted else "goes on after its end: it has"
        raise CheckpointError(f"it {how} {size} bytes, of {wanted}")


def _whole(fd: int, header: Header) -> Template:
    """The machine, with the map of its memory."""
    from motorcade.proto import template

    count = _Layout(header.memory_size).chunks
    chunk_map = _pread(fd, 5 * count, header.map_start)
    if zlib.crc32(chunk_map) != header.map_crc or len(chunk_map) != 5 * count:
        raise CheckpointError("the map of its memory is damaged: its checksum is wrong")
    state = template.decode(_pread(fd, header.state_size, header.state_start))
    if state.has_memory or state.memory_size != header.memory_size:
        raise CheckpointError("its state is of another machine")
    if state.description.encode() != msgspec.json.format(bytes(header.machine), indent=-1):
        raise CheckpointError("its header and its state are of different machines")
    if chunk_map[:count].strip(b"\0\1"):
        raise CheckpointError("the map of its memory is malformed")
    return dataclasses.replace(state, layers=chunk_map[:count], sums=chunk_map[count:])


def _check_zeros(fd: int, header: Header, layers: bytes) -> None:
    """What the map calls zero is not looked at by anybody else; it is holes, mostly."""
    begin = header.memory_start
    for first, last in _data(fd, begin, begin + header.memory_size):
        for chunk in range((first - begin) // _ALIGN, -(-(last - begin) // _ALIGN)):
            offset = chunk * _ALIGN
            if not layers[chunk] and _pread(fd, min(_ALIGN, header.memory_size - offset), begin + offset).strip(b"\0"):
                raise CheckpointError(f"its memory at {offset:#x} is damaged: it should be zero")


def _data(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """From and to of what is no hole."""
    at = start
    while at < end:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # nothing but a hole follows
            return
        last = min(os.lseek(fd, at, os.SEEK_HOLE), end)
        if at < last:
            yield at, last
        at = last


def _pread(fd: int, size: int, offset: int) -> bytes:
    """``size`` bytes, or as many as there are."""
    pieces = []
    while size and (piece := os.pread(fd, size, offset)):
        pieces.append(piece)
        offset += len(piece)
        size -= len(piece)
    return b"".join(pieces)


def _pwrite(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written
