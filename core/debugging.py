"""Looking into a machine that runs: its memory and its vCPUs' registers, for QMP."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from motorcade.core.platform import Platform
from motorcade.core.qmp.errors import DeviceNotFound, QmpError
from motorcade.core.vcpustate import Vcpu

_GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", *(f"r{n}" for n in range(8, 16)), "rip", "rflags")
_SYSTEM = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")
_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
_TABLES = ("gdt", "idt")
_DEBUG = ("dr0", "dr1", "dr2", "dr3", "dr6", "dr7")
_MSR_MAX = 0xFFFF_FFFF


class Debugger:
    """Implements qmp.Debugger. ``still`` holds the vCPUs for as long as it is entered, unseen by clients and guest but
    for the time; it raises QmpError where they do not stop."""

    def __init__(self, platform: Platform, still: Callable[[], AbstractContextManager[None]]) -> None:
        self._platform = platform
        self._still = still

    def read_memory(self, gpa: int, size: int) -> bytes:
        """See qmp.Debugger, as below."""
        try:
            return self._platform.memory.read(gpa, size)
        except ValueError as e:
            raise QmpError(str(e)) from None

    def register(self, vcpu: int, name: str) -> int:
        of = self._vcpu(vcpu)
        with self._still():
            return _register(of, name.lower())

    def registers(self, vcpu: int) -> str:
        of = self._vcpu(vcpu)
        with self._still():
            return of.dump()

    def _vcpu(self, index: int) -> Vcpu:
        vcpus = self._platform.vcpus.vcpus
        if not 0 <= index < len(vcpus):
            raise DeviceNotFound(f"there is no vCPU {index}; there are 0 to {len(vcpus) - 1}")
        return vcpus[index]


def _register(vcpu: Vcpu, name: str) -> int:
    if name in _GENERAL:
        return int(getattr(vcpu.read("regs"), name))
    if name in _DEBUG:
        debug: Any = vcpu.read("debugregs")
        return int(getattr(debug, name) if name in ("dr6", "dr7") else debug.db[int(name[2])])
    segment, dot, part = name.partition(".")
    if segment in (*_SEGMENTS, *_TABLES, *_SYSTEM):
        system: Any = vcpu.read("sregs")
        if name in _SYSTEM:
            return int(getattr(system, name))
        if segment in _SEGMENTS and (not dot or part in ("base", "limit")):
            return int(getattr(getattr(system, segment), part or "selector"))
        if segment in _TABLES and part in ("base", "limit"):
            return int(getattr(getattr(system, segment), part))
    try:
        index = int(name, 16)
    except ValueError:
        index = -1
    if not 0 <= index <= _MSR_MAX:
        raise QmpError(
            f"'{name}' is no register: {', '.join((*_GENERAL, *_SYSTEM, *_DEBUG))}; {', '.join(_SEGMENTS)}, each also "
            f"with .base and .limit; {', '.join(f'{t}.base, {t}.limit' for t in _TABLES)}; or an MSR's number, in "
            "hexadecimal"
        )
    found = vcpu.get_msrs([index])
    if index not in found:
        raise QmpError(f"vCPU {vcpu.index} has no MSR {index:x} that can be read")
    return found[index]
