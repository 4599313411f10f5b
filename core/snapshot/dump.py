"""Guest memory as an ELF core file, which gdb, drgn and crash open: what dump-guest-memory writes.

    start = dump.start(cpus, regions)
    ... RamWriter(memfd, size, fd, start=start) writes all of RAM ...
    dump.finish(fd, memory.regions, vcpus)

A debugger of Linux kernels wants to know what it has before it: the kernel's VMCOREINFO note. QEMU's guests hand it
over through a device; here it is found in the dump itself, where every kernel since 4.13 keeps it in a page of its own.
So a guest needs no driver, and none has to be loaded before the crash. Which kernel's it is, where several have left
one (kexec, a reboot), the address that system calls enter at tells.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from motorcade.core._native import ffi, lib
from motorcade.core.kvm import Record, from_record
from motorcade.core.vcpustate import msr_values
from motorcade.proto.memory import PAGE, Region

_STEXT = re.compile(rb"^SYMBOL\(_stext\)=([0-9a-f]{1,16})$", re.MULTILINE)
_KERNEL_MAX = 1 << 30  # bytes that a kernel's image may span (arch/x86/include/asm/page_64_types.h, KERNEL_IMAGE_SIZE)
_MOST_NOTES = 64  # that are looked at: a guest may have put a million there


@dataclass(frozen=True)
class Vcpu:
    """What a debugger is told of a vCPU."""

    native: Any  # struct mc_dump_vcpu
    lstar: int

    @classmethod
    def of(cls, records: Sequence[Record]) -> Vcpu:
        """From what Vcpu.save gave."""
        by_name: Mapping[str, bytes] = dict(records)
        msrs = msr_values(by_name["msrs"])
        vcpu = ffi.new("struct mc_dump_vcpu *")
        vcpu.regs = from_record("struct kvm_regs", "regs", by_name["regs"])[0]
        vcpu.sregs = from_record("struct kvm_sregs", "sregs", by_name["sregs"])[0]
        vcpu.kernel_gs_base = msrs.get(lib.MC_MSR_KERNEL_GS_BASE, 0)
        return cls(vcpu, msrs.get(lib.MC_MSR_LSTAR, 0))


def start(vcpus: int, regions: int) -> int:
    """Where RAM begins in the file, in bytes."""
    return int(lib.mc_dump_start(vcpus, regions))


def finish(fd: int, regions: Sequence[Region], vcpus: Sequence[Vcpu]) -> None:
    """Puts what belongs there before the RAM in the file ``fd``, the caller's, for good. Blocks. Errors: OSError."""
    view = memoryview(head(fd, regions, vcpus))
    written = 0
    while written < len(view):
        written += os.pwrite(fd, view[written:], written)
    os.fsync(fd)


def head(fd: int, regions: Sequence[Region], vcpus: Sequence[Vcpu]) -> bytes:
    """What stands before RAM in the file ``fd``, which has RAM already. Moves its offset. Errors: OSError."""
    size = sum(region.size for region in regions)
    begin = start(len(vcpus), len(regions))
    info = vmcoreinfo(fd, begin, size, [vcpu.lstar for vcpu in vcpus])
    out = ffi.new("uint8_t[]", begin)
    native_vcpus = ffi.new("struct mc_dump_vcpu[]", [vcpu.native[0] for vcpu in vcpus])
    native_regions = ffi.new("struct mc_dump_region[]", [(r.gpa, r.size, r.offset) for r in regions])
    end = lib.mc_dump_head(out, native_vcpus, len(vcpus), native_regions, len(regions), info, len(info))
    return bytes(ffi.buffer(out, end))


def vmcoreinfo(fd: int, begin: int, size: int, entries: Sequence[int]) -> bytes:
    """The text of the running kernel's VMCOREINFO note in the RAM from ``begin`` in ``fd``; empty where there is none.

    ``entries``: where the vCPUs' system calls enter. Errors: OSError.
    """
    found = list(_vmcoreinfos(fd, begin, size))
    for text in found:
        match = _STEXT.search(text)
        if match is not None and any(int(match[1], 16) <= entry < int(match[1], 16) + _KERNEL_MAX for entry in entries):
            return text
    return found[0] if found else b""


def _vmcoreinfos(fd: int, begin: int, size: int) -> Iterator[bytes]:
    """Those that could be a Linux kernel's, in the order of their addresses."""
    out, length = ffi.new("char[]", lib.MC_DUMP_VMCOREINFO_MAX), ffi.new("uint32_t *")
    at = 0
    for _ in range(_MOST_NOTES):
        at = lib.mc_dump_find_vmcoreinfo(fd, begin, size, at, out, length)
        if at < 0:
            raise OSError(-at, os.strerror(-at))
        if at >= size:
            return
        text = bytes(ffi.buffer(out, length[0]))
        if text.startswith(b"OSRELEASE=") and b"\nPAGESIZE=" in text:
            yield text
        at += PAGE
