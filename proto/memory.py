"""Guest memory as the processes share it: regions of one memfd, mapped by each that needs them."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass

LOW_END = 3 << 30  # RAM below 4 GiB ends here at the latest; the MMIO hole follows
HIGH_START = 4 << 30
PAGE = 4096


@dataclass(frozen=True)
class Region:
    """A run of guest RAM: ``size`` bytes at guest physical address ``gpa``, at ``offset`` in the memfd."""

    gpa: int
    size: int
    offset: int


def layout(size: int) -> list[Region]:
    """The regions of a machine with ``size`` bytes of RAM (a multiple of the page size)."""
    if size <= 0 or size % PAGE:
        raise ValueError(f"RAM size {size} is not a positive multiple of {PAGE}")
    low = min(size, LOW_END)
    regions = [Region(0, low, 0)]
    if size > low:
        regions.append(Region(HIGH_START, size - low, low))
    return regions


class GuestMemory:
    """This process's shared mapping of guest RAM. It does not own ``fd``, which may be closed afterwards.

    ``lazy``: it is going to be filled on demand (sidecars/lazymem.py).
    """

    def __init__(self, fd: int, regions: Sequence[Region], *, lazy: bool = False) -> None:
        self.regions = tuple(regions)
        self.page_size = os.fstatvfs(fd).f_bsize  # bytes of what its file is made of: more than PAGE on hugetlbfs
        self._maps = [
            mmap.mmap(fd, r.size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=r.offset) for r in regions
        ]
        for m in self._maps:
            m.madvise(mmap.MADV_DONTDUMP)
            _advise(m, mmap.MADV_NOHUGEPAGE if lazy else mmap.MADV_HUGEPAGE)

    def host_address(self, index: int) -> int:
        """Where region ``index`` is mapped in this process."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self._maps[index]))

    def view(self, gpa: int, size: int) -> memoryview:
        """The bytes at ``gpa``; ValueError where any of them is not RAM. The guest may change them meanwhile."""
        for region, mapping in zip(self.regions, self._maps, strict=True):
            start = gpa - region.gpa
            if start >= 0 and start + size <= region.size:
                return memoryview(mapping)[start : start + size]
        raise ValueError(f"guest physical {gpa:#x}+{size:#x} is not RAM")

    def read(self, gpa: int, size: int) -> bytes:
        """A copy of ``size`` bytes at ``gpa``."""
        return bytes(self.view(gpa, size))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Copies ``data`` to ``gpa``."""
        self.view(gpa, len(data))[:] = data

    @property
    def size(self) -> int:
        """Bytes of RAM."""
        return sum(r.size for r in self.regions)


def _advise(mapping: mmap.mmap, advice: int) -> None:
    """MADV_HUGEPAGE lets a guest's first touches cost one fault in 2 MiB instead of 512, where the host allows it for
    memfds (/sys/kernel/mm/transparent_hugepage/shmem_enabled: advise); booting Linux touches some 17000 pages.

    Memory that is filled on demand needs MADV_NOHUGEPAGE: up to Linux 6.3 khugepaged may put a huge page over a range
    with userfaultfd, with zeros where a page was still to come, and nobody would ever ask for that page.
    """
    try:
        mapping.madvise(advice)
    except OSError as e:
        if e.errno != errno.EINVAL:  # a kernel built without them
            raise
