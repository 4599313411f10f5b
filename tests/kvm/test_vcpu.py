"""vCPU threads on the real /dev/kvm: running, parking, failing, resetting."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.microvm import MicroVm, wait_until
from motorcade.core._native import lib
from motorcade.core.layout import VIRTIO_MMIO_BASE
from motorcade.core.vcpu import StopReason

pytestmark = pytest.mark.kvm

Make = Callable[..., MicroVm]
COUNTER = 0x100000  # guest physical: a word that the "count" guest increments
STEAL = 0x180000  # struct kvm_steal_time


def counter(vm: MicroVm) -> int:
    return int.from_bytes(vm.memory.read(COUNTER, 8), "little")


def wait_counting(vm: MicroVm, beyond: int) -> None:
    wait_until(lambda: counter(vm) > beyond)


class Recorder:
    """A bus device that notes accesses and answers reads with their offset + 0x40."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        self.log.append(("read", offset, size, 0))
        return 0x40 + offset

    def write(self, offset: int, size: int, value: int) -> None:
        self.log.append(("write", offset, size, value))


def test_prints_through_the_uart_without_python(micro_vm: Make) -> None:
    vm = micro_vm("print=hello_world")
    vm.start()
    assert vm.wait_for(b"\n") == b"hello world\n"
    vm.vcpus.pause()
    stats = vm.vcpus.vcpus[0].native.stats
    assert stats.uart >= 24  # a look at LSR and a write a byte
    assert stats.python == 0


def test_starts_parked_and_runs_only_when_resumed(micro_vm: Make) -> None:
    vm = micro_vm("print=x")
    entry = vm.load()
    vm.vcpus.start(entry)
    assert vm.vcpus.parked
    assert vm.vcpus.vcpus[0].rip == entry.rip
    assert all(vm.vcpus.tids)
    vm.vcpus.resume()
    vm.wait_for(b"x\n")


def test_threads_have_names_and_known_ids(micro_vm: Make) -> None:
    vm = micro_vm(f"count={COUNTER}", cpus=2)
    vm.start()
    names = [Path(f"/proc/self/task/{tid}/comm").read_text().strip() for tid in vm.vcpus.tids]
    assert names == ["vcpu0", "vcpu1"]


def test_time_in_which_the_guest_did_not_run_is_stolen(micro_vm: Make) -> None:
    """For a guest that asked KVM to be told, by MSR_KVM_STEAL_TIME."""
    vm = micro_vm(f"count={COUNTER}")
    vm.start()
    wait_counting(vm, 0)
    vm.vcpus.pause()
    (vcpu,) = vm.vcpus.vcpus
    msr = lib.MC_MSR_KVM_STEAL_TIME
    if msr not in vcpu.get_msrs([msr]):
        pytest.skip("this KVM does not tell guests of stolen time")

    def stolen() -> int:
        return int.from_bytes(vm.memory.read(STEAL, 8), "little")

    def run(lost_ns: int | None) -> int:
        """How much more is stolen then."""
        before = stolen()
        vm.vcpus.resume(lost_ns)
        wait_counting(vm, counter(vm))
        vm.vcpus.pause()
        return stolen() - before

    second = 1_000_000_000
    assert run(3600 * second) == 0, "it has not asked"
    vcpu.set_msrs({msr: STEAL | 1})
    assert 3600 * second <= run(3600 * second) < 3660 * second
    time.sleep(0.02)  # what is measured
    assert 20_000_000 <= run(None) < 60 * second
    vcpu.set_msrs({msr: 0xFFFF_FFFF_FFC0 | 1})
    vm.vcpus.resume(3600 * second)  # no RAM: nothing happens
    wait_counting(vm, counter(vm))


def test_pause_stops_a_running_guest_and_resume_goes_on(micro_vm: Make) -> None:
    vm = micro_vm(f"count={COUNTER}")
    vm.start()
    for _ in range(20):
        wait_counting(vm, counter(vm))
        vm.vcpus.pause()
        assert vm.vcpus.parked
        stopped, rip = counter(vm), vm.vcpus.vcpus[0].rip
        assert (counter(vm), vm.vcpus.vcpus[0].rip) == (stopped, rip)
        vm.vcpus.resume()
        wait_counting(vm, stopped)


def test_pause_reaches_a_halted_guest_and_one_waiting_for_sipi(micro_vm: Make) -> None:
    vm = micro_vm("print=x", cpus=3)
    vm.start()
    vm.wait_for(b"x\n")
    vm.vcpus.pause(5)
    assert [v.waits_for_sipi for v in vm.vcpus.vcpus] == [False, True, True]


def test_pause_and_resume_race_from_many_threads(micro_vm: Make) -> None:
    vm = micro_vm(f"count={COUNTER}", cpus=2)
    vm.start()

    def nag() -> None:
        for _ in range(300):
            vm.vcpus.request_pause()
            vm.vcpus.resume()

    naggers = [threading.Thread(target=nag) for _ in range(3)]
    for n in naggers:
        n.start()
    for n in naggers:
        n.join(30)
        assert not n.is_alive()
    vm.vcpus.pause()
    before = counter(vm)
    vm.vcpus.resume()
    wait_counting(vm, before)


def test_a_second_processor_starts_by_init_and_sipi(micro_vm: Make) -> None:
    vm = micro_vm("smp print=up", cpus=2)
    vm.start()
    assert vm.wait_for(b"up\n") == b"ap 1\nup\n"


def test_triple_fault_ends_it_with_the_registers(micro_vm: Make) -> None:
    vm = micro_vm("print=x fault")
    vm.start()
    reason, text = vm.wait_stop()
    assert reason is StopReason.TRIPLE_FAULT
    assert "vCPU 0: triple fault" in text
    assert "rax=000000001badb002" in text or ("lost its registers" in text and "rip=000000000000fff0" in text)
    assert "cr3=" in text
    vm.vcpus.wait_parked(10)
    with pytest.raises(RuntimeError, match="only a reset"):
        vm.vcpus.resume()
    assert vm.stops.empty()


def test_an_error_on_one_vcpu_parks_them_all(micro_vm: Make) -> None:
    vm = micro_vm("smp fault", cpus=2)
    vm.start()
    assert vm.wait_stop()[0] is StopReason.TRIPLE_FAULT
    vm.vcpus.wait_parked(10)


def test_memory_that_cannot_be_reached_is_an_internal_error(micro_vm: Make) -> None:
    vm = micro_vm("print=x")
    entry = vm.load()
    vm.vcpus.start(entry.__class__(entry.mode, rip=0xC800_0000, gdt=entry.gdt, gdt_limit=entry.gdt_limit))
    vm.vcpus.resume()
    reason, text = vm.wait_stop()
    assert reason is StopReason.INTERNAL_ERROR
    assert "rip=00000000c8000000" in text
    assert "KVM internal error 1: an instruction that KVM cannot emulate" in text


def test_reset_restarts_the_guest_on_the_same_vm(micro_vm: Make) -> None:
    vm = micro_vm("smp print=first irq=5 fault", cpus=2)
    vm.start()
    for _ in range(3):
        vm.wait_for(b"first\n")
        assert vm.wait_stop()[0] is StopReason.TRIPLE_FAULT
        vm.vcpus.wait_parked(10)
        vm.peer.output = b""
        vm.uart.reset()
        vm.memory.write(0x200000, bytes(1 << 20))
        vm.vcpus.reset(vm.load())
        assert [v.waits_for_sipi for v in vm.vcpus.vcpus] == [False, True]
        vm.vcpus.resume()


def test_reset_puts_back_what_kvm_made(micro_vm: Make) -> None:
    vm = micro_vm("smp irq=5 print=done", cpus=2)
    entry = vm.load()
    vm.vcpus.start(entry)
    fresh = ([v.save() for v in vm.vcpus.vcpus], vm.vm.save())
    vm.vcpus.resume()
    vm.wait_for(b"done\n")
    vm.vcpus.pause()
    assert [v.save() for v in vm.vcpus.vcpus] != fresh[0]
    vm.vcpus.reset(entry)
    again = ([v.save() for v in vm.vcpus.vcpus], vm.vm.save())
    for before, after in zip(fresh[0], again[0], strict=True):
        for (name, old), (_, new) in zip(before, after, strict=True):
            if name != "msrs":  # the time stamp counter goes on
                assert old == new, name
    assert fresh[1] == again[1]


def test_reset_needs_the_vcpus_parked(micro_vm: Make) -> None:
    vm = micro_vm(f"count={COUNTER}")
    entry = vm.load()
    vm.start()
    with pytest.raises(RuntimeError, match="parked"):
        vm.vcpus.reset(entry)


def test_state_saved_and_put_back_continues_the_guest(micro_vm: Make) -> None:
    """What snapshots rest on: the same VM, another state in between."""
    vm = micro_vm(f"count={COUNTER}")
    vm.start()
    wait_counting(vm, 1000)
    vm.vcpus.pause()
    cpu = vm.vcpus.vcpus[0]
    records, chips, rip, stopped = cpu.save(), vm.vm.save(), cpu.rip, counter(vm)
    vm.vcpus.reset(vm.load())
    assert cpu.rip != rip
    cpu.restore(records)
    vm.vm.restore(chips)
    assert cpu.rip == rip
    vm.memory.write(COUNTER, stopped.to_bytes(8, "little"))
    vm.vcpus.resume()
    wait_counting(vm, stopped)


def test_damaged_records_are_refused(micro_vm: Make) -> None:
    vm = micro_vm("print=x")
    cpu = vm.vcpus.vcpus[0]
    for name, data in cpu.save():
        with pytest.raises(ValueError, match=name):
            cpu.restore([(name, data[:-1])])
    with pytest.raises(ValueError, match="nonsense"):
        cpu.restore([("nonsense", b"")])
    for name, data in vm.vm.save():
        with pytest.raises(ValueError, match=name):
            vm.vm.restore([(name, data + b"\0")])


def test_port_accesses_of_every_width_and_strings(micro_vm: Make) -> None:
    vm = micro_vm("pio=1280")
    ports = Recorder()
    vm.pio.add(1280, 8, ports)
    vm.start()
    assert vm.wait_for(b"\n") == b"40 40 40 40 40 40 40 40 \n"
    singles = [e for size in (1, 2, 4) for e in (("read", 0, size, 0), ("write", 0, size, 0x41))]
    strings = [("write", 0, 1, n) for n in range(1, 9)] + [("write", 0, 2, n) for n in (0x201, 0x403, 0x605, 0x807)]
    assert ports.log == singles + strings + [("read", 0, 1, 0)] * 8


def test_mmio_accesses_of_every_width(micro_vm: Make) -> None:
    vm = micro_vm("slot=2 wide=64 slot=3 peek=0")
    device = Recorder()
    vm.device(2, device)
    vm.start()
    assert vm.wait_for(b"ffffffff\n") == b"80 80 80\nffffffff\n"
    assert device.log == [
        ("write", 64, 1, 0x11), ("write", 64, 2, 0x2222), ("write", 64, 8, 0x8877665544332211),
        ("read", 64, 1, 0), ("read", 64, 2, 0), ("read", 64, 8, 0),
    ]  # fmt: skip


class Broken:
    """A device with a bug."""

    def read(self, offset: int, size: int) -> int:
        raise ZeroDivisionError("the bug")

    def write(self, offset: int, size: int, value: int) -> None:
        raise ZeroDivisionError("the bug")


@pytest.mark.parametrize("word", ["peek=4", "poke=4:1"])
def test_an_exception_in_a_device_ends_the_vm(micro_vm: Make, word: str) -> None:
    vm = micro_vm(f"slot=1 {word} print=never")
    vm.device(1, Broken())
    vm.start()
    reason, text = vm.wait_stop()
    assert reason is StopReason.DEVICE_ERROR
    assert "ZeroDivisionError: the bug" in text
    assert f"of 4 bytes at {VIRTIO_MMIO_BASE + 0x1004:#x}" in text
    assert "rip=" in text
    vm.vcpus.wait_parked(10)
    assert vm.peer.take() == b""


def test_a_device_may_ask_for_a_pause_and_must_not_wait_for_it(micro_vm: Make) -> None:
    class PowerSwitch:
        def __init__(self) -> None:
            self.refused: Exception | None = None

        def read(self, offset: int, size: int) -> int:
            return 0

        def write(self, offset: int, size: int, value: int) -> None:
            vm.vcpus.request_pause()
            try:
                vm.vcpus.pause()
            except RuntimeError as e:
                self.refused = e

    vm = micro_vm("slot=1 poke=0:1 print=after")
    switch = PowerSwitch()
    vm.device(1, switch)
    vm.start()
    vm.vcpus.wait_parked(10)
    assert "must not wait" in str(switch.refused)
    assert vm.peer.take() == b""  # not one instruction after the write
    vm.vcpus.resume()
    vm.wait_for(b"after\n")


def test_on_parked_tells_of_the_last_one(micro_vm: Make) -> None:
    vm = micro_vm(f"smp count={COUNTER}", cpus=2)
    vm.start()
    vm.parks.get(timeout=10)  # the start itself
    wait_counting(vm, 0)  # both run
    assert vm.parks.empty()
    vm.vcpus.request_pause()
    vm.parks.get(timeout=10)
    assert vm.vcpus.parked


def test_a_vcpu_waiting_in_a_device_parks_when_the_device_is_done(micro_vm: Make) -> None:
    entered, leave = threading.Event(), threading.Event()

    class Slow(Recorder):
        def read(self, offset: int, size: int) -> int:
            entered.set()
            assert leave.wait(20)
            return 7

    vm = micro_vm("slot=1 peek=0")
    vm.device(1, Slow())
    vm.start()
    assert entered.wait(20)
    with pytest.raises(TimeoutError, match=r"vCPUs \[0\]"):
        vm.vcpus.pause(0.05)
    leave.set()
    vm.vcpus.wait_parked(10)
    vm.vcpus.resume()
    assert vm.wait_for(b"\n") == b"7\n"


def test_too_many_vcpus_are_refused(micro_vm: Make) -> None:
    with pytest.raises(ValueError, match="KVM allows"):
        micro_vm("print=x", cpus=100_000)
    with pytest.raises(ValueError, match="KVM allows"):
        micro_vm("print=x", cpus=0)


def test_ram_beyond_the_hole_is_there(micro_vm: Make) -> None:
    """More RAM than fits below 3 GiB: sparse, so that it costs nothing."""
    vm = micro_vm("print=big", memory=5 << 30)
    vm.start()
    vm.wait_for(b"big\n")
