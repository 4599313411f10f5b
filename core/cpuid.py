"""What CPUID tells the guest: KVM's supported leaves, with the VM's own topology (one socket, a core a vCPU).

Leaves: Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E.
"""

from __future__ import annotations

from typing import Any

from motorcade.core._native import ffi, lib

_EDX1_HTT = 1 << 28
_EBX7_SGX = 1 << 2
_ECX1_VMX = 1 << 5
_ECX1_TSC_DEADLINE = 1 << 24
_ECX1_HYPERVISOR = 1 << 31
_ECX80000001_CMP_LEGACY = 1 << 1
_ECX80000001_SVM = 1 << 2
_LEVEL_SMT, _LEVEL_CORE = 1 << 8, 2 << 8  # leaf 0xb, ECX

# Leaf 0, EBX: the first four letters of AuthenticAMD and HygonGenuine.
_AMD_VENDORS = tuple(int.from_bytes(name, "little") for name in (b"Auth", b"Hygo"))

# Left out: SGX and the PMU need state that the core neither offers nor saves; 0x1f says what 0xb says (0 here, so
# that guests fall back to 0xb).
_DROPPED = frozenset({0x0A, 0x0B, 0x12, 0x1F})


def make(supported: Any, apic_id: int, cpus: int) -> Any:
    """The ``struct kvm_cpuid2`` of the vCPU with ``apic_id`` among ``cpus``, from Kvm.supported_cpuid()'s."""
    vendor = next((e.ebx for e in supported.entries[0 : supported.nent] if e.function == 0), 0)
    kept = [e for e in supported.entries[0 : supported.nent] if e.function not in _DROPPED]
    topology = _leaf_0b(apic_id, cpus)
    table = ffi.new("struct kvm_cpuid2 *", {"entries": len(kept) + len(topology)})
    table.nent = len(kept) + len(topology)
    for i, entry in enumerate(kept):
        table.entries[i] = entry
        _adjust(table.entries[i], apic_id, cpus, amd=vendor in _AMD_VENDORS)
    for i, fields in enumerate(topology, start=len(kept)):
        index, ebx, ecx, eax = fields
        entry = table.entries[i]
        entry.function, entry.index, entry.flags = 0x0B, index, lib.KVM_CPUID_FLAG_SIGNIFCANT_INDEX
        entry.eax, entry.ebx, entry.ecx, entry.edx = eax, ebx, ecx, apic_id
    return table


def _leaf_0b(apic_id: int, cpus: int) -> list[tuple[int, int, int, int]]:
    """Index, EBX (logical processors at this level), ECX (level type and index), EAX (shift to the next level)."""
    return [
        (0, 1, _LEVEL_SMT | 0, 0),
        (1, cpus, _LEVEL_CORE | 1, core_bits(cpus)),
        (2, 0, 2, 0),
    ]


def core_bits(cpus: int) -> int:
    """Bits of the APIC id that number the cores."""
    return (cpus - 1).bit_length()


def _adjust(e: Any, apic_id: int, cpus: int, *, amd: bool) -> None:
    """Changes one of KVM's entries to what this vCPU of this VM is."""
    match e.function:
        case 0x01:
            # Both fields have 8 bits; larger VMs are told by leaf 0xb alone.
            logical = min(1 << core_bits(cpus), 255)
            e.ebx = (e.ebx & 0xFFFF) | logical << 16 | (apic_id & 0xFF) << 24
            # KVM does not report the deadline timer here, since it depends on the in-kernel APIC, which we have.
            e.ecx = (e.ecx | _ECX1_HYPERVISOR | _ECX1_TSC_DEADLINE) & ~_ECX1_VMX
            e.edx = e.edx | _EDX1_HTT if cpus > 1 else e.edx & ~_EDX1_HTT
        case 0x04 | 0x8000001D:
            # Deterministic cache parameters: level 3 belongs to all cores, the others to one.
            level = (e.eax >> 5) & 7
            if e.eax & 0x1F:
                sharing = (1 << core_bits(cpus)) - 1 if level >= 3 else 0
                e.eax = (e.eax & 0x3FFF) | min(sharing, 0xFFF) << 14
                if e.function == 0x04:
                    e.eax |= min((1 << core_bits(cpus)) - 1, 63) << 26
        case 0x07 if e.index == 0:
            e.ebx &= ~_EBX7_SGX
        case 0x80000001:
            e.ecx &= ~_ECX80000001_SVM  # a guest of the guest: its state could not be saved
            e.ecx = e.ecx | _ECX80000001_CMP_LEGACY if amd and cpus > 1 else e.ecx & ~_ECX80000001_CMP_LEGACY
        case 0x80000008 if amd:
            e.ecx = (e.ecx & ~0xF0FF) | core_bits(cpus) << 12 | min(cpus - 1, 0xFF)  # ApicIdSize, NC
        case 0x8000001E if amd:
            e.eax, e.ebx, e.ecx = apic_id, apic_id & 0xFF, 0  # one thread a core, one node


def to_bytes(table: Any) -> bytes:
    """The table's entries, for a template."""
    return bytes(ffi.buffer(table.entries, table.nent * ffi.sizeof("struct kvm_cpuid_entry2")))


def from_bytes(data: bytes) -> Any:
    """The ``struct kvm_cpuid2`` of ``to_bytes``. ``make`` gives from it what it gave before, and another vCPU's.

    ValueError where it is no whole number of entries.
    """
    count, rest = divmod(len(data), ffi.sizeof("struct kvm_cpuid_entry2"))
    if rest:
        raise ValueError(f"a CPUID table of {len(data)} bytes has no whole number of entries")
    table = ffi.new("struct kvm_cpuid2 *", {"nent": count, "entries": count})
    ffi.memmove(table.entries, data, len(data))
    return table


def entries(table: Any) -> dict[tuple[int, int], tuple[int, int, int, int]]:
    """``(function, index)`` to ``(eax, ebx, ecx, edx)``, for messages and tests."""
    return {(e.function, e.index): (e.eax, e.ebx, e.ecx, e.edx) for e in table.entries[0 : table.nent]}
