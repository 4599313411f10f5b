"""Can this host's KVM run a stock kernel? Asked of the KVM itself: a guest of a few instructions, timed.

A pagetable-based KVM (PVM and the like, in a VM without VT-x or SVM) has every capability, but emulates what the
guest does at CPL 0, at microseconds an instruction and without some instructions that Linux needs there.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

EMULATED_NS = 200.0  # an instruction, at CPL 0: hardware 0.3, nested in QEMU's emulation about 5, emulated 2000
_LOOPS = 2000
_CODE = 0x10000  # guest physical
_PORT = 0xF4
# mov ecx, LOOPS; 1: dec ecx; jnz 1b; out PORT, al; 2: jmp 2b (32-bit, flat)
_PROGRAM = b"\xb9" + _LOOPS.to_bytes(4, "little") + b"\x49\x75\xfd" + b"\xe6" + bytes([_PORT]) + b"\xeb\xfe"
_INSTRUCTIONS = 2 * _LOOPS + 2


@dataclass(frozen=True)
class Probe:
    """What was found. ``summary`` is one clause for a person."""

    present: bool
    permitted: bool
    ns: float | None  # nanoseconds an instruction at CPL 0; None: the guest did not run
    summary: str

    @property
    def boots_linux(self) -> bool:
        """Whether a stock kernel can be expected to boot."""
        return self.ns is not None and self.ns <= EMULATED_NS

    @property
    def runs_guests(self) -> bool:
        """Whether any guest runs at all."""
        return self.ns is not None


def probe() -> Probe:
    """Runs the guest, in some milliseconds. Never raises for what a host may lack."""
    try:
        fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return Probe(False, False, None, "there is no /dev/kvm")
    except OSError as e:
        return Probe(True, False, None, f"/dev/kvm cannot be opened ({e.strerror})")
    try:
        from motorcade.core.kvm import KvmError

        try:
            ns = _time_guest(fd)
        except KvmError as e:
            return Probe(True, True, None, f"KVM does not run a guest ({e})")
    finally:
        os.close(fd)
    if ns > EMULATED_NS:
        return Probe(True, True, ns, f"this host's KVM emulates kernel code ({ns:.0f} ns an instruction)")
    return Probe(True, True, ns, f"hardware KVM ({ns:.1f} ns an instruction)")


def _time_guest(fd: int) -> float:
    """Nanoseconds an instruction. Errors: KvmError."""
    from motorcade.core._native import lib
    from motorcade.core.boot import layout
    from motorcade.core.boot.entry import Entry, Mode
    from motorcade.core.kvm import Kvm, KvmError, Vm
    from motorcade.core.vcpustate import Vcpu
    from motorcade.proto.memory import GuestMemory, Region

    size = 1 << 20
    memfd = os.memfd_create("motorcade-probe", os.MFD_CLOEXEC)
    try:
        os.ftruncate(memfd, size)
        memory = GuestMemory(memfd, [Region(0, size, 0)])
    finally:
        os.close(memfd)
    memory.write(_CODE, _PROGRAM)
    entry = Entry(Mode.PROTECTED32, rip=_CODE, gdt=layout.GDT, gdt_limit=layout.write_gdt(memory, Mode.PROTECTED32))
    kvm = Kvm(fd)
    vm = Vm(kvm, memory)
    try:
        vcpu = Vcpu(vm, 0, 1, kvm.supported_cpuid())
        try:
            best = float("inf")
            for _ in range(4):  # the first run builds the page tables, and any may be interrupted by others
                vcpu.reset(entry)
                start = time.perf_counter_ns()
                kind = lib.mc_vcpu_run(vcpu.native)
                elapsed = time.perf_counter_ns() - start
                exit_ = vcpu.native.exit
                if kind != lib.MC_EXIT_PIO or exit_.addr != _PORT:
                    raise KvmError(f"a loop of two instructions ended with exit {kind}")
                best = min(best, elapsed / _INSTRUCTIONS)
                if best < EMULATED_NS / 10:
                    break
            return best
        finally:
            vcpu.close()
    finally:
        vm.close()
