"""Loading kernels: what ends up in guest memory, how it is entered, and every way in which a file can be wrong."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness.kernels import Part, bzimage, debian_kernel, elf, note
from motorcade.core.boot import BootError, Entry, Mode, load
from motorcade.core.boot.image import FileImage
from motorcade.proto.memory import GuestMemory, layout

MIB = 1 << 20
ENTRY = 0x1000010
RSDP = 0xE0000


@contextmanager
def guest_memory(size: int) -> Iterator[GuestMemory]:
    fd = os.memfd_create("test-ram", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        yield GuestMemory(fd, layout(size))
    finally:
        os.close(fd)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with guest_memory(64 * MIB) as m:
        yield m


Loader = Callable[..., Entry]


@pytest.fixture
def boot(tmp_path: Path) -> Loader:
    """load() on files made of the bytes given."""

    def run(memory: GuestMemory, kernel: bytes, initrd: bytes | None = None, cmdline: str = "console=ttyS0") -> Entry:
        (tmp_path / "kernel").write_bytes(kernel)
        (tmp_path / "initrd").write_bytes(initrd or b"")
        with (tmp_path / "kernel").open("rb") as k, (tmp_path / "initrd").open("rb") as i:
            fd = i.fileno() if initrd is not None else None
            return load(memory, k.fileno(), "kernel", fd, "initrd", cmdline, RSDP)

    return run


def pvh_kernel(wide: bool = True, width: int = 8) -> bytes:
    parts = [Part(0x1000000, b"\xf4" * 32), Part(0x1200000, b"data", 3 * MIB)]
    return elf(parts, note(7, kind=6) + note(ENTRY, width=width), wide=wide, machine=62 if wide else 3)


def cstring(memory: GuestMemory, at: int) -> bytes:
    return memory.read(at, 4096).split(b"\0")[0]


def memory_map(memory: GuestMemory, info: int) -> list[tuple[int, int, int]]:
    at, count = struct.unpack("<QI", memory.read(info + 40, 12))
    return [struct.unpack("<QQI", memory.read(at + 24 * i, 20)) for i in range(count)]


@pytest.mark.parametrize(("wide", "width"), [(True, 8), (True, 4), (False, 4)])
def test_pvh_elf(memory: GuestMemory, boot: Loader, wide: bool, width: int) -> None:
    memory.write(0x1200000, b"\xaa" * (3 * MIB))  # the machine has run before: its BSS is not fresh
    entry = boot(memory, pvh_kernel(wide, width), b"I" * 5000)
    assert (entry.mode, entry.rip) == (Mode.PROTECTED32, ENTRY)
    assert memory.read(0x1000000, 33) == b"\xf4" * 32 + b"\0"
    assert memory.read(0x1200000, 3 * MIB) == b"data" + bytes(3 * MIB - 4)
    info = struct.unpack("<IIIIQQQ", memory.read(entry.rbx, 40))
    assert info[:4] == (0x336EC578, 1, 0, 1)
    assert info[6] == RSDP
    assert cstring(memory, info[5]) == b"console=ttyS0"
    start, size, cmdline, _ = struct.unpack("<QQQQ", memory.read(info[4], 32))
    assert (start, size, cmdline) == (64 * MIB - 8192, 5000, 0)
    assert memory.read(start, 5000) == b"I" * 5000
    assert memory_map(memory, entry.rbx) == [
        (0, 0x9FC00, 1),
        (0x9FC00, 0x400, 2),
        (0xE0000, 0x20000, 2),
        (MIB, 63 * MIB, 1),
    ]


def test_pvh_without_initrd(memory: GuestMemory, boot: Loader) -> None:
    entry = boot(memory, pvh_kernel())
    assert struct.unpack("<IQ", memory.read(entry.rbx + 12, 4) + memory.read(entry.rbx + 16, 8)) == (0, 0)


def test_gdt_has_the_segments_of_the_boot_protocol(memory: GuestMemory, boot: Loader) -> None:
    for kernel, code in ((pvh_kernel(), 0x00CF9B000000FFFF), (bzimage(b"not packed" * 9), 0x00AF9B000000FFFF)):
        entry = boot(memory, kernel)
        gdt = struct.unpack(f"<{(entry.gdt_limit + 1) // 8}Q", memory.read(entry.gdt, entry.gdt_limit + 1))
        assert gdt[2:4] == (code, 0x00CF93000000FFFF)
        tss = gdt[4]
        assert tss >> 40 & 0xFF == 0x8B  # present, busy
        base = tss >> 16 & 0xFFFFFF
        assert memory.read(base, 0x68) == bytes(0x68)


def test_ram_above_4_gib_is_in_the_map_and_the_initrd_below_3(boot: Loader) -> None:
    with guest_memory(4096 * MIB) as memory:
        entry = boot(memory, pvh_kernel(), b"I" * 4096)
        assert memory_map(memory, entry.rbx)[3:] == [(MIB, 3071 * MIB, 1), (4096 * MIB, 1024 * MIB, 1)]
        modules = struct.unpack("<Q", memory.read(entry.rbx + 16, 8))[0]
        assert struct.unpack("<Q", memory.read(modules, 8))[0] == 3072 * MIB - 4096


def test_bzimage_by_its_64_bit_entry(memory: GuestMemory, boot: Loader) -> None:
    kernel = bzimage(b"something the host cannot unpack", initrd_max=0x2FFFFFF)
    entry = boot(memory, kernel, b"I" * 100, "root=/dev/vda ü")
    assert (entry.mode, entry.rip) == (Mode.LONG64, 0x1000200)
    assert memory.read(0x1000000, len(kernel) - 2048) == kernel[2048:]
    zero_page = memory.read(entry.rsi, 4096)
    assert zero_page[0x202:0x208] == b"HdrS\x0f\x02"
    assert zero_page[0x210] == 0xFF
    assert struct.unpack_from("<Q", zero_page, 0x70) == (RSDP,)
    assert struct.unpack_from("<II", zero_page, 0x218) == (0x3000000 - 4096, 100)
    assert memory.read(0x3000000 - 4096, 100) == b"I" * 100
    assert cstring(memory, struct.unpack_from("<I", zero_page, 0x228)[0]) == "root=/dev/vda ü".encode()
    assert zero_page[0x1E8] == 4
    assert struct.unpack_from("<QQI", zero_page, 0x2D0 + 60) == (MIB, 63 * MIB, 1)
    assert not any(zero_page[:0x70])  # no video mode that was never set


def test_reset_vector_writes_the_reset_register(memory: GuestMemory, boot: Loader) -> None:
    boot(memory, pvh_kernel())
    code = memory.read(0xFFFF0, 16)
    assert code[:6] == bytes.fromhex("ba0606 b042 ee")  # mov dx, 0x606; mov al, 0x42; out dx, al


def walk(memory: GuestMemory, cr3: int, address: int) -> int:
    table = cr3
    for shift in (39, 30, 21):
        (entry,) = struct.unpack("<Q", memory.read(table + 8 * (address >> shift & 511), 8))
        assert entry & 3 == 3
        table = entry & 0x000FFFFFFFFFF000
    assert entry & 0x80
    return table + (address & 0x1FFFFF)


def test_page_tables_map_4_gib_one_to_one(memory: GuestMemory, boot: Loader) -> None:
    entry = boot(memory, bzimage(b"not packed" * 9))
    for address in (0, entry.rsi, entry.rip, 3 << 30, 0xD0000000, 0xFFFFFFFF):
        assert walk(memory, entry.cr3, address) == address


def test_debian_kernel_is_entered_by_its_note(boot: Loader) -> None:
    path = debian_kernel()
    if path is None:
        pytest.skip("no Debian kernel: set MOTORCADE_TEST_KERNEL or run the guest set-up")
    with guest_memory(256 * MIB) as memory:
        entry = boot(memory, path.read_bytes(), b"I" * MIB)
        assert entry.mode is Mode.PROTECTED32
        assert 0x1000000 <= entry.rip < 0x8000000
        assert memory.read(entry.rip, 16) != bytes(16)


SMALL = [Part(0x1000000, b"\xf4" * 32)]


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (b"", "kernel: empty"),
        (b"ab", "neither a Linux bzImage nor an ELF"),
        (b"#!/bin/sh\n" * 100, "neither a Linux bzImage nor an ELF"),
        (bytes(100_000), "neither"),
        (b"\x7fELF", "truncated"),
        (pvh_kernel()[:100], "truncated"),
        (pvh_kernel()[:-30], "truncated: a segment"),
        (elf(SMALL, None), "without a PVH note"),
        (elf(SMALL, note(ENTRY, name=b"GNU\0")), "without a PVH note"),
        (elf(SMALL, note(ENTRY)[:14]), "without a PVH note"),
        (elf(SMALL, struct.pack("<III", 0xFFFFFFFF, 0xFFFFFFFF, 18)), "without a PVH note"),
        (elf([], note(ENTRY)), "nothing to load"),
        (elf(SMALL, note(0x5000)), "PVH entry 0x5000 is outside"),
        (elf(SMALL, note(ENTRY), machine=183), "machine 183"),
        (elf(SMALL, note(ENTRY), kind=1), "type 1"),
        (b"\x7fELF\x02\x02" + elf(SMALL, note(ENTRY))[6:], "little-endian"),
        (elf([Part(0x1000000, bytes(32)), Part(0x1000010, b"x")], note(ENTRY)), "overlap"),
        (elf([Part(0x1000000, bytes(32), 16)], note(ENTRY)), "32 bytes in the file but only 16"),
        (elf([*SMALL, Part(0x4000000, b"x")], note(ENTRY)), "0x4000000, which is not in .*usable RAM .64 MiB"),
        (elf([*SMALL, Part(0x3FFF000, b"x", MIB)], note(ENTRY)), "not in the machine's usable RAM"),
        (elf([*SMALL, Part(0x1000, b"x")], note(ENTRY)), "0x1000, which is not"),
        (elf([*SMALL, Part(0x9F000, b"x", 0x2000)], note(ENTRY)), "0x9f000, which is not"),
        (elf([*SMALL, Part((1 << 64) - 4096, b"x", 8192)], note(ENTRY)), "which is not"),
        (elf([*SMALL, Part(0x2000000, b"x", 1 << 63)], note(ENTRY)), "which is not"),
        (bzimage(b"x" * 64)[:0x210], "truncated"),
        (bzimage(b"x" * 64)[:-16], "truncated: its header says"),
        (bzimage(b"x" * 64, version=0x20B), "boot protocol 2.11"),
        (bzimage(b"x" * 64, boot_flag=0), "boot flag"),
        (bzimage(b"x" * 64, loadflags=0), "a zImage"),
        (bzimage(b"x" * 64, header_end=0x10), "setup header ends"),
        (bzimage(b"x" * 64, header_end=0xFF), "setup header ends"),
        (bzimage(b"x" * 64, xloadflags=0), "32-bit kernel"),
        (bzimage(b"x" * 64, payload_size=1 << 20), "payload reaches past"),
        (bzimage(b"x" * 64, init_size=64), "init_size 64 is smaller"),
        (bzimage(b"x" * 64, init_size=49 * MIB), "needs 49 MiB at 0x1000000"),
        (bzimage(b"x" * 64, pref_address=1 << 40), "not in the machine's usable RAM"),
    ],
)
def test_bad_kernel(memory: GuestMemory, boot: Loader, kernel: bytes, message: str) -> None:
    with pytest.raises(BootError, match=message) as caught:
        boot(memory, kernel)
    assert str(caught.value).startswith("kernel: ")


def test_initrd_that_does_not_fit(memory: GuestMemory, boot: Loader) -> None:
    top_of_bss = 0x1200000 + 3 * MIB  # 21 MiB
    fits = bytes(64 * MIB - top_of_bss)
    boot(memory, pvh_kernel(), fits)
    with pytest.raises(BootError, match=r"initrd: the initrd of 43\.1 MiB does not fit: 43 MiB are free"):
        boot(memory, pvh_kernel(), fits + b"x")
    with pytest.raises(BootError, match="does not fit: 0 MiB are free"):
        boot(memory, bzimage(b"x" * 64, initrd_max=0xFFFFFF), b"x")
    with pytest.raises(BootError, match="initrd: the initrd is empty"):
        boot(memory, pvh_kernel(), b"")


def test_command_line_bounds(memory: GuestMemory, boot: Loader) -> None:
    boot(memory, bzimage(b"x" * 64, cmdline_size=100), cmdline="a" * 100)
    with pytest.raises(BootError, match="101 bytes long, this kernel takes 100"):
        boot(memory, bzimage(b"x" * 64, cmdline_size=100), cmdline="a" * 101)
    with pytest.raises(BootError, match="takes 2047"):
        boot(memory, pvh_kernel(), cmdline="a" * 2048)
    with pytest.raises(BootError, match="takes 65535"):
        boot(memory, bzimage(b"x" * 64, cmdline_size=1 << 31), cmdline="a" * 70000)
    with pytest.raises(BootError, match="NUL"):
        boot(memory, pvh_kernel(), cmdline="a\0b")


def test_less_than_a_mebibyte_of_ram(boot: Loader) -> None:
    with guest_memory(MIB) as memory, pytest.raises(BootError, match="1 MiB of RAM"):
        boot(memory, pvh_kernel())


def test_a_file_that_shrinks_or_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(bytes(8192))
    with path.open("r+b") as f:
        image = FileImage(f.fileno(), "kernel")
        f.truncate(4096)
        with pytest.raises(BootError, match="kernel: truncated: 8192 bytes"):
            image.read(0, 8192)
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(BootError, match="cannot be read: Is a directory"):
            FileImage(directory, "kernel").read(0, 1)
    finally:
        os.close(directory)
