"""The PVH start info (Xen, public/arch-x86/hvm/start_info.h, version 1): how an ELF kernel learns of its machine."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from motorcade.core.boot.layout import PVH_INFO, PVH_MEMMAP, PVH_MODULES, Range
from motorcade.proto.memory import GuestMemory

CMDLINE_SIZE = 2047  # Linux's COMMAND_LINE_SIZE on x86 without the NUL; the ELF file does not tell
_MAGIC = 0x336EC578
_VERSION = 1


def write_start_info(
    memory: GuestMemory, ranges: Sequence[Range], cmdline: int, initrd: Range | None, rsdp: int
) -> int:
    """Writes hvm_start_info, its module list and memory map; gives the address for EBX."""
    modules = 0
    if initrd is not None:
        modules = 1
        memory.write(PVH_MODULES, struct.pack("<QQQQ", initrd.start, initrd.size, 0, 0))
    memory.write(PVH_MEMMAP, b"".join(struct.pack("<QQII", r.start, r.size, r.kind, 0) for r in ranges))
    info = struct.pack(
        "<IIIIQQQQII",
        _MAGIC,
        _VERSION,
        0,
        modules,
        PVH_MODULES if modules else 0,
        cmdline,
        rsdp,
        PVH_MEMMAP,
        len(ranges),
        0,
    )
    memory.write(PVH_INFO, info)
    return PVH_INFO
