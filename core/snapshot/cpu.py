"""What a machine's processors are, as its template says it, and whether this host can go on with them.

A guest asks CPUID once and then relies on the answer. So a restored vCPU gets the template's table (``adopt``), and a
host whose KVM cannot keep what the table promises is refused before anything is restored (``check``).
"""

from __future__ import annotations

from collections.abc import Sequence

from motorcade.core import cpuid
from motorcade.core._native import ffi, lib
from motorcade.core.kvm import Kvm
from motorcade.core.snapshot import cpufeatures
from motorcade.core.vcpustate import MTRRS, Vcpu
from motorcade.proto.template import Cpu

_REGISTERS = ("eax", "ebx", "ecx", "edx")
_NAMED = 12  # missing features that a message names, the others it counts

Leaves = dict[tuple[int, int], tuple[int, int, int, int]]


class CpuError(ValueError):
    """The template's processors need what this host has not; ``str()`` names it."""


def describe(kvm: Kvm, vcpus: Sequence[Vcpu]) -> Cpu:
    """The machine's processors. Needs no vCPU to stand still."""
    return Cpu(vcpus[0].cpuid, tuple(sorted(vcpus[0].msrs)), xsave_size(kvm))


def xsave_size(kvm: Kvm) -> int:
    """Bytes of a vCPU's extended state (vcpustate.py)."""
    # KVM_CAP_XSAVE2 counts them where a feature (AMX) makes the area larger than the classic 4 KiB.
    return max(kvm.extension(lib.KVM_CAP_XSAVE2), ffi.sizeof("struct kvm_xsave"))


def check(cpu: Cpu, kvm: Kvm) -> None:
    """CpuError where a machine with these processors cannot run here."""
    # With the topology of two, whose bits (ht, cmp_legacy) any host can give.
    here = cpuid.entries(cpuid.make(kvm.supported_cpuid(), 0, 2))
    check_leaves(cpuid.entries(cpuid.from_bytes(cpu.cpuid)), here)
    if missing := sorted({*cpu.msrs} - {*kvm.msr_indices, *MTRRS}):
        raise CpuError(_lacks([f"MSR {index:#x}" for index in missing]))
    if cpu.xsave_size != xsave_size(kvm):
        raise CpuError(
            f"the template has {cpu.xsave_size} bytes of extended state a processor, this host {xsave_size(kvm)}"
        )


def check_leaves(there: Leaves, here: Leaves) -> None:
    """As ``check``, of CPUID alone: ``there`` the template's, ``here`` what this host can give."""
    if _vendor(there) != _vendor(here):
        raise CpuError(f"the template is of a processor of {_vendor(there)}, this host's is of {_vendor(here)}")
    missing = []
    for word in cpufeatures.WORDS:
        lost = cpufeatures.feature_bits(word, _get(there, word) & ~_get(here, word))
        missing += cpufeatures.names(word, lost)
    if missing:
        raise CpuError(f"{_lacks(list(dict.fromkeys(missing)))} (template: {_model(there)}; this host: {_model(here)})")
    bits_there, bits_here = (_get(side, (0x80000008, 0, "eax")) & 0xFF for side in (there, here))
    if bits_there > bits_here:
        raise CpuError(f"the template has physical addresses of {bits_there} bits, this host of {bits_here}")
    for (leaf, index), registers in there.items():
        # Where a part of the extended state lies in the area that vCPUs are saved in: size and offset.
        if leaf == 0xD and index >= 2 and registers[0] and here.get((leaf, index), (0, 0))[:2] != registers[:2]:
            raise CpuError(
                f"part {index} of the extended state lies elsewhere in the template's processor than in this host's"
            )


def model(cpu: Cpu) -> str:
    """Vendor, family and model, for a person."""
    return _model(cpuid.entries(cpuid.from_bytes(cpu.cpuid)))


def features(cpu: Cpu) -> list[str]:
    """The names of all that ``check`` asks a host for."""
    leaves = cpuid.entries(cpuid.from_bytes(cpu.cpuid))
    found = [cpufeatures.names(word, cpufeatures.feature_bits(word, _get(leaves, word))) for word in cpufeatures.WORDS]
    return sorted({name for names in found for name in names})


def adopt(cpu: Cpu, vcpus: Sequence[Vcpu]) -> None:
    """Gives vCPUs that have not run the template's table, each with its own APIC id. Before their state. KvmError."""
    table = cpuid.from_bytes(cpu.cpuid)
    for vcpu in vcpus:
        vcpu.set_cpuid(cpuid.make(table, vcpu.index, len(vcpus)))


def _get(leaves: Leaves, word: tuple[int, int, str]) -> int:
    leaf, index, register = word
    return leaves.get((leaf, index), (0, 0, 0, 0))[_REGISTERS.index(register)]


def _vendor(leaves: Leaves) -> str:
    _, ebx, ecx, edx = leaves.get((0, 0), (0, 0, 0, 0))
    text = b"".join(register.to_bytes(4, "little") for register in (ebx, edx, ecx))
    return text.decode("ascii", "replace").strip("\0 ") or "nobody"


def _model(leaves: Leaves) -> str:
    # Intel SDM volume 2, CPUID leaf 1: the extended family is added to 15 only, the extended model is above the model.
    eax = _get(leaves, (1, 0, "eax"))
    family, model = eax >> 8 & 0xF, eax >> 4 & 0xF | eax >> 12 & 0xF0
    return f"{_vendor(leaves)} family {family + (eax >> 20 & 0xFF if family == 15 else 0)} model {model}"


def _lacks(what: list[str]) -> str:
    more = f" and {len(what) - _NAMED} more" if len(what) > _NAMED else ""
    return f"this host's CPU lacks {', '.join(what[:_NAMED])}{more}, which the template's has"
