"""Copy-on-write overlay files over a read-only base, an image or another overlay (docs/overlay-format.md): made,
recognised and checked here.

The data path (sidecars/native/blk_overlay.c) reads and writes the map and the data; the header never changes after the
file was made.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import stat
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MAGIC = b"MCOVRLY\0"
VERSION = 1
BLOCK = 4096  # bytes of the disk that two bits of the map speak of
HEADER_SIZE = 4096
MAP_OFFSET = 4096
DATA_ALIGN = 1 << 20
_HEADER = struct.Struct("<8sIIQQQQq32s")  # magic, version, block, size, map, data, base size, base mtime, base sample
_CRC = struct.Struct("<I")
MAX_LAYERS = 63  # between the image and the overlay that is written to
_SAMPLES = 64


class OverlayError(Exception):
    """A file is no overlay, is damaged, or does not belong to its base. The text is for a person."""


@dataclass(frozen=True)
class Identity:
    """By which a base, the file directly below an overlay, is recognised. ``mtime`` in ns, 0 for block devices, which
    have none that says anything."""

    size: int
    mtime: int
    sample: bytes  # SHA-256 of 64 pieces of 4 KiB spread over the base


@dataclass(frozen=True)
class Header:
    """Where things are in an overlay. All in bytes."""

    size: int  # of the disk
    map_offset: int
    data_offset: int
    base: Identity

    @property
    def map_size(self) -> int:
        """Two bits a block, whole pages."""
        blocks = -(-self.size // BLOCK)
        return -(-blocks // (4 * 4096)) * 4096


def identify(fd: int) -> Identity:
    """What ``fd``, a base opened for reading (O_DIRECT or not), is recognised by. OSError where it cannot be read."""
    info = os.fstat(fd)
    size = os.lseek(fd, 0, os.SEEK_END)
    digest = hashlib.sha256()
    # A page of its own, since O_DIRECT takes no other buffer.
    import mmap

    with mmap.mmap(-1, 4096) as page:
        for i in range(_SAMPLES):
            at = size * i // _SAMPLES // 4096 * 4096
            got = os.preadv(fd, [page], at)
            digest.update(page[:got])
    return Identity(size, info.st_mtime_ns if stat.S_ISREG(info.st_mode) else 0, digest.digest())


def create(path: str | os.PathLike[str], base_fd: int, *, layer: bool = False) -> Header:
    """Makes an empty overlay at ``path`` over the base ``base_fd``, whole or not at all, and permanent on return.

    It takes a few KiB; its apparent size is the disk's. FileExistsError where ``path`` exists; OSError.
    ``layer``: as of ``init``.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.new")
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            header = init(fd, base_fd, identify(base_fd), layer=layer)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.link(temporary, target)  # unlike rename, never replaces an overlay that somebody else has just made
    finally:
        temporary.unlink()
    directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return header


def init(fd: int, base_fd: int, identity: Identity, *, layer: bool = False) -> Header:
    """Makes the empty file ``fd`` an empty overlay over the base ``base_fd``, whose ``identify`` is ``identity``; not
    fsynced. Both stay the caller's.

    ``layer``: the base is itself an overlay. That is never guessed from its content: a guest that has written an image
    would else choose what it is read as. OSError; OverlayError, where a layer is no overlay.
    """
    size = read_header(base_fd).size if layer else identity.size // 512 * 512
    header = Header(size, MAP_OFFSET, 0, identity)
    data = -(-(MAP_OFFSET + header.map_size) // DATA_ALIGN) * DATA_ALIGN
    header = Header(size, MAP_OFFSET, data, identity)
    os.pwrite(fd, _pack(header), 0)
    os.ftruncate(fd, data + -(-size // BLOCK) * BLOCK)
    return header


def _pack(header: Header) -> bytes:
    base = header.base
    packed = _HEADER.pack(
        MAGIC, VERSION, BLOCK, header.size, header.map_offset, header.data_offset, base.size, base.mtime, base.sample
    )
    return (packed + _CRC.pack(zlib.crc32(packed))).ljust(HEADER_SIZE, b"\0")


def read_header(fd: int) -> Header:
    """The header of the overlay ``fd`` (O_DIRECT or not). OverlayError where it is none, or damaged."""
    import mmap

    with mmap.mmap(-1, HEADER_SIZE) as page:
        got = os.preadv(fd, [page], 0)
        raw = page[:got]
    if len(raw) < HEADER_SIZE or not raw.startswith(MAGIC):
        raise OverlayError("it is not an overlay of Motorcade's")
    _, version, block, size, map_offset, data_offset, *base = _HEADER.unpack_from(raw)
    if version != VERSION:
        raise OverlayError(f"it is an overlay of format version {version}; this program knows version {VERSION}")
    if _CRC.unpack_from(raw, _HEADER.size)[0] != zlib.crc32(raw[: _HEADER.size]):
        raise OverlayError("its header is damaged (the checksum does not match)")
    header = Header(size, map_offset, data_offset, Identity(*base))
    if block != BLOCK or size <= 0 or map_offset < HEADER_SIZE or data_offset < map_offset + header.map_size:
        raise OverlayError("its header makes no sense")
    if (actual := os.lseek(fd, 0, os.SEEK_END)) < data_offset + size:
        raise OverlayError(f"it was cut off: {actual} bytes, {data_offset + size} are needed")
    return header


def open_pair(overlay_fd: int, base_fd: int) -> Header:
    """The header of the overlay, whose base must be what it was when the overlay was made. OverlayError, OSError.

    A base that changed under its overlay would be a disk made of two: parts of files, parts of metadata.
    """
    header = read_header(overlay_fd)
    base = identify(base_fd)
    if base.size != header.base.size:
        raise OverlayError(f"its base has {base.size} bytes now and had {header.base.size} when the overlay was made")
    if base.mtime != header.base.mtime:
        raise OverlayError("its base was modified after the overlay was made (its modification time differs)")
    if base.sample != header.base.sample:
        raise OverlayError("its base has another content than when the overlay was made")
    return header


def open_stack(fds: Sequence[int]) -> list[Header]:
    """The headers of a stack of overlays, the lowest first. ``fds``: the image, then all overlays from the lowest up.

    Each must fit the file directly below it, and all must be of one disk. OverlayError, OSError.
    """
    headers: list[Header] = []
    for i, (lower, upper) in enumerate(itertools.pairwise(fds)):
        try:
            header = open_pair(upper, lower)
        except OverlayError as e:
            if i + 2 == len(fds):
                raise
            raise OverlayError(f"layer {i}: {e}") from None
        if headers and header.size != headers[-1].size:
            raise OverlayError(f"it is of a disk of {header.size} bytes, the layer below it of {headers[-1].size}")
        headers.append(header)
    return headers


@dataclass(frozen=True)
class Usage:
    """What an overlay holds, in blocks of 4 KiB."""

    data: int
    zero: int


def check(overlay_fd: int, base_fd: int) -> Usage:
    """Reads all of the map. OverlayError where overlay and base do not fit or the map is damaged. Not while it is in
    use."""
    header = open_pair(overlay_fd, base_fd)
    blocks = -(-header.size // BLOCK)
    counts = [0, 0, 0, 0]
    at, end = header.map_offset, header.map_offset + header.map_size
    while at < end:
        try:
            at = os.lseek(overlay_fd, at, os.SEEK_DATA) // 4096 * 4096
        except OSError:  # ENXIO: nothing but a hole follows
            break
        if at >= end:
            break
        page = os.pread(overlay_fd, 4096, at)
        first = (at - header.map_offset) * 4
        for i, byte in enumerate(page):
            if byte == 0:
                continue
            for k in range(4):
                state = byte >> 2 * k & 3
                counts[state] += 1
                if state and first + 4 * i + k >= blocks:
                    raise OverlayError(f"its map speaks of block {first + 4 * i + k}, past the end of the disk")
        at += 4096
    if counts[3]:
        raise OverlayError("its map is damaged: it has a block in a state that does not exist")
    return Usage(data=counts[1], zero=counts[2])
