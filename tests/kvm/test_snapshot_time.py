"""Time in a restored vCPU stands still until it runs: counters and timers on the real /dev/kvm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from harness.microvm import MicroVm
from motorcade.core._native import ffi, lib
from motorcade.core.clock import Clock
from motorcade.core.kvm import Record
from motorcade.core.vcpustate import Vcpu, _count_later, msr_values

pytestmark = pytest.mark.kvm

LVTT = 0x320
PERIODIC, DEADLINE = 1 << 17, 2 << 17
MASKED = 1 << 16
MINUTE = 60_000_000_000


def lapic(records: list[Record], register: int) -> int:
    return int(ffi.cast("uint32_t *", ffi.from_buffer(dict(records)["lapic"]))[register // 4])


def with_timer(vcpu: Vcpu, mode: int, count: int, left: int) -> list[Record]:
    """A saved state whose APIC timer has ``left`` of ``count`` to go."""
    records = dict(vcpu.save())
    data = bytearray(records["lapic"])
    regs = ffi.cast("uint32_t *", ffi.from_buffer(data))
    regs[0xF0 // 4] = 0x1FF  # software enabled
    regs[LVTT // 4] = mode | 0x30
    regs[lib.MC_APIC_TDCR // 4] = 0xB  # divide by 1
    regs[lib.MC_APIC_TMICT // 4], regs[lib.MC_APIC_TMCCT // 4] = count, left
    records["lapic"] = bytes(data)
    return list(records.items())


def pending(records: list[Record]) -> bool:
    """Whether vector 0x30 waits in the APIC's request register."""
    return bool(lapic(records, 0x200 + 0x10 * (0x30 // 32)) >> 0x30 % 32 & 1)


def test_an_apic_timer_waits_and_then_goes_on(micro_vm: Callable[..., MicroVm]) -> None:
    vm = micro_vm("")
    vcpu = vm.vcpus.vcpus[0]
    saved = with_timer(vcpu, 0, 0xFFFF_0000, 0xF000_0000)
    vcpu.restore_stopped(saved)
    first = vcpu.save()
    assert (lapic(first, lib.MC_APIC_TMICT), lapic(first, lib.MC_APIC_TMCCT)) == (0xFFFF_0000, 0xF000_0000)
    assert first == vcpu.save()
    assert dict(first)["lapic"] == dict(saved)["lapic"]
    vcpu.start_time(0x1000_0000, vcpu.tsc_khz)
    running = vcpu.save()
    assert lapic(running, lib.MC_APIC_TMICT) == 0xFFFF_0000
    assert 0 < lapic(running, lib.MC_APIC_TMCCT) <= 0xE000_0000


def test_a_timer_that_is_due_fires_when_the_vcpu_runs(micro_vm: Callable[..., MicroVm]) -> None:
    vm = micro_vm("")
    vcpu = vm.vcpus.vcpus[0]
    vcpu.restore_stopped(with_timer(vcpu, 0, 5000, 3000))
    assert not pending(vcpu.save())
    vcpu.start_time(MINUTE, vcpu.tsc_khz)
    assert lapic(vcpu.save(), lib.MC_APIC_TMCCT) == 0


def test_an_interrupt_that_came_meanwhile_stays(micro_vm: Callable[..., MicroVm]) -> None:
    vm = micro_vm("")
    vcpu = vm.vcpus.vcpus[0]
    vcpu.restore_stopped(with_timer(vcpu, 0, 0xFFFF_0000, 0xF000_0000))
    now = vcpu._get("lapic")
    ffi.cast("uint32_t *", now.regs)[0x210 // 4] = 1 << 5  # vector 0x25
    vcpu._set("lapic", now)
    vcpu.start_time(0, vcpu.tsc_khz)
    assert lapic(vcpu.save(), 0x210) >> 5 & 1


def test_the_deadline_is_kept_and_then_set(micro_vm: Callable[..., MicroVm]) -> None:
    vm = micro_vm("")
    vcpu = vm.vcpus.vcpus[0]
    records = dict(with_timer(vcpu, DEADLINE, 0, 0))
    msrs = msr_values(records["msrs"])
    if lib.MC_MSR_IA32_TSC_DEADLINE not in msrs:
        pytest.skip("no TSC deadline timer here")
    far = msrs[lib.MC_MSR_IA32_TSC] + (1 << 50)
    from motorcade.core.vcpustate import _msr_record

    records["msrs"] = _msr_record(msrs | {lib.MC_MSR_IA32_TSC_DEADLINE: far})
    vcpu.restore_stopped(list(records.items()))
    assert vcpu.get_msrs([lib.MC_MSR_IA32_TSC_DEADLINE]) == {lib.MC_MSR_IA32_TSC_DEADLINE: 0}
    assert dict(vcpu.save())["msrs"] == records["msrs"]
    vcpu.start_time(0, vcpu.tsc_khz)
    assert vcpu.get_msrs([lib.MC_MSR_IA32_TSC_DEADLINE]) == {lib.MC_MSR_IA32_TSC_DEADLINE: far}


@pytest.mark.parametrize("damage", ["missing", "no counter", "short"])
def test_a_state_without_its_time_is_refused(micro_vm: Callable[..., MicroVm], damage: str) -> None:
    from motorcade.core.vcpustate import _msr_record

    vcpu = micro_vm("").vcpus.vcpus[0]
    records = dict(vcpu.save())
    if damage == "missing":
        del records["lapic"]
    elif damage == "short":
        records["lapic"] = records["lapic"][:-1]
    else:
        msrs = msr_values(records["msrs"])
        del msrs[lib.MC_MSR_IA32_TSC]
        records["msrs"] = _msr_record(msrs)
    with pytest.raises(ValueError):
        vcpu.restore_stopped(list(records.items()))


def test_the_clocks_are_what_was_restored_until_they_start(micro_vm: Callable[..., MicroVm]) -> None:
    first, second = micro_vm("", cpus=2), micro_vm("", cpus=2)
    now = [1_000_000_000_000_000_000]

    def clock(vm: MicroVm) -> Any:
        return Clock(vm.vm, vm.vcpus.vcpus, lambda: now[0])

    saved = clock(first).save()
    restored = clock(second)
    restored.restore(saved)
    now[0] += MINUTE
    assert restored.save() == saved
    restored.start()
    restored.start()
    after = int.from_bytes(restored.save()[:8], "little") - int.from_bytes(saved[:8], "little")
    assert MINUTE <= after < 2 * MINUTE


def test_a_host_whose_clock_is_behind_takes_no_time_away(micro_vm: Callable[..., MicroVm]) -> None:
    vm = micro_vm("")
    clock = Clock(vm.vm, vm.vcpus.vcpus, lambda: 10)
    saved = clock.save()
    clock.restore(saved[:8] + (1 << 60).to_bytes(8, "little") + saved[16:])
    clock.start()
    assert vm.vm.clock() >= int.from_bytes(saved[:8], "little")


@pytest.mark.parametrize("data", [b"", bytes(19), bytes(21), bytes(20)])
def test_clocks_that_cannot_be_are_refused(micro_vm: Callable[..., MicroVm], data: bytes) -> None:
    vm = micro_vm("")
    with pytest.raises(ValueError):
        Clock(vm.vm, vm.vcpus.vcpus).restore(data)


@pytest.mark.parametrize(
    ("count", "divide", "elapsed", "later"),
    [(0, 0xB, 5, 0), (10, 0xB, 4, 6), (10, 0xB, 40, 1), (10, 0x0, 4, 8), (100, 0xA, 1280, 90), (10, 0x8, 64, 8)],
)
def test_what_is_left_of_a_timer(count: int, divide: int, elapsed: int, later: int) -> None:
    assert _count_later(count, divide, elapsed) == later


def test_a_counter_of_another_frequency(micro_vm: Callable[..., MicroVm], caplog: pytest.LogCaptureFixture) -> None:
    vm = micro_vm("")
    khz = vm.vcpus.vcpus[0].tsc_khz
    clock = Clock(vm.vm, vm.vcpus.vcpus)
    saved = clock.save()
    clock.restore(saved[:16] + (khz + khz // 10_000).to_bytes(4, "little"))
    assert caplog.text == ""
    clock.restore(saved[:16] + (khz + khz // 10).to_bytes(4, "little"))
    assert vm.vcpus.vcpus[0].tsc_khz == khz + khz // 10 or "kHz" in caplog.text
