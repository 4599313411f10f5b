"""Guest physical memory at boot: what firmware would say about it, and where the loaders put their tables.

Everything of the loaders lies below 0x9fc00 in usable RAM. A kernel copies what it needs before it allocates
(Linux: ``copy_bootdata``), so none of it has to stay reserved.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from motorcade.core import pm
from motorcade.core.boot.entry import Mode
from motorcade.core.boot.error import BootError, mib
from motorcade.proto.memory import PAGE, GuestMemory, Region

GDT = 0x1000
TSS = 0x2000  # 104 bytes of zeros: some processors check that TR points at something
PVH_INFO = 0x3000
PVH_MODULES = 0x3100
PVH_MEMMAP = 0x3200
ZERO_PAGE = 0x4000
PAGE_TABLES = 0x5000  # PML4, PDPT and four page directories
STACK_TOP = 0xC000  # one page below it
CMDLINE = 0x10000
CMDLINE_END = 0x20000
BOOT_END = CMDLINE_END  # nothing of a kernel may lie below

LOW_END = 0x9FC00  # where conventional memory ends on a PC; the EBDA would follow
FIRMWARE = 0xE0000  # the ACPI tables; readers without an RSDP address search from here
RESET_VECTOR = 0xFFFF0  # where a processor starts in real mode; 16 bytes
ONE_MIB = 0x100000

E820_RAM = 1
E820_RESERVED = 2


@dataclass(frozen=True)
class Range:
    """``size`` bytes at ``start`` of E820 type ``kind``; PVH's memory map uses the same numbers."""

    start: int
    size: int
    kind: int

    @property
    def end(self) -> int:
        return self.start + self.size


def memory_map(regions: Sequence[Region]) -> list[Range]:
    """What firmware would report for these regions, the first of which is at 0."""
    first = regions[0]
    if first.gpa != 0 or first.size <= ONE_MIB:
        raise BootError(f"{mib(first.size)} of RAM: a kernel needs more than 1 MiB")
    return [
        Range(0, LOW_END, E820_RAM),
        Range(LOW_END, 0xA0000 - LOW_END, E820_RESERVED),
        Range(FIRMWARE, ONE_MIB - FIRMWARE, E820_RESERVED),
        Range(ONE_MIB, first.size - ONE_MIB, E820_RAM),
        *(Range(r.gpa, r.size, E820_RAM) for r in regions[1:]),
    ]


def loadable(ranges: Sequence[Range], start: int, size: int) -> bool:
    """Whether a kernel may have ``size`` bytes at ``start``: usable RAM without the loaders' own tables."""
    return any(r.kind == E820_RAM and max(r.start, BOOT_END) <= start and start + size <= r.end for r in ranges)


def write_reset_vector(memory: GuestMemory) -> None:
    """Puts a firmware's last resort where real mode expects it: code that resets the machine.

    Linux jumps there to reboot when the platform is hardware-reduced and it was not started by EFI: it then tries
    EFI first and the BIOS second, and never reads the FADT's reset register (Linux, arch/x86/kernel/reboot.c,
    reboot_init).
    """
    code = (
        b"\xba" + (pm.BASE + pm.RESET).to_bytes(2, "little")  # mov dx, port
        + bytes([0xB0, pm.RESET_VALUE])  # mov al, value
        + b"\xee"  # out dx, al
        + b"\xfa\xf4\xeb\xfd"  # cli; hlt; jmp back to hlt
    )  # fmt: skip
    memory.write(RESET_VECTOR, code)


def write_gdt(memory: GuestMemory, mode: Mode) -> int:
    """Writes the GDT and TSS for ``mode`` and gives the GDT's limit (Intel SDM volume 3, section 3.4.5).

    CS is 0x10 and DS 0x18 as the Linux boot protocol wants; 0x20 is the busy TSS, two entries long in long mode.
    """
    code = 0x00AF9B000000FFFF if mode is Mode.LONG64 else 0x00CF9B000000FFFF
    tss = 0x0000_8B00_0000_0067 | TSS << 16
    entries = [0, 0, code, 0x00CF93000000FFFF, tss, 0]
    memory.write(GDT, struct.pack("<6Q", *entries))
    memory.write(TSS, bytes(0x68))
    return 8 * len(entries) - 1


def write_page_tables(memory: GuestMemory) -> int:
    """Maps the first 4 GiB one to one with 2 MiB pages and gives the value for CR3.

    2 MiB and not 1 GiB pages: every processor with long mode has them. RAM above 4 GiB is not mapped; neither
    kernel, zero page, command line nor initrd are ever placed there.
    """
    present_write = 0x3
    large = 0x80
    pml4, pdpt, directories = PAGE_TABLES, PAGE_TABLES + PAGE, PAGE_TABLES + 2 * PAGE
    memory.write(pml4, struct.pack("<Q", pdpt | present_write) + bytes(PAGE - 8))
    tops = [directories + i * PAGE | present_write for i in range(4)]
    memory.write(pdpt, struct.pack("<4Q", *tops) + bytes(PAGE - 32))
    leaves = [i << 21 | present_write | large for i in range(2048)]
    memory.write(directories, struct.pack("<2048Q", *leaves))
    return pml4


def write_cmdline(memory: GuestMemory, cmdline: str, limit: int) -> int:
    """Puts the command line with its final NUL into guest memory; gives its address.

    ``limit`` is how many bytes the kernel takes, without the NUL. BootError where it is longer or has a NUL in it.
    """
    data = cmdline.encode()
    limit = min(limit, CMDLINE_END - CMDLINE - 1)
    if len(data) > limit:
        raise BootError(f"the kernel command line is {len(data)} bytes long, this kernel takes {limit}")
    if b"\0" in data:
        raise BootError("the kernel command line contains a NUL byte")
    memory.write(CMDLINE, data + b"\0")
    return CMDLINE
