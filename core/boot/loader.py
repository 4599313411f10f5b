"""Loads a kernel and its initrd into guest memory and says how the boot processor enters it.

Two ways in. An ELF kernel with a PVH note, and a bzImage whose payload is one, are loaded as they will run and
entered at the note's 32-bit address. Any other bzImage is loaded packed and entered at its 64-bit entry, where it
unpacks itself. The first is preferred: the guest need not unpack 50 MB, which the host has done once
(motorcade.core.boot.unpack). Its price: the kernel's own address randomization (KASLR) is a step of that
unpacking, so a kernel entered by its note runs where it was linked.
"""

from __future__ import annotations

from collections.abc import Sequence

from motorcade.core.boot import bzimage, elf, layout, pvh, unpack
from motorcade.core.boot.entry import Entry, Mode
from motorcade.core.boot.error import BootError, mib
from motorcade.core.boot.image import BytesImage, FileImage, Image
from motorcade.core.boot.layout import Range
from motorcade.proto.memory import PAGE, GuestMemory


def load(
    memory: GuestMemory,
    kernel_fd: int,
    kernel_name: str,
    initrd_fd: int | None,
    initrd_name: str,
    cmdline: str,
    rsdp: int,
) -> Entry:
    """Loads the kernel (bzImage or ELF) and the initrd; both descriptors stay the caller's and may be used again.

    ``rsdp`` is the guest physical address of the ACPI root pointer, 0 without ACPI. Whatever the loaders need of
    memory is written anew, so this serves a reset as well as a first start. BootError says what is wrong with
    which file.
    """
    ranges = layout.memory_map(memory.regions)
    layout.write_reset_vector(memory)
    image: Image = FileImage(kernel_fd, kernel_name)
    initrd = FileImage(initrd_fd, initrd_name) if initrd_fd is not None else None
    header: bzimage.Header | None = None
    kernel: elf.Elf | None = None
    if image.size == 0:
        raise BootError(f"{kernel_name}: empty; a Linux bzImage or an ELF kernel is needed")
    if image.size >= 4 and image.read(0, 4) == elf.MAGIC:
        kernel = elf.parse(image)
        if kernel.pvh_entry is None:
            raise BootError(f"{kernel_name}: an ELF kernel without a PVH note (Linux: CONFIG_PVH)")
    elif bzimage.is_bzimage(image):
        header = bzimage.parse(image)
        payload = unpack.unpack_payload(image, header)
        if payload is not None:
            inner = BytesImage(payload, kernel_name)
            candidate = elf.parse(inner)
            if candidate.pvh_entry is not None:
                image, kernel = inner, candidate
    else:
        raise BootError(f"{kernel_name}: neither a Linux bzImage nor an ELF kernel")

    if kernel is not None and kernel.pvh_entry is not None:
        limit = pvh.CMDLINE_SIZE if header is None else header.cmdline_size
        cmdline_at = layout.write_cmdline(memory, cmdline, limit)
        elf.write_segments(memory, image, kernel, ranges)
        placed = _write_initrd(memory, ranges, initrd, kernel.end, 0xFFFFFFFF)
        return Entry(
            mode=Mode.PROTECTED32,
            rip=kernel.pvh_entry,
            gdt=layout.GDT,
            gdt_limit=layout.write_gdt(memory, Mode.PROTECTED32),
            rbx=pvh.write_start_info(memory, ranges, cmdline_at, placed, rsdp),
        )

    assert header is not None  # an ELF kernel without the note was refused above
    cmdline_at = layout.write_cmdline(memory, cmdline, header.cmdline_size)
    rip = bzimage.write_kernel(memory, image, header, ranges)
    placed = _write_initrd(memory, ranges, initrd, header.load_address + header.init_size, header.initrd_max)
    return Entry(
        mode=Mode.LONG64,
        rip=rip,
        gdt=layout.GDT,
        gdt_limit=layout.write_gdt(memory, Mode.LONG64),
        rsi=bzimage.write_zero_page(memory, header, ranges, cmdline_at, placed, rsdp),
        rsp=layout.STACK_TOP,
        cr3=layout.write_page_tables(memory),
    )


def _write_initrd(
    memory: GuestMemory, ranges: Sequence[Range], initrd: Image | None, kernel_end: int, highest: int
) -> Range | None:
    """Loads the initrd as high as it may be below 3 GiB, away from a kernel that grows upwards.

    ``highest`` is the address its last byte may have.
    """
    if initrd is None:
        return None
    if initrd.size == 0:
        raise BootError(f"{initrd.name}: the initrd is empty")
    low = next(r for r in ranges if r.start == layout.ONE_MIB)
    top = min(low.end, highest + 1)
    start = (top - initrd.size) & ~(PAGE - 1)
    # Linux maps and frees an initrd in whole pages, so the kernel's last page is not shared with it either.
    bottom = max(layout.ONE_MIB, -(-kernel_end // PAGE) * PAGE)
    if start < bottom:
        raise BootError(
            f"{initrd.name}: the initrd of {mib(initrd.size)} does not fit: {max(0, top - bottom) >> 20} MiB are free"
            f" between the kernel and {mib(top)}; give the machine more memory"
        )
    initrd.read_into(memory.view(start, initrd.size), 0)
    return Range(start, initrd.size, layout.E820_RAM)
