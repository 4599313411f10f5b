"""Which of a zygote's pages a VM's processes write to, so that those that wait can copy them ahead.

A process that was forked shares its parent's pages until it writes to one: CPython does so wherever it counts a
reference, and the fault costs more than the copy. All processes from one zygote have the same objects at the same
addresses, and those of one kind do the same until their VM runs. So the pages that one of them had to copy are looked
up once (proc_pid_pagemap(5)), and the next ones copy them in a few system calls, while nobody waits for them.
"""

from __future__ import annotations

import array
import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from motorcade.proto.memory import PAGE

Ranges = list[tuple[int, int]]
"""Address and size in bytes, in whole pages."""
Footprint = dict[str, Ranges]
"""By kind of process: "supervisor", "core", "pager", "blk" and so on."""

_EXCLUSIVE, _PRESENT = 1 << 56, 1 << 63  # bits of a pagemap entry: mapped here alone (Linux 4.2); in memory
_MADV_POPULATE_WRITE = 23  # asm-generic/mman-common.h, Linux 5.14; the number is part of the kernel's ABI
_MAX_RANGES = 4096

_madvise = ctypes.CDLL(None, use_errno=True).madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def learn(supervisor: int) -> Footprint:
    """Of the processes of a VM that a child of this process runs; empty where it is gone, or may not be looked at."""
    ours = list(_writable())
    footprint: Footprint = {}
    try:
        children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
        footprint["supervisor"] = _copied(supervisor, ours)
        for pid in map(int, children):
            # spawn.title: "motorcade: blk-root (web)"
            role = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split()[1:2]
            footprint["".join(role).partition("-")[0]] = _copied(pid, ours)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return {}
    return footprint


def copy_ahead(ranges: Ranges) -> None:
    """Gives this process copies of its own of these pages, as a write to each would. Before Linux 5.14: does nothing.

    Errors: OSError, where there is no memory for them.
    """
    for address, size in ranges:
        if _madvise(address, size, _MADV_POPULATE_WRITE) == 0:
            continue
        number = ctypes.get_errno()
        if number == errno.EINVAL:
            return
        if number != errno.ENOMEM or _is_mapped(address, size):  # what is not mapped any more need not be copied
            raise OSError(number, os.strerror(number))


def _is_mapped(address: int, size: int) -> bool:
    return any(start <= address and address + size <= end for start, end in _writable())


def _writable() -> Iterator[tuple[int, int]]:
    """This process's private writable mappings: start and end."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        where, rights = line.split(maxsplit=2)[:2]
        if rights == "rw-p":
            start, _, end = where.partition("-")
            yield int(start, 16), int(end, 16)


def _copied(pid: int, mappings: list[tuple[int, int]]) -> Ranges:
    """The pages in ``mappings``, addresses that it shares with us, that the process has for itself."""
    found: Ranges = []
    with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as file:
        for start, end in mappings:
            file.seek(start // PAGE * 8)
            entries = array.array("Q", file.read((end - start) // PAGE * 8))
            for n, entry in enumerate(entries):
                if entry & _PRESENT and entry & _EXCLUSIVE:
                    address = start + n * PAGE
                    if found and sum(found[-1]) == address:
                        found[-1] = (found[-1][0], found[-1][1] + PAGE)
                    else:
                        found.append((address, PAGE))
    return found[:_MAX_RANGES]
