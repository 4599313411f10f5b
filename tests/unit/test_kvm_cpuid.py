"""Topology in CPUID, from made-up tables of an AMD and an Intel host."""

from __future__ import annotations

from typing import Any

import pytest

from motorcade.core import cpuid
from motorcade.core._native import ffi

AMD = int.from_bytes(b"Auth", "little")
INTEL = int.from_bytes(b"Genu", "little")


def table(vendor: int, *leaves: tuple[int, int, int, int, int, int]) -> Any:
    """A ``struct kvm_cpuid2`` of leaf 0 and these: function, index, EAX, EBX, ECX, EDX."""
    rows = [(0, 0, 0x1F, vendor, 0, 0), *leaves]
    made = ffi.new("struct kvm_cpuid2 *", {"nent": len(rows), "entries": len(rows)})
    for entry, (function, index, eax, ebx, ecx, edx) in zip(made.entries[0 : len(rows)], rows, strict=True):
        entry.function, entry.index = function, index
        entry.eax, entry.ebx, entry.ecx, entry.edx = eax, ebx, ecx, edx
    return made


def made(supported: Any, apic_id: int, cpus: int) -> dict[tuple[int, int], tuple[int, int, int, int]]:
    return cpuid.entries(cpuid.make(supported, apic_id, cpus))


@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 5, 64, 255, 300])
def test_leaf_0b_gives_every_vcpu_its_place(cpus: int) -> None:
    for apic_id in (0, cpus - 1):
        leaves = made(table(INTEL), apic_id, cpus)
        shift, count, level, x2apic = leaves[0x0B, 1]
        assert leaves[0x0B, 0] == (0, 1, 0x100, apic_id)
        assert (count, level, x2apic) == (cpus, 0x201, apic_id)
        assert apic_id >> shift == 0  # all in one package
        assert (1 << shift) < 2 * cpus or cpus == 1


def test_leaf_1() -> None:
    supported = table(INTEL, (1, 0, 0xABC, 0xFF_FF_08_00, 1 << 5, 1 << 28))
    eax, ebx, ecx, edx = made(supported, 2, 3)[1, 0]
    assert eax == 0xABC
    assert ebx == 2 << 24 | 4 << 16 | 0x0800
    assert ecx == 1 << 31 | 1 << 24  # hypervisor, TSC deadline; no VMX
    assert edx == 1 << 28
    assert made(supported, 0, 1)[1, 0][3] == 0


def test_caches_of_an_intel_host() -> None:
    l1, l3 = 0xFC00_4121, 0xFC03_C163
    leaves = made(table(INTEL, (4, 0, l1, 0, 0, 0), (4, 1, l3, 0, 0, 0), (4, 2, 0, 7, 7, 7)), 0, 4)
    assert leaves[4, 0][0] == 3 << 26 | l1 & 0x3FFF
    assert leaves[4, 1][0] == 3 << 26 | 3 << 14 | l3 & 0x3FFF
    assert leaves[4, 2] == (0, 7, 7, 7)


def test_an_amd_host() -> None:
    supported = table(
        AMD,
        (0x80000001, 0, 0, 0, 1 << 2 | 1 << 22, 0),
        (0x80000008, 0, 0x3030, 0, 0x7F0F, 0),
        (0x8000001D, 3, 0x1C163, 0, 0, 0),
        (0x8000001E, 0, 77, 77, 77, 0),
    )
    leaves = made(supported, 1, 2)
    assert leaves[0x80000001, 0][2] == 1 << 1 | 1 << 22  # CmpLegacy; no SVM
    assert leaves[0x80000008, 0][2] == 0x1001 | 0x7F0F & 0x0F00
    assert leaves[0x8000001D, 3][0] == 1 << 14 | 0x163
    assert leaves[0x8000001E, 0][:3] == (1, 1, 0)
    assert made(supported, 0, 1)[0x80000001, 0][2] == 1 << 22


def test_an_intel_host_has_no_amd_fields() -> None:
    supported = table(INTEL, (0x80000001, 0, 0, 0, 1, 0), (0x80000008, 0, 0x3027, 0, 0, 0))
    leaves = made(supported, 1, 2)
    assert leaves[0x80000001, 0][2] == 1
    assert leaves[0x80000008, 0] == (0x3027, 0, 0, 0)


def test_what_is_left_out() -> None:
    dropped = [(n, 0, 1, 1, 1, 1) for n in (0x0A, 0x12, 0x1F)]
    leaves = made(table(INTEL, *dropped, (7, 0, 2, 0xFFFF_FFFF, 0, 0), (7, 1, 5, 5, 5, 5)), 0, 1)
    assert not {0x0A, 0x12, 0x1F} & {function for function, _ in leaves}
    assert leaves[7, 0][1] == 0xFFFF_FFFF & ~(1 << 2)
    assert leaves[7, 1] == (5, 5, 5, 5)
