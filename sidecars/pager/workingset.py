"""The file ``working-set`` beside a template: the chunks that a restored machine asks for first.

A header of 16 bytes, then the chunks' numbers as ``WorkingSet`` has them (32 bits, little-endian, in the order in which
they were asked for):

    0   8   magic
    8   4   how many
    12  4   CRC-32 of the numbers

It makes a restored machine faster, and never other: whatever is wrong with it, it can be left out.
"""

from __future__ import annotations

import os
import struct
import zlib

from motorcade.sidecars._pager import lib

MAGIC = b"MCWSET\r\n"
MAX_CHUNKS: int = lib.MC_PAGER_MAX_RECORD
_HEADER = struct.Struct("<8sII")


class WorkingSetError(ValueError):
    """The file is no working set, or not one of this machine."""


def encode(chunks: bytes) -> bytes:
    """The file for ``WorkingSet.chunks``. Raises WorkingSetError where those are none."""
    if len(chunks) % 4 or len(chunks) > 4 * MAX_CHUNKS:
        raise WorkingSetError(f"{len(chunks)} bytes are no working set")
    return _HEADER.pack(MAGIC, len(chunks) // 4, zlib.crc32(chunks)) + chunks


def read(fd: int, memory_chunks: int) -> list[int]:
    """The chunks in the file ``fd``, ascending, of a machine that has ``memory_chunks``. ``fd`` stays the caller's.

    Errors: WorkingSetError; OSError of pread(2).
    """
    data = os.pread(fd, _HEADER.size + 4 * MAX_CHUNKS + 1, 0)
    if len(data) < _HEADER.size:
        raise WorkingSetError("it is shorter than its header")
    magic, count, crc = _HEADER.unpack_from(data)
    body = data[_HEADER.size :]
    if magic != MAGIC:
        raise WorkingSetError("it does not begin as one")
    if count > MAX_CHUNKS or len(body) != 4 * count:
        raise WorkingSetError(f"it has {len(body)} bytes for {count} chunks")
    if zlib.crc32(body) != crc:
        raise WorkingSetError("its checksum is wrong")
    chunks = sorted(set(struct.unpack(f"<{count}I", body)))
    if chunks and chunks[-1] >= memory_chunks:
        raise WorkingSetError(f"chunk {chunks[-1]} is outside the machine's {memory_chunks}")
    return chunks
