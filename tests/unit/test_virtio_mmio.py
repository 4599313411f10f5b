"""The driver-visible device state behind the virtio-mmio registers, driven register by register."""

from __future__ import annotations

import threading

import pytest

from motorcade.core.virtio import F_VERSION_1, Device, Identity, Queue, Status
from motorcade.core.virtio_mmio import MAGIC, Reg, VirtioMmio

FEATURES = 1 << 28 | 1 << 29 | 1 << 5
ACCEPTED = F_VERSION_1 | 1 << 29


class Recorder:
    """Backend, interrupts and doorbells in one, noting what happens to it in order."""

    def __init__(self) -> None:
        self.calls: list[object] = []
        self.queues: dict[int, Queue] = {}
        self.reset_may_end = threading.Event()
        self.reset_may_end.set()

    def activate(self, features: int, queues: dict[int, Queue]) -> None:
        self.calls.append(("activate", features, sorted(queues)))
        self.queues = dict(queues)

    def reset(self) -> None:
        self.calls.append("reset")
        assert self.reset_may_end.wait(30)

    def write_config(self, offset: int, data: bytes) -> None:
        self.calls.append(("config", offset, data))

    def config_changed(self) -> None:
        self.calls.append("config interrupt")

    def clear(self) -> None:
        self.calls.append("clear")

    def doorbells(self, queues: list[int]) -> None:
        self.calls.append(("doorbells", queues))

    def needs_reset(self, reason: str) -> None:
        self.calls.append(("needs reset", reason))


@pytest.fixture
def seen() -> Recorder:
    return Recorder()


@pytest.fixture
def device(seen: Recorder) -> Device:
    device = Device("disk0", seen, seen, seen.doorbells, seen.needs_reset)
    device.plug(Identity(2, FEATURES, (256, 128), bytes(range(16))))
    return device


@pytest.fixture
def mmio(device: Device) -> VirtioMmio:
    return VirtioMmio(device)


def agree(mmio: VirtioMmio, features: int = ACCEPTED) -> int:
    """Goes through section 3.1.1 up to FEATURES_OK; the status read back."""
    mmio.write(Reg.STATUS, 4, 0)
    mmio.write(Reg.STATUS, 4, 1)
    mmio.write(Reg.STATUS, 4, 3)
    for half in (0, 1):
        mmio.write(Reg.DRIVER_FEATURES_SEL, 4, half)
        mmio.write(Reg.DRIVER_FEATURES, 4, features >> (32 * half) & 0xFFFF_FFFF)
    mmio.write(Reg.STATUS, 4, 11)
    return mmio.read(Reg.STATUS, 4)


def set_queue(mmio: VirtioMmio, index: int, size: int = 64, desc: int = 0x10000) -> None:
    mmio.write(Reg.QUEUE_SEL, 4, index)
    mmio.write(Reg.QUEUE_NUM, 4, size)
    for low, address in ((0x80, desc), (0x90, desc + 0x4000), (0xA0, desc + 0x8000)):
        mmio.write(low, 4, address & 0xFFFF_FFFF)
        mmio.write(low + 4, 4, address >> 32)
    mmio.write(Reg.QUEUE_READY, 4, 1)


def test_identity_registers(mmio: VirtioMmio) -> None:
    assert mmio.read(Reg.MAGIC, 4) == MAGIC
    assert mmio.read(Reg.VERSION, 4) == 2
    assert mmio.read(Reg.DEVICE_ID, 4) == 2
    mmio.write(Reg.DEVICE_FEATURES_SEL, 4, 1)
    assert mmio.read(Reg.DEVICE_FEATURES, 4) == 1
    mmio.write(Reg.DEVICE_FEATURES_SEL, 4, 7)
    assert mmio.read(Reg.DEVICE_FEATURES, 4) == 0


def test_empty_slot_reads_device_id_0(seen: Recorder) -> None:
    mmio = VirtioMmio(Device("later", seen, seen, seen.doorbells, seen.needs_reset))
    assert mmio.read(Reg.MAGIC, 4) == MAGIC
    assert mmio.read(Reg.DEVICE_ID, 4) == 0
    assert mmio.read(Reg.QUEUE_NUM_MAX, 4) == 0


def test_start_hands_over_only_ready_queues(mmio: VirtioMmio, seen: Recorder) -> None:
    assert agree(mmio) == 11
    set_queue(mmio, 1, 32, 0x1_2345_0000)
    seen.calls.clear()
    mmio.write(Reg.STATUS, 4, 15)
    assert seen.calls == [("doorbells", [1]), ("activate", ACCEPTED, [1])]
    assert seen.queues[1] == Queue(128, 32, True, 0x1_2345_0000, 0x1_2345_4000, 0x1_2345_8000)


def test_driver_without_version_1_is_refused(mmio: VirtioMmio) -> None:
    assert agree(mmio, 1 << 29) == 3


def test_features_not_offered_are_refused(mmio: VirtioMmio) -> None:
    assert agree(mmio, ACCEPTED | 1 << 40) == 3


@pytest.mark.parametrize("size", [0, 3, 257, 512, 0x1_0000, 0xFFFF_FFFF])
def test_absurd_queue_size_needs_reset(mmio: VirtioMmio, seen: Recorder, size: int) -> None:
    agree(mmio)
    set_queue(mmio, 0, size)
    assert mmio.read(Reg.STATUS, 4) & Status.NEEDS_RESET
    assert mmio.read(Reg.QUEUE_READY, 4) == 0
    assert not any(c[0] == "activate" for c in seen.calls if isinstance(c, tuple))


def test_misaligned_ring_needs_reset(mmio: VirtioMmio) -> None:
    agree(mmio)
    set_queue(mmio, 0, 64, 0x10008)
    assert mmio.read(Reg.STATUS, 4) & Status.NEEDS_RESET


def test_queue_selector_out_of_range(mmio: VirtioMmio) -> None:
    agree(mmio)
    set_queue(mmio, 0xFFFF_FFFF)
    assert mmio.read(Reg.QUEUE_NUM_MAX, 4) == 0
    assert mmio.read(Reg.QUEUE_READY, 4) == 0
    assert not mmio.read(Reg.STATUS, 4) & Status.NEEDS_RESET


def test_driver_ok_without_features_needs_reset(mmio: VirtioMmio, seen: Recorder) -> None:
    mmio.write(Reg.STATUS, 4, 7)
    assert mmio.read(Reg.STATUS, 4) & Status.NEEDS_RESET
    assert not any(c[0] == "activate" for c in seen.calls if isinstance(c, tuple))


def test_notify_of_a_queue_never_set_up(mmio: VirtioMmio, seen: Recorder) -> None:
    agree(mmio)
    set_queue(mmio, 0)
    mmio.write(Reg.STATUS, 4, 15)
    mmio.write(Reg.QUEUE_NOTIFY, 4, 1)
    assert mmio.read(Reg.STATUS, 4) & Status.NEEDS_RESET
    assert "config interrupt" in seen.calls


def test_notify_before_driver_ok_is_ignored(mmio: VirtioMmio) -> None:
    agree(mmio)
    mmio.write(Reg.QUEUE_NOTIFY, 4, 0)
    assert mmio.read(Reg.STATUS, 4) == 11


def test_reset_waits_for_the_sidecar_and_forgets(mmio: VirtioMmio, seen: Recorder) -> None:
    agree(mmio)
    set_queue(mmio, 0)
    mmio.write(Reg.STATUS, 4, 15)
    seen.calls.clear()
    seen.reset_may_end.clear()
    vcpu = threading.Thread(target=mmio.write, args=(Reg.STATUS, 4, 0))
    vcpu.start()
    # The sidecar's notices must get through meanwhile: no lock is held.
    mmio._device.needs_reset("ring broken")
    assert vcpu.is_alive()
    seen.reset_may_end.set()
    vcpu.join(30)
    assert mmio.read(Reg.STATUS, 4) == 0
    assert seen.calls[:2] == [("doorbells", []), "reset"]
    mmio.write(Reg.QUEUE_SEL, 4, 0)
    assert mmio.read(Reg.QUEUE_READY, 4) == 0


def test_reset_of_a_device_that_does_not_run_asks_nobody(mmio: VirtioMmio, seen: Recorder) -> None:
    agree(mmio)
    assert "reset" not in seen.calls


def test_queue_settings_are_fixed_once_running(mmio: VirtioMmio, seen: Recorder) -> None:
    agree(mmio)
    set_queue(mmio, 0)
    mmio.write(Reg.STATUS, 4, 15)
    mmio.write(Reg.QUEUE_NUM, 4, 8)
    mmio.write(Reg.QUEUE_DESC_LOW, 4, 0)
    assert seen.queues[0].size == 64
    assert seen.queues[0].desc == 0x10000
    mmio.write(Reg.QUEUE_READY, 4, 0)
    assert mmio.read(Reg.STATUS, 4) & Status.NEEDS_RESET


@pytest.mark.parametrize(
    ("offset", "size", "value"),
    [(0, 1, 0), (3, 2, 0x0403), (8, 8, 0x0F0E0D0C0B0A0908), (14, 4, 0x0F0E), (16, 4, 0), (0xFC, 4, 0)],
)
def test_config_reads(mmio: VirtioMmio, offset: int, size: int, value: int) -> None:
    assert mmio.read(0x100 + offset, size) == value


def test_config_write_goes_to_the_sidecar_within_bounds(mmio: VirtioMmio, seen: Recorder) -> None:
    agree(mmio)
    mmio.write(0x100 + 4, 2, 0x1234)
    mmio.write(0x100 + 15, 2, 0x1234)
    assert [c for c in seen.calls if isinstance(c, tuple) and c[0] == "config"] == [("config", 4, b"\x34\x12")]


def test_config_change_moves_the_generation(mmio: VirtioMmio, device: Device, seen: Recorder) -> None:
    agree(mmio)
    mmio.write(Reg.STATUS, 4, 15)
    before = mmio.read(Reg.CONFIG_GENERATION, 4)
    assert device.change_config(b"\xff" * 16)
    assert mmio.read(Reg.CONFIG_GENERATION, 4) == before + 1
    assert mmio.read(0x100, 4) == 0xFFFF_FFFF
    assert seen.calls[-1] == "config interrupt"
    assert not device.change_config(b"\xff" * 17)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_registers_answer_only_32_bit_accesses(mmio: VirtioMmio, size: int) -> None:
    assert mmio.read(Reg.MAGIC, size) == 0
    mmio.write(Reg.STATUS, size, 1)
    assert mmio.read(Reg.STATUS, 4) == 0


def test_status_bits_are_not_taken_back(mmio: VirtioMmio) -> None:
    agree(mmio)
    mmio.write(Reg.STATUS, 4, 1)
    assert mmio.read(Reg.STATUS, 4) == 11
