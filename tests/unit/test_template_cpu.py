"""Whether a host can go on with a template's processors: what it lacks is named."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import pytest

from motorcade.core import cpuid
from motorcade.core._native import ffi
from motorcade.core.kvm import Kvm
from motorcade.core.snapshot import cpu, cpufeatures
from motorcade.core.snapshot.cpu import CpuError, Leaves
from motorcade.proto.template import Cpu

INTEL = (0, 0x756E6547, 0x6C65746E, 0x49656E69)
AMD = (0, 0x68747541, 0x444D4163, 0x69746E65)

HOST: Leaves = {
    (0, 0): INTEL,
    (1, 0): (0x806F8, 0, 0xFFFF_FFFF, 0xFFFF_FFFF),
    (7, 0): (0, 0xFFFF_FFFF, 0, 0),
    (0xD, 0): (7, 0, 0, 0),
    (0xD, 2): (256, 576, 0, 0),
    (0x80000008, 0): (0x302E, 0, 0, 0),
}


def test_a_host_with_the_same_or_more_is_accepted() -> None:
    cpu.check_leaves(HOST, HOST)
    cpu.check_leaves({**HOST, (7, 0): (0, 0, 0, 0), (0x80000008, 0): (0x2027, 0, 0, 0)}, HOST)
    cpu.check_leaves({leaf: HOST[leaf] for leaf in ((0, 0), (1, 0))}, HOST)


def test_missing_features_are_named_with_both_models() -> None:
    less: Leaves = {**HOST, (1, 0): (0xA20F12, 0, 0, 0xFFFF_FFFF), (7, 0): (0, 0xFFFF_FFFF & ~(1 << 5 | 1 << 22), 0, 0)}
    with pytest.raises(CpuError) as e:
        cpu.check_leaves({**HOST, (1, 0): (0x806F8, 0, 1 << 28, 0)}, less)
    assert "avx" in str(e.value)
    assert "avx2, CPUID 0x7.0 EBX bit 22" in str(e.value)
    assert "template: GenuineIntel family 6 model 143; this host: GenuineIntel family 25 model 33" in str(e.value)


def test_many_missing_features_are_counted() -> None:
    with pytest.raises(CpuError, match=r"lacks fpu, vme, .* and 54 more, which"):
        cpu.check_leaves(HOST, {(0, 0): INTEL, (7, 0): HOST[7, 0]})


@pytest.mark.parametrize("bit", [27])
def test_bits_that_the_guest_s_own_registers_make_are_no_features(bit: int) -> None:
    host: Leaves = {**HOST, (1, 0): (0, 0, 0xFFFF_FFFF & ~(1 << bit), 0xFFFF_FFFF)}
    cpu.check_leaves(HOST, host)


def test_another_vendor_is_refused() -> None:
    with pytest.raises(CpuError, match="a processor of GenuineIntel, this host's is of AuthenticAMD"):
        cpu.check_leaves(HOST, {**HOST, (0, 0): AMD})
    with pytest.raises(CpuError, match="a processor of nobody"):
        cpu.check_leaves({}, HOST)


def test_shorter_addresses_and_another_layout_of_the_state_are_refused() -> None:
    with pytest.raises(CpuError, match="addresses of 46 bits, this host of 39"):
        cpu.check_leaves(HOST, {**HOST, (0x80000008, 0): (0x3027, 0, 0, 0)})
    with pytest.raises(CpuError, match="part 2 of the extended state lies elsewhere"):
        cpu.check_leaves(HOST, {**HOST, (0xD, 2): (256, 832, 0, 0)})


def test_each_word_has_at_most_32_names_and_no_name_twice() -> None:
    for word in cpufeatures.WORDS:
        names = cpufeatures.names(word, 0xFFFF_FFFF)
        assert len(names) == 32
        assert len(set(names)) == 32, word


def test_make_gives_the_same_table_again_and_another_vcpu_s() -> None:
    rows = [
        (0, 0, 0, 0x10, AMD[1], AMD[2], AMD[3]),
        (1, 0, 0, 0xA20F12, 0x800, 1 << 28, 0xFFFF),
        (4, 0, 1, 0xFC00_4121, 1, 2, 3),
        (0x80000001, 0, 0, 0, 0, 1 << 22, 0),
        (0x80000008, 0, 0, 0x3030, 0, 0x7F0F, 0),
        (0x8000001E, 0, 0, 7, 7, 7, 0),
    ]
    supported = ffi.new("struct kvm_cpuid2 *", {"nent": len(rows), "entries": len(rows)})
    for entry, row in zip(supported.entries[0 : len(rows)], rows, strict=True):
        entry.function, entry.index, entry.flags, entry.eax, entry.ebx, entry.ecx, entry.edx = row
    for cpus in (1, 2, 5):
        first = cpuid.to_bytes(cpuid.make(supported, 0, cpus))
        for index in range(cpus):
            direct = cpuid.to_bytes(cpuid.make(supported, index, cpus))
            assert cpuid.to_bytes(cpuid.make(cpuid.from_bytes(first), index, cpus)) == direct
    with pytest.raises(ValueError, match="no whole number"):
        cpuid.from_bytes(first[:-1])


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("/dev/kvm is not accessible")
    fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    yield Kvm(fd)
    os.close(fd)


@pytest.mark.kvm
def test_this_host_can_go_on_with_its_own_processors_and_not_with_a_missing_msr(kvm: Kvm) -> None:
    table = cpuid.to_bytes(cpuid.make(kvm.supported_cpuid(), 0, 1))
    own = Cpu(table, tuple(kvm.msr_indices), cpu.xsave_size(kvm))
    cpu.check(own, kvm)
    with pytest.raises(CpuError, match="lacks MSR 0xdead, which"):
        cpu.check(dataclasses.replace(own, msrs=(*own.msrs, 0xDEAD)), kvm)
    with pytest.raises(CpuError, match=f"the template has 8192 bytes .* this host {own.xsave_size}"):
        cpu.check(dataclasses.replace(own, xsave_size=8192), kvm)
