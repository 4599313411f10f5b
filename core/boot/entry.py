"""Where and how the boot processor starts: what the loaders hand to the vCPU code."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Mode(enum.Enum):
    """The processor mode that the boot protocol asks for."""

    PROTECTED32 = "protected32"  # PVH: paging off, flat 32-bit segments, CR0.PE
    LONG64 = "long64"  # Linux 64-bit boot protocol: long mode, identity mapping at cr3


@dataclass(frozen=True)
class Entry:
    """The boot processor's registers at its first instruction; those not named are 0, RFLAGS is 2.

    Segments: CS is 0x10 and DS, ES, SS are 0x18, flat, as the Linux boot protocol wants; TR is a busy TSS.
    The loaders leave a matching GDT in guest memory at ``gdt``.
    """

    mode: Mode
    rip: int
    gdt: int  # guest physical address of the GDT
    gdt_limit: int  # bytes - 1
    rsi: int = 0  # Linux: the zero page
    rbx: int = 0  # PVH: the hvm_start_info
    rsp: int = 0
    cr3: int = 0  # LONG64: the top page table
