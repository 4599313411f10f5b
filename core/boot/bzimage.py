"""Linux's bzImage: the setup header, the packed payload, and the 64-bit boot protocol.

Source: Linux, Documentation/arch/x86/boot.rst and zero-page.rst. Kernels before boot protocol 2.12 (Linux 3.8) lack
the flag that says whether there is a 64-bit entry, and are refused.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from motorcade.core.boot.error import BootError, mib
from motorcade.core.boot.image import Image
from motorcade.core.boot.layout import ZERO_PAGE, Range, loadable
from motorcade.proto.memory import GuestMemory

_SETUP_START = 0x1F1  # the header's place in the image and in the zero page alike
_SETUP_MAX = 0x290  # where the zero page's next field begins
_MAGIC_AT = 0x202
_LEAST_VERSION = 0x20C
_LOADED_HIGH = 0x01
_XLF_KERNEL_64 = 0x01
_ENTRY_64 = 0x200


@dataclass(frozen=True)
class Header:
    """A checked setup header; sizes and offsets in bytes, ``raw`` is the header itself from 0x1f1 on."""

    raw: bytes
    kernel_offset: int  # of the protected-mode code in the file
    kernel_size: int
    payload_offset: int  # in the file
    payload_size: int
    initrd_max: int  # highest address an initrd's last byte may have
    cmdline_size: int
    has_entry_64: bool
    load_address: int
    init_size: int  # what the kernel needs from its load address on until it reads the memory map


def is_bzimage(image: Image) -> bool:
    """Whether ``image`` carries the boot protocol's magic."""
    return image.size >= _MAGIC_AT + 4 and image.read(_MAGIC_AT, 4) == b"HdrS"


def parse(image: Image) -> Header:
    """Reads the setup header of an image that ``is_bzimage``. BootError where it is not sound."""
    name = image.name
    if image.size < _SETUP_MAX:
        raise BootError(f"{name}: truncated: it ends inside its setup header")
    head = image.read(0, _SETUP_MAX)

    def field(form: str, at: int) -> int:
        return int(struct.unpack_from("<" + form, head, at)[0])

    version = field("H", 0x206)
    if field("H", 0x1FE) != 0xAA55:
        raise BootError(f"{name}: not a bzImage: its boot flag is {field('H', 0x1FE):#x}")
    if version < _LEAST_VERSION:
        raise BootError(f"{name}: boot protocol {version >> 8}.{version & 255}; 2.12 (Linux 3.8) or later is needed")
    if not field("B", 0x211) & _LOADED_HIGH:
        raise BootError(f"{name}: a zImage, which is loaded below 1 MiB; a bzImage is needed")
    end = _MAGIC_AT + field("B", 0x201)
    if not 0x264 <= end <= _SETUP_MAX:
        raise BootError(f"{name}: its setup header ends at {end:#x}")
    kernel_offset = (field("B", _SETUP_START) or 4) * 512 + 512
    kernel_size = field("I", 0x1F4) * 16
    if kernel_size == 0 or kernel_offset + kernel_size > image.size:
        raise BootError(
            f"{name}: truncated: its header says {kernel_offset + kernel_size} bytes, the file has {image.size}"
        )
    payload_offset, payload_size = struct.unpack_from("<II", head, 0x248)
    if payload_offset + payload_size > kernel_size:
        raise BootError(f"{name}: its payload reaches past the kernel's end")
    load_address, init_size = field("Q", 0x258), field("I", 0x260)
    if init_size < kernel_size:
        raise BootError(f"{name}: init_size {init_size} is smaller than the kernel itself ({kernel_size})")
    return Header(
        raw=head[_SETUP_START:end],
        kernel_offset=kernel_offset,
        kernel_size=kernel_size,
        payload_offset=kernel_offset + payload_offset,
        payload_size=payload_size,
        initrd_max=field("I", 0x22C),
        cmdline_size=field("I", 0x238),
        has_entry_64=bool(field("H", 0x236) & _XLF_KERNEL_64),
        load_address=load_address,
        init_size=init_size,
    )


def write_kernel(memory: GuestMemory, image: Image, header: Header, ranges: Sequence[Range]) -> int:
    """Loads the protected-mode code at its preferred address; gives the 64-bit entry.

    Elsewhere would not help a relocatable kernel: Linux never runs below the preferred address, and RAM that ends
    below it ends before every other place.
    """
    if not header.has_entry_64:
        raise BootError(f"{image.name}: a 32-bit kernel without a PVH entry; there is no way to start it")
    if not loadable(ranges, header.load_address, header.init_size):
        raise BootError(
            f"{image.name}: the kernel needs {mib(header.init_size)} at {header.load_address:#x}, which is not in the"
            f" machine's usable RAM ({mib(memory.size)})"
        )
    image.read_into(memory.view(header.load_address, header.kernel_size), header.kernel_offset)
    return header.load_address + _ENTRY_64


def write_zero_page(
    memory: GuestMemory, header: Header, ranges: Sequence[Range], cmdline: int, initrd: Range | None, rsdp: int
) -> int:
    """Writes ``struct boot_params`` and gives its address. Offsets: zero-page.rst and boot.rst."""
    page = bytearray(4096)
    page[_SETUP_START : _SETUP_START + len(header.raw)] = header.raw
    struct.pack_into("<Q", page, 0x70, rsdp)  # acpi_rsdp_addr
    struct.pack_into("<H", page, 0x1FA, 0xFFFF)  # vid_mode: normal
    struct.pack_into("<B", page, 0x210, 0xFF)  # type_of_loader: undefined, we have no number
    if initrd is not None:
        struct.pack_into("<II", page, 0x218, initrd.start, initrd.size)
    struct.pack_into("<I", page, 0x228, cmdline)
    struct.pack_into("<B", page, 0x1E8, len(ranges))
    for i, r in enumerate(ranges):
        struct.pack_into("<QQI", page, 0x2D0 + 20 * i, r.start, r.size, r.kind)
    memory.write(ZERO_PAGE, page)
    return ZERO_PAGE
