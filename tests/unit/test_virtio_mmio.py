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
        self.interrupts = 0
        self.reset_may_end = threading.Event()
        self.reset_may_end.set()

    def activate(self, features: int, queues: dict[int, Queue], config: bytes) -> None:
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

    def pending(self) -> int:
        return self.interrupts

    def restore(self, bits: int) -> None:
        self.interrupts = bits

    def raise_again(self) -> None:
        self.calls.append("raised again")

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


# Snapshots.


def other_device(config: bytes = bytes(range(16)), sizes: tuple[int, ...] = (256, 128)) -> tuple[Device, Recorder]:
    seen = Recorder()
    device = Device("disk0", seen, seen, seen.doorbells, seen.needs_reset)
    device.plug(Identity(2, FEATURES, sizes, config))
    return device, seen


def test_a_running_device_is_restored_as_its_driver_left_it(device: Device, mmio: VirtioMmio, seen: Recorder) -> None:
    agree(mmio)
    set_queue(mmio, 1, 32, 0x1_2345_0000)
    mmio.write(Reg.STATUS, 4, 15)
    mmio.write(Reg.DEVICE_FEATURES_SEL, 4, 1)
    device.change_config(bytes(16))
    seen.interrupts = 3
    saved = device.save()
    assert device.save() == saved
    other, there = other_device(bytes(16))
    other.restore(saved)
    assert other.save() == saved
    assert there.calls == [("doorbells", [1])], "its sidecar is told by others"
    assert there.interrupts == 3
    assert other.running_queues() == {1: Queue(128, 32, True, 0x1_2345_0000, 0x1_2345_4000, 0x1_2345_8000)}
    front = VirtioMmio(other)
    assert front.read(Reg.DEVICE_FEATURES, 4) == 1
    assert front.read(Reg.CONFIG_GENERATION, 4) == 1


def test_a_device_whose_driver_had_not_started_it(device: Device, mmio: VirtioMmio) -> None:
    agree(mmio)
    set_queue(mmio, 0)
    other, there = other_device()
    other.restore(device.save())
    assert other.running_queues() == {}
    front = VirtioMmio(other)
    front.write(Reg.STATUS, 4, 15)
    assert there.calls == [("doorbells", []), ("doorbells", [0]), ("activate", ACCEPTED, [0])]


def test_another_configuration_is_news_to_the_driver(device: Device, mmio: VirtioMmio) -> None:
    agree(mmio)
    mmio.write(Reg.STATUS, 4, 15)
    other, there = other_device(bytes(16))
    other.restore(device.save())
    assert there.interrupts == 2
    assert other.config_generation == 1
    assert other.read_config(1, 1) == 0


def test_features_are_for_the_sidecar_to_judge(device: Device, mmio: VirtioMmio) -> None:
    """A NIC bound to another backend offers less, and may do in software what its driver uses."""
    agree(mmio)
    mmio.write(Reg.STATUS, 4, 15)
    other, _ = other_device()
    other.plug(Identity(2, 0, (256, 128), bytes(range(16))))
    other.restore(device.save())
    assert other.driver_features == ACCEPTED


def test_a_device_that_cannot_stand_in_is_refused(device: Device) -> None:
    saved = device.save()
    for other, why in (
        (other_device(sizes=(256,))[0], "queues"),
        (other_device(sizes=(256, 64))[0], "queues"),
        (other_device(bytes(8))[0], "16 bytes of configuration space"),
        (Device("disk0", Recorder(), Recorder(), lambda _q: None, lambda _r: None), "has not said"),
    ):
        before = other.status
        with pytest.raises(ValueError, match=why):
            other.restore(saved)
        assert other.status == before
    with pytest.raises(ValueError, match="has not said"):
        Device("later", Recorder(), Recorder(), lambda _q: None, lambda _r: None).save()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"status":15', b'"status":256'),
        (b'"status":15', b'"status":4'),
        (b'"status":15', b'"status":-1'),
        (b'"interrupts":0', b'"interrupts":4'),
        (b'"queue_sel":1', b'"queue_sel":4294967296'),
        (b'"driver_features":', b'"driver_features":99999999999'),
        (b'"size":32', b'"size":48'),
        (b'"size":32', b'"size":65536'),
        (b'"desc":65536', b'"desc":65537'),
        (b'"desc":65536', b'"desc":-65536'),
        (b'"ready":true', b'"ready":1'),
        (b'"queues":[', b'"queues":[3,'),
        (b"{", b"["),
        (b'"config":"', b'"config":"?'),
        (b'"virtio_type":2', b'"virtio_type":2,"more":3'),
    ],
)
def test_bytes_that_no_device_saved_are_refused(device: Device, mmio: VirtioMmio, old: bytes, new: bytes) -> None:
    agree(mmio)
    set_queue(mmio, 1, 32)
    mmio.write(Reg.STATUS, 4, 15)
    saved = device.save()
    assert old in saved
    other, there = other_device()
    with pytest.raises(ValueError):
        other.restore(saved.replace(old, new, 1))
    assert (other.status, there.calls) == (0, [])
