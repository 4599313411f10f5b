"""ELF kernels: their segments, and the PVH entry from their notes.

Sources: System V gABI chapters 4 and 5; Xen's ``elfnote.h`` (XEN_ELFNOTE_PHYS32_ENTRY) and ``docs/misc/pvh.pandoc``.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from motorcade.core.boot.error import BootError, mib
from motorcade.core.boot.image import Image
from motorcade.core.boot.layout import Range, loadable
from motorcade.proto.memory import GuestMemory

MAGIC = b"\x7fELF"
_EM_386 = 3
_EM_X86_64 = 62
_ET_EXEC = 2
_ET_DYN = 3  # what a position-independent kernel is; its physical addresses still say where it goes
_PT_LOAD = 1
_PT_NOTE = 4
_XEN_PHYS32_ENTRY = 18
_MAX_NOTES = 1 << 20  # bytes; a note segment is a few hundred
_ZEROS = bytes(1 << 20)


@dataclass(frozen=True)
class Segment:
    """A PT_LOAD: ``file_size`` bytes at ``offset`` go to ``start``, zeros up to ``size`` follow."""

    offset: int
    start: int
    file_size: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size


@dataclass(frozen=True)
class Elf:
    """A checked ELF kernel. ``pvh_entry`` is the physical address of its PVH entry, None without the note."""

    segments: tuple[Segment, ...]
    pvh_entry: int | None

    @property
    def end(self) -> int:
        """Where the kernel's highest segment ends."""
        return max(s.end for s in self.segments)


def parse(image: Image) -> Elf:
    """Reads the headers and notes of ``image``, which begins with MAGIC. BootError where they are not sound."""
    name = image.name
    wide, program_headers = _program_headers(image)
    segments: list[Segment] = []
    entry: int | None = None
    for header in program_headers:
        if wide:
            kind, _, offset, _, paddr, file_size, size, align = struct.unpack("<IIQQQQQQ", header)
        else:
            kind, offset, _, paddr, file_size, size, _, align = struct.unpack("<8I", header)
        if kind not in (_PT_LOAD, _PT_NOTE):
            continue
        if offset + file_size > image.size:
            raise BootError(
                f"{name}: truncated: a segment of {mib(file_size)} at offset {offset:#x} reaches past the file's end"
            )
        if kind == _PT_LOAD and size:
            if file_size > size:
                raise BootError(f"{name}: a segment has {file_size} bytes in the file but only {size} in memory")
            segments.append(Segment(offset, paddr, file_size, size))
        elif kind == _PT_NOTE and entry is None:
            if file_size > _MAX_NOTES:
                raise BootError(f"{name}: a note segment of {mib(file_size)}")
            entry = _pvh_entry(image.read(offset, file_size), 8 if align == 8 else 4)
    if not segments:
        raise BootError(f"{name}: an ELF file with nothing to load (an object file, or stripped of its segments)")
    segments.sort(key=lambda s: s.start)
    for before, after in itertools.pairwise(segments):
        if before.end > after.start:
            raise BootError(f"{name}: segments at {before.start:#x} and {after.start:#x} overlap")
    if entry is not None and not any(s.start <= entry < s.end for s in segments):
        raise BootError(f"{name}: its PVH entry {entry:#x} is outside its segments")
    return Elf(tuple(segments), entry)


def _program_headers(image: Image) -> tuple[bool, Iterator[bytes]]:
    """Whether the file is 64-bit, and its program headers as they stand in it."""
    name = image.name
    ident = image.read(0, 20)
    bits, order = ident[4], ident[5]
    if bits not in (1, 2) or order != 1:
        raise BootError(f"{name}: not a little-endian ELF file of 32 or 64 bits")
    kind, machine = struct.unpack_from("<HH", ident, 16)
    if machine not in (_EM_386, _EM_X86_64):
        raise BootError(f"{name}: an ELF file for machine {machine}, not for x86")
    if kind not in (_ET_EXEC, _ET_DYN):
        raise BootError(f"{name}: an ELF file of type {kind}, not an executable")
    wide = bits == 2
    if wide:
        offset, entry_size, count = struct.unpack_from("<32xQ14xHH", image.read(0, 64))
    else:
        offset, entry_size, count = struct.unpack_from("<28xI10xHH", image.read(0, 52))
    if entry_size != (56 if wide else 32):
        raise BootError(f"{name}: its program headers are {entry_size} bytes each")
    table = image.read(offset, entry_size * count)
    return wide, (table[i : i + entry_size] for i in range(0, len(table), entry_size))


def _pvh_entry(notes: bytes, align: int) -> int | None:
    """The PHYS32_ENTRY of a note segment. A note that runs past the end ends the search: not ours to judge."""
    at = 0
    while at + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, at)
        name_at = at + 12
        at = name_at + -(-name_size // align) * align
        value = notes[at : at + size]
        at += -(-size // align) * align
        if kind == _XEN_PHYS32_ENTRY and notes[name_at : name_at + name_size] == b"Xen\0" and len(value) >= 4:
            return int.from_bytes(value[:4], "little")  # 8 bytes in Linux, 4 elsewhere; the entry is 32-bit
    return None


def write_segments(memory: GuestMemory, image: Image, elf: Elf, ranges: list[Range]) -> None:
    """Loads the segments at their physical addresses. BootError where one is not in usable RAM of ``ranges``."""
    for segment in elf.segments:
        if not loadable(ranges, segment.start, segment.size):
            raise BootError(
                f"{image.name}: a segment of {mib(segment.size)} goes to {segment.start:#x}, which is not in the"
                f" machine's usable RAM ({mib(memory.size)})"
            )
    for segment in elf.segments:
        image.read_into(memory.view(segment.start, segment.file_size), segment.offset)
        # Not left to fresh memory being zero: after a reset it is not.
        for at in range(segment.start + segment.file_size, segment.end, len(_ZEROS)):
            memory.write(at, memoryview(_ZEROS)[: segment.end - at])
