"""Unpacking bzImage payloads of every compression that distributions use, and the cache of unpacked kernels."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import lz4.block
import pytest
import zstandard

from harness.kernels import Part, bzimage, debian_kernel, elf, note
from motorcade.core.boot import BootError
from motorcade.core.boot.unpack import prepare_kernel, unpack

KERNEL = elf([Part(0x1000000, os.urandom(1000) + bytes(10_000_000))], note(0x1000010))


def lz4_legacy(data: bytes) -> bytes:
    out = b"\x02\x21\x4c\x18"
    for at in range(0, len(data), 8 << 20):
        block = lz4.block.compress(data[at : at + (8 << 20)], store_size=False)
        out += len(block).to_bytes(4, "little") + block
    return out


def sized(pack: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """What the kernel's build does: the unpacked size behind the packed data."""
    return lambda data: pack(data) + len(data).to_bytes(4, "little")


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,  # its trailer is the size already
    "xz": sized(lambda data: lzma.compress(data, check=lzma.CHECK_CRC32, preset=1)),
    "lzma": sized(lambda data: lzma.compress(data, lzma.FORMAT_ALONE, preset=1)),
    "zstd": sized(zstandard.ZstdCompressor().compress),
    "lz4": sized(lz4_legacy),
    "bzip2": sized(bz2.compress),
}


@pytest.mark.parametrize("packer", PACKERS)
def test_unpack(packer: str) -> None:
    assert unpack(bzimage(PACKERS[packer](KERNEL))) == KERNEL


def test_nothing_to_unpack() -> None:
    assert unpack(b"") is None
    assert unpack(KERNEL) is None
    assert unpack(bzimage(b"")) is None
    assert unpack(bzimage(b"LZO, which we do not know")) is None
    assert unpack(bzimage(gzip.compress(b"packed, but no ELF file"))) is None


@pytest.mark.parametrize("packer", PACKERS)
def test_damaged_payload(packer: str) -> None:
    payload = bytearray(PACKERS[packer](KERNEL))
    payload[6:300] = b"\xff" * 294
    with pytest.raises(BootError, match=r"vmlinuz: damaged"):
        unpack(bzimage(bytes(payload)), "vmlinuz")


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("claim", [100, len(KERNEL) - 1, len(KERNEL) + 1])
def test_payload_that_lies_about_its_size(packer: str, claim: int) -> None:
    payload = PACKERS[packer](KERNEL)[:-4] + claim.to_bytes(4, "little")
    with pytest.raises(BootError, match=r"vmlinuz: damaged"):
        unpack(bzimage(payload), "vmlinuz")


def test_absurd_sizes() -> None:
    with pytest.raises(BootError, match="unpacks to 4096 MiB"):
        unpack(bzimage(gzip.compress(KERNEL)[:-4] + b"\xff\xff\xff\xff"))
    with pytest.raises(BootError, match="an LZ4 block of 4294967295 bytes"):
        unpack(bzimage(b"\x02\x21\x4c\x18\xff\xff\xff\xff" + bytes(100)))
    with pytest.raises(BootError, match="an LZ4 block of 0 bytes"):
        unpack(bzimage(b"\x02\x21\x4c\x18" + bytes(100)))


@pytest.fixture
def vmlinuz(tmp_path: Path) -> Path:
    path = tmp_path / "vmlinuz"
    path.write_bytes(bzimage(gzip.compress(KERNEL)))
    return path


def test_cache(tmp_path: Path, vmlinuz: Path) -> None:
    cache = tmp_path / "deep" / "cache"
    first = prepare_kernel(vmlinuz, cache)
    assert first.parent == cache
    assert first.read_bytes() == KERNEL
    made = first.stat().st_ino
    assert prepare_kernel(vmlinuz, cache) == first
    assert first.stat().st_ino == made
    assert [p.name for p in cache.iterdir()] == [first.name]  # nothing temporary left

    other = elf([Part(0x1000000, b"other" * 10)], note(0x1000010))
    vmlinuz.write_bytes(bzimage(gzip.compress(other)))
    second = prepare_kernel(vmlinuz, cache)
    assert second != first
    assert second.read_bytes() == other


def test_what_is_not_prepared_is_given_back(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for content in (KERNEL, b"not a kernel", bzimage(gzip.compress(elf([Part(0x1000000, b"x")], None)))):
        path = tmp_path / "file"
        path.write_bytes(content)
        assert prepare_kernel(path, cache) == path
    assert not cache.exists()


def test_cache_that_cannot_be_written(tmp_path: Path, vmlinuz: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert prepare_kernel(vmlinuz, tmp_path / "file" / "cache") == vmlinuz  # where even root cannot write


def test_missing_and_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        prepare_kernel(tmp_path / "missing", tmp_path / "cache")
    path = tmp_path / "vmlinuz"
    path.write_bytes(bzimage(b"\x1f\x8b" + bytes(100)))
    with pytest.raises(BootError, match="damaged"):
        prepare_kernel(path, tmp_path / "cache")


def test_old_entries_go_when_long_unused(tmp_path: Path, vmlinuz: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    now = time.time()
    for i in range(12):
        entry = cache / f"vmlinux-{i}"
        entry.write_bytes(b"")
        os.utime(entry, (now, now - (60 if i == 0 else 7200 + i)))
    kept = prepare_kernel(vmlinuz, cache)
    left = {p.name for p in cache.iterdir()}
    assert left == {kept.name, "vmlinux-0", *(f"vmlinux-{i}" for i in range(1, 7))}


def test_two_starts_at_once(tmp_path: Path, vmlinuz: Path) -> None:
    results: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: results.append(prepare_kernel(vmlinuz, tmp_path / "c").read_bytes()))
        for _ in range(4)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == [KERNEL] * 4


def test_debian_kernel(tmp_path: Path) -> None:
    path = debian_kernel()
    if path is None:
        pytest.skip("no Debian kernel: set MOTORCADE_TEST_KERNEL or run the guest set-up")
    assert prepare_kernel(path, tmp_path).parent == tmp_path
