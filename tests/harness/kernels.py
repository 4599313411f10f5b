"""Kernel images made up for tests: ELF files with a PVH note, and bzImages around any payload."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def debian_kernel() -> Path | None:
    """Debian's unmodified kernel: $MOTORCADE_TEST_KERNEL, or what the guest set-up unpacked; None without."""
    named = os.environ.get("MOTORCADE_TEST_KERNEL")
    if named:
        return Path(named)
    found = REPO / ".cache/guest/kernel/vmlinuz"
    return found if found.exists() else None


@dataclass(frozen=True)
class Part:
    """A segment of an ELF kernel: ``data`` at ``address``, zeros up to ``size`` (default: no zeros)."""

    address: int
    data: bytes
    size: int | None = None


def note(entry: int, *, name: bytes = b"Xen\0", kind: int = 18, width: int = 8) -> bytes:
    """An ELF note that gives the PVH entry."""
    return (
        struct.pack("<III", len(name), width, kind)
        + name.ljust(-(-len(name) // 4) * 4, b"\0")
        + entry.to_bytes(width, "little")
    )


def elf(parts: Sequence[Part], notes: bytes | None, *, wide: bool = True, machine: int = 62, kind: int = 2) -> bytes:
    """An ELF executable of 64 (``wide``) or 32 bits with these segments and this note segment."""
    head_size, entry_size = (64, 56) if wide else (52, 32)
    count = len(parts) + (notes is not None)
    at = head_size + entry_size * count
    table, body = b"", b""
    for p in [*parts, *([Part(0, notes)] if notes is not None else [])]:
        type_ = 1 if len(table) < entry_size * len(parts) else 4
        size = len(p.data) if p.size is None else p.size
        offset = at + len(body)
        if wide:
            table += struct.pack("<IIQQQQQQ", type_, 7, offset, p.address, p.address, len(p.data), size, 4)
        else:
            table += struct.pack("<8I", type_, offset, p.address, p.address, len(p.data), size, 7, 4)
        body += p.data
    ident = b"\x7fELF" + bytes([2 if wide else 1, 1, 1]) + bytes(9)
    head = ident + struct.pack("<HHI", kind, machine, 1)
    if wide:
        head += struct.pack("<QQQIHHHHHH", 0, 64, 0, 0, 64, 56, count, 0, 0, 0)
    else:
        head += struct.pack("<IIIIHHHHHH", 0, 52, 0, 0, 52, 32, count, 0, 0, 0)
    return head + table + body


def bzimage(
    payload: bytes,
    *,
    version: int = 0x20F,
    setup_sects: int = 3,
    cmdline_size: int = 2047,
    initrd_max: int = 0x7FFFFFFF,
    xloadflags: int = 0x7F,
    loadflags: int = 0x01,
    pref_address: int = 0x1000000,
    init_size: int | None = None,
    header_end: int = 0x6A,
    boot_flag: int = 0xAA55,
    payload_size: int | None = None,
) -> bytes:
    """A bzImage: boot sector, setup sectors, then 0x300 bytes of protected-mode code and the payload."""
    code = b"\x90" * 0x300 + payload
    code += bytes(-len(code) % 16)
    head = bytearray((setup_sects + 1) * 512)
    struct.pack_into("<B", head, 0x1F1, setup_sects)
    struct.pack_into("<I", head, 0x1F4, len(code) // 16)
    struct.pack_into("<H", head, 0x1FE, boot_flag)
    struct.pack_into("<BB4sH", head, 0x200, 0xEB, header_end, b"HdrS", version)
    struct.pack_into("<B", head, 0x211, loadflags)
    struct.pack_into("<I", head, 0x22C, initrd_max)
    struct.pack_into("<IBBHI", head, 0x230, 0x200000, 1, 21, xloadflags, cmdline_size)
    struct.pack_into("<II", head, 0x248, 0x300, len(payload) if payload_size is None else payload_size)
    struct.pack_into("<QI", head, 0x258, pref_address, max(len(code), 1 << 20) if init_size is None else init_size)
    return bytes(head) + code
