"""A template's ``state`` file: everything about a frozen machine but the bytes of its memory and disks.

The file: a header of 64 bytes, then a Cap'n Proto message (template.capnp), then nothing.

    0   8   magic
    8   4   format version, little-endian as all that follows
    12  4   CRC-32 of the body
    16  8   length of the body in bytes
    24  36  zero
    60  4   CRC-32 of the header's first 60 bytes

Magic, version and the header's CRC stay where they are in every version to come, so that an old program can say
"newer" rather than "damaged". The CRC is zlib's: whoever reads a state (vmmctl, the supervisor, the pager, the core)
has it without an extension. The chunks of memory have a CRC-32C each (``Template.sums``), which is the hardware's.

Equal machines have equal bytes: there is no date, no random number and no order that depends on chance.

Bytes of a file are hostile. ``read`` gives a Template whose lengths and numbers agree with each other, or raises
TemplateError; what a component's ``data`` means is for its owner to check.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import zlib
from dataclasses import dataclass, field
from typing import Annotated, Any

from motorcade.proto import schema
from motorcade.proto.memory import PAGE
from motorcade.proto.messages import Malformed, Max

MAGIC = b"MCTMPL\r\n"
"""The line end shows a transfer that took the file for text."""
VERSION = 1
"""The format version that ``encode`` writes, and the newest that ``read`` knows."""
CHUNK = 64 << 10
"""Bytes of memory that share a layer and a checksum; a template's last chunk may be shorter."""
MAX_MEMORY = 1 << 40
MAX_PARENTS = 62
MAX_COMPONENTS = 1024
IDENTITY_SIZE = 32

_HEADER = struct.Struct("<8sIIQ36xI")
_MAX_CHUNKS = MAX_MEMORY // CHUNK
_MAX_BODY = 5 * _MAX_CHUNKS + (64 << 20)
_CPUID_ENTRY = 40  # sizeof(struct kvm_cpuid_entry2): an ABI
_NAME = re.compile(r"[a-z][-_a-z0-9]*(\.[~A-Za-z0-9][-_.A-Za-z0-9]*)?")


class TemplateError(ValueError):
    """A state file that is no template, is damaged, or is of a format that this program does not know."""


@dataclass(frozen=True, slots=True)
class Component:
    """What one part of the machine knows. ``version`` is of ``data``, and counted by the part's kind."""

    name: Annotated[str, Max(64)]
    version: int
    data: Annotated[bytes, Max(4 << 20)] = field(repr=False)

    @property
    def kind(self) -> str:
        """The name up to its first dot: ``vcpu`` of ``vcpu.3``."""
        return self.name.partition(".")[0]

    def check(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise Malformed(f"a component is called {self.name!r}")
        if not self.version:
            raise Malformed(f"component {self.name} has version 0")


@dataclass(frozen=True, slots=True)
class Parent:
    """A template that this one builds on: its directory's absolute path, and the identity of its state file."""

    path: Annotated[str, Max(4096)]
    identity: Annotated[bytes, Max(IDENTITY_SIZE)]

    def check(self) -> None:
        if not self.path.startswith("/") or "\0" in self.path:
            raise Malformed(f"the parent's path {self.path!r} is not absolute")
        if len(self.identity) != IDENTITY_SIZE:
            raise Malformed(f"the identity of parent {self.path} has {len(self.identity)} bytes")


@dataclass(frozen=True, slots=True)
class Cpu:
    """What a host must have to go on with the machine (core/snapshot/cpu.py)."""

    cpuid: Annotated[bytes, Max(1024 * _CPUID_ENTRY)] = field(repr=False)
    """The entries (``struct kvm_cpuid_entry2``) of vCPU 0's table."""
    msrs: Annotated[tuple[int, ...], Max(4096)] = field(repr=False)
    xsave_size: int
    """Bytes of a vCPU's extended state."""

    def check(self) -> None:
        if len(self.cpuid) % _CPUID_ENTRY:
            raise Malformed(f"the CPUID table has {len(self.cpuid)} bytes, no whole number of entries")


@dataclass(frozen=True, slots=True)
class Template:
    """A frozen machine. Sizes in bytes."""

    description: Annotated[str, Max(1 << 20)]
    """JSON: the machine (orchestrator/machine.py)."""
    cpu: Cpu
    memory_size: int
    """Of guest RAM, also where the template has none of it."""
    layers: Annotated[bytes, Max(_MAX_CHUNKS)] = field(repr=False)
    """A byte per CHUNK: 0 zero, 1 this template's ``memory``, N ``parents[N - 2]``'s. Empty: see ``has_memory``."""
    sums: Annotated[bytes, Max(4 * _MAX_CHUNKS)] = field(repr=False)
    """A CRC-32C per chunk, little-endian, 0 where the layer is 0."""
    parents: Annotated[tuple[Parent, ...], Max(MAX_PARENTS)]
    """The template that this one was made against, the one that that was made against, and so on."""
    disks: Annotated[str, Max(1 << 20)]
    """JSON (orchestrator/templates.py)."""
    components: Annotated[tuple[Component, ...], Max(MAX_COMPONENTS)]

    @property
    def has_memory(self) -> bool:
        """Whether RAM is the template's: not where it was shared (x-ignore-shared) or left out (save-devices-state)."""
        return bool(self.layers)

    def component(self, name: str) -> Component | None:
        """The component of that name."""
        return next((c for c in self.components if c.name == name), None)

    def check(self) -> None:
        if not 0 < self.memory_size <= MAX_MEMORY or self.memory_size % PAGE:
            raise Malformed(f"the memory's size is {self.memory_size}")
        chunks = chunk_count(self.memory_size)
        if self.layers:
            if len(self.layers) != chunks:
                raise Malformed(f"{len(self.layers)} layers for {chunks} chunks of memory")
            # bytes.translate deletes what is right, in C: a loop over a big machine's layers would cost every start.
            if wrong := self.layers.translate(None, bytes(range(len(self.parents) + 2))):
                raise Malformed(f"a chunk of memory is in layer {wrong[0]}, but there are {len(self.parents)} parents")
        elif self.parents:
            raise Malformed("it has parents, but no memory")
        if len(self.sums) != 4 * len(self.layers):
            raise Malformed(f"{len(self.sums)} bytes of checksums for {len(self.layers)} chunks of memory")
        names = [c.name for c in self.components]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise Malformed(f"component {twice} is there twice")


def chunk_count(memory_size: int) -> int:
    """How many chunks ``memory_size`` bytes are."""
    return -(-memory_size // CHUNK)


_schema: Any = schema.load("template.capnp").Template


def encode(template: Template) -> bytes:
    """The whole state file. ValueError where a field is out of its bounds: our own mistake."""
    body = schema.encode_struct(_schema, template, _MAX_BODY)
    header = _HEADER.pack(MAGIC, VERSION, zlib.crc32(body), len(body), 0)[:-4]
    return header + struct.pack("<I", zlib.crc32(header)) + body


def decode(data: bytes) -> Template:
    """The template in the bytes of a state file. Raises TemplateError and nothing else."""
    crc, length = _parse_header(data[: _HEADER.size], len(data))
    return _parse_body(data[_HEADER.size :], crc, length)


def read(fd: int) -> Template:
    """The template in the state file ``fd``, which stays the caller's, as does its offset.

    Errors: TemplateError, whose text goes after the file's name and a colon; OSError of pread(2).
    """
    crc, length = _read_header(fd)
    return _parse_body(_pread(fd, length, _HEADER.size), crc, length)


def read_description(fd: int) -> str:
    """``Template.description`` alone: of a big machine it takes a fraction of ``read``. Errors: as ``read``."""
    crc, length = _read_header(fd)
    body = _pread(fd, length, _HEADER.size)
    _check_body(body, crc, length)
    try:
        return schema.decode_struct(_schema, _Description, body, _MAX_BODY).description
    except Malformed as e:
        raise TemplateError(f"the state is malformed: {e}") from None


def identity(fd: int) -> bytes:
    """What a differential template knows this one by: the BLAKE2b-256 of the state file ``fd``. Errors: OSError."""
    digest = hashlib.blake2b(digest_size=IDENTITY_SIZE)
    offset = 0
    while piece := os.pread(fd, 1 << 20, offset):
        digest.update(piece)
        offset += len(piece)
    return digest.digest()


@dataclass(frozen=True, slots=True)
class _Description:
    description: Annotated[str, Max(1 << 20)]


def _pread(fd: int, length: int, offset: int) -> bytes:
    """``length`` bytes, or as many as there are."""
    pieces = []
    while length and (piece := os.pread(fd, length, offset)):
        pieces.append(piece)
        offset += len(piece)
        length -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _read_header(fd: int) -> tuple[int, int]:
    return _parse_header(_pread(fd, _HEADER.size, 0), os.fstat(fd).st_size)


def _parse_header(header: bytes, size: int) -> tuple[int, int]:
    """The body's CRC and length, from the header of a file of ``size`` bytes."""
    if not header or not header.startswith(MAGIC[: len(header)]):
        raise TemplateError("not a template's state")
    if len(header) < _HEADER.size:
        raise TemplateError(f"the state is truncated at {len(header)} bytes, within its header")
    _, version, crc, length, header_crc = _HEADER.unpack(header)
    if zlib.crc32(header[:-4]) != header_crc:
        raise TemplateError("the state's header is damaged")
    if version > VERSION:
        raise TemplateError(f"its format is version {version}, newer than this program, which reads up to {VERSION}")
    if not version or header[24:60].strip(b"\0") or length > _MAX_BODY:
        raise TemplateError("the state's header is not one of format version 1")
    if size < _HEADER.size + length:
        raise TemplateError(f"the state is truncated at {size} bytes of {_HEADER.size + length}")
    if size > _HEADER.size + length:
        raise TemplateError(f"the state has {size - _HEADER.size - length} bytes behind its end")
    return crc, length


def _check_body(body: bytes, crc: int, length: int) -> None:
    if len(body) != length:  # it has shrunk since its size was asked
        raise TemplateError(f"the state is truncated at {_HEADER.size + len(body)} bytes of {_HEADER.size + length}")
    if zlib.crc32(body) != crc:
        raise TemplateError("the state is damaged: its checksum is wrong")


def _parse_body(body: bytes, crc: int, length: int) -> Template:
    _check_body(body, crc, length)
    try:
        return schema.decode_struct(_schema, Template, body, _MAX_BODY)
    except Malformed as e:
        raise TemplateError(f"the state is malformed: {e}") from None
