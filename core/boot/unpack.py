"""Unpacks a bzImage's payload on the host, once, and keeps the result.

The payload is the kernel's ELF file, packed by the kernel's build with the size of the unpacked file in its last
four bytes (Linux, arch/x86/boot/compressed; gzip has that field by itself). The decompressors are imported late:
a machine whose kernel is in the cache, or an ELF file, needs none of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import logging
import os
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from motorcade.core.boot import bzimage, elf
from motorcade.core.boot.error import BootError, mib
from motorcade.core.boot.image import BytesImage, FileImage, Image

log = logging.getLogger(__name__)

_MAX_UNPACKED = 1 << 30  # bytes; Debian's is 51 MiB. A bound for an image that lies about itself
_KEEP = 8  # unpacked kernels; those beyond go when they have not been used for _KEEP_SECONDS
_KEEP_SECONDS = 3600


def unpack(image: bytes, name: str = "kernel") -> bytes | None:
    """The ELF file inside a bzImage; None where ``image`` is no bzImage or packs no ELF that we can unpack."""
    source = BytesImage(image, name)
    return unpack_payload(source, bzimage.parse(source)) if bzimage.is_bzimage(source) else None


def unpack_payload(image: Image, header: bzimage.Header) -> bytes | None:
    """The ELF file inside ``image``; None where there is none that we can unpack, and the guest must do it.

    BootError where the payload is damaged: the guest could not unpack it either.
    """
    if header.payload_size < 8:
        return None
    packed = image.read(header.payload_offset, header.payload_size)
    decompress = next((f for magic, f in _FORMATS if packed.startswith(magic)), None)
    if decompress is None:
        return None
    size = int.from_bytes(packed[-4:], "little")
    if size > _MAX_UNPACKED:
        raise BootError(f"{image.name}: its payload says that it unpacks to {mib(size)}")
    unpacked = decompress(memoryview(packed), size, image.name)
    if len(unpacked) != size:
        raise BootError(f"{image.name}: damaged: its payload unpacks to {len(unpacked)} bytes instead of {size}")
    return unpacked if unpacked.startswith(elf.MAGIC) else None


def import_for(image: Image) -> None:
    """Imports what ``unpack_payload`` may need for ``image``, while modules can still be found."""
    if bzimage.is_bzimage(image):
        for name in ("lzma", "bz2", "zstandard", "lz4.block"):
            importlib.import_module(name)


def _gzip(packed: memoryview, size: int, name: str) -> bytes:
    try:
        return zlib.decompressobj(wbits=31).decompress(packed, size + 1)
    except zlib.error as e:
        raise _damaged(name, e) from e


def _xz(packed: memoryview, size: int, name: str) -> bytes:
    import lzma

    try:
        return lzma.LZMADecompressor().decompress(packed, size + 1)
    except lzma.LZMAError as e:
        raise _damaged(name, e) from e


def _bzip2(packed: memoryview, size: int, name: str) -> bytes:
    import bz2

    try:
        return bz2.BZ2Decompressor().decompress(packed, size + 1)
    except OSError as e:
        raise _damaged(name, e) from e


def _zstd(packed: memoryview, size: int, name: str) -> bytes:
    import zstandard

    try:
        with zstandard.ZstdDecompressor().stream_reader(packed) as reader:
            return reader.read(size + 1)
    except zstandard.ZstdError as e:
        raise _damaged(name, e) from e


def _lz4_legacy(packed: memoryview, size: int, name: str) -> bytes:
    """LZ4's legacy frame (lz4_Frame_format.md): blocks of 8 MiB, each with its packed size before it, no end mark.

    The kernel's size field follows the last block, so the blocks end four bytes before the payload does.
    """
    import lz4.block

    out: list[bytes] = []
    at, end, done = 4, len(packed) - 4, 0
    while at < end:
        length = int.from_bytes(packed[at : at + 4], "little")
        at += 4
        if length == 0 or at + length > end:
            raise BootError(f"{name}: damaged: an LZ4 block of {length} bytes at {at} of {end}")
        try:
            block: bytes = lz4.block.decompress(packed[at : at + length], uncompressed_size=8 << 20)
        except lz4.block.LZ4BlockError as e:
            raise _damaged(name, e) from e
        out.append(block)
        at += length
        done += len(block)
        if done > size:
            break
    return b"".join(out)


def _damaged(name: str, error: Exception) -> BootError:
    return BootError(f"{name}: damaged: its payload does not unpack: {error}")


_FORMATS: list[tuple[bytes, Callable[[memoryview, int, str], bytes]]] = [
    (b"\x1f\x8b", _gzip),
    (b"\xfd7zXZ\0", _xz),
    (b"\x28\xb5\x2f\xfd", _zstd),
    (b"\x02\x21\x4c\x18", _lz4_legacy),
    (b"BZh", _bzip2),
    (b"\x5d\0\0", _xz),  # LZMA alone, which the same decompressor tells apart
]


def prepare_kernel(path: Path, cache_dir: Path) -> Path:
    """The file to give the core instead of ``path``: an unpacked kernel from ``cache_dir``, or ``path`` itself.

    ``path`` itself for whatever is not a bzImage with a PVH kernel inside, and when the cache cannot be written
    (the core then unpacks at each start). The directory is made when missing. Entries are named after the image's
    device, inode, size and times, so a replaced kernel is another entry; those long unused are removed. OSError
    where ``path`` cannot be read, BootError where it is damaged.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        st = os.fstat(fd)
        identity = f"1 {st.st_dev} {st.st_ino} {st.st_size} {st.st_mtime_ns} {st.st_ctime_ns}"
        cached = cache_dir / f"vmlinux-{hashlib.sha256(identity.encode()).hexdigest()[:24]}"
        if os.access(cached, os.R_OK):
            with contextlib.suppress(OSError):  # a cache that we may only read serves as well
                os.utime(cached)
            return cached
        image = FileImage(fd, str(path))
        if not bzimage.is_bzimage(image):
            return path
        unpacked = unpack_payload(image, bzimage.parse(image))
    finally:
        os.close(fd)
    if unpacked is None or elf.parse(BytesImage(unpacked, str(path))).pvh_entry is None:
        return path
    try:
        _store(cached, unpacked)
    except OSError as e:
        log.info("%s: the unpacked kernel cannot be kept: %s", path, e)
        return path
    return cached


def _store(cached: Path, unpacked: bytes) -> None:
    """Writes a cache entry whole or not at all, and drops those long unused."""
    directory = cached.parent
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(prefix=".vmlinux-", dir=directory)
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(unpacked)
            f.flush()
            os.fsync(f.fileno())  # else a crash of the host may leave the name with an empty file behind it
        Path(name).rename(cached)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    entries: list[tuple[float, Path]] = []
    for entry in directory.glob("vmlinux-*"):
        with contextlib.suppress(FileNotFoundError):  # another machine's start is tidying up as well
            entries.append((entry.stat().st_mtime, entry))
    entries.sort(reverse=True)
    for used, old in entries[_KEEP:]:
        if time.time() - used > _KEEP_SECONDS:
            old.unlink(missing_ok=True)
