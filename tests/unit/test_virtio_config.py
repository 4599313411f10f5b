"""Configuration space that is a device's state: what the driver writes, what a sidecar changes, what is kept."""

from __future__ import annotations

import pytest

from motorcade.core.virtio import CONFIG_CHANGED, Device, Identity, Queue, Status

KINDS = bytes([1, 1, 2, 2])  # two bytes that the sidecar changes, two that the driver writes, two of nobody's keeping
START = b"\x01\x02\x00\x00\x05\x06"


class World:
    """A device, and what happens to it."""

    def __init__(self, config: bytes = START, kinds: bytes = KINDS) -> None:
        self.written: list[tuple[int, bytes]] = []
        self.activated: list[bytes] = []
        self.bits = 0
        self.changes = 0
        self.device = Device("d", self, self, lambda _queues: None, lambda _reason: None)
        self.device.on_config_written = self.on_written
        self.device.plug(Identity(5, 0, (8,), config, kinds))

    def on_written(self) -> None:
        self.changes += 1

    def start(self) -> None:
        for status in (1, 3):
            self.device.write_status(status)
        self.device.driver_features_sel = 1
        self.device.write_driver_features(1)
        for status in (11, 15):
            self.device.write_status(status)
        assert self.device.status == Status(15)

    # Backend and interrupts.

    def activate(self, features: int, queues: dict[int, Queue], config: bytes) -> None:
        self.activated.append(config)

    def write_config(self, offset: int, data: bytes) -> None:
        self.written.append((offset, data))

    def config_changed(self) -> None:
        self.bits |= CONFIG_CHANGED

    def reset(self) -> None: ...
    def clear(self) -> None:
        self.bits = 0

    def pending(self) -> int:
        return self.bits

    def restore(self, bits: int) -> None:
        self.bits = bits

    def raise_again(self) -> None: ...


def test_what_the_driver_writes_it_reads_at_once_and_the_sidecar_hears_of_it() -> None:
    world = World()
    world.start()
    world.device.write_config(2, 2, 0xBEEF)
    assert world.device.read_config(2, 2) == 0xBEEF
    assert (world.written, world.changes, world.bits) == ([(2, b"\xef\xbe")], 1, 0)
    world.device.write_config(0, 4, 0xFFFFFFFF)  # the first two are not the driver's
    assert world.device.config == b"\x01\x02\xff\xff\x05\x06"


def test_a_sidecar_that_knows_less_changes_only_its_own() -> None:
    world = World()
    world.start()
    world.device.write_config(2, 2, 0xBEEF)
    assert world.device.change_config(b"\x09\x08\x00\x00\x07\x06")
    assert world.device.config == b"\x09\x08\xef\xbe\x07\x06"
    assert world.bits == CONFIG_CHANGED


def test_a_reset_forgets_what_the_driver_wrote_and_says_so_if_there_was_anything() -> None:
    world = World()
    world.start()
    world.device.write_status(0)
    assert world.changes == 0
    world.start()
    world.device.write_config(2, 1, 7)
    world.device.write_status(0)
    assert (world.device.config, world.changes) == (START, 2)
    world.start()
    assert world.activated == [START] * 3


@pytest.mark.parametrize("target", [b"\x01\x02", b"\x44\x55"])
def test_a_restored_device_has_its_state_and_the_new_sidecars_own(target: bytes) -> None:
    old = World()
    old.start()
    old.device.write_config(2, 2, 0xBEEF)
    assert old.device.change_config(target + b"\x00\x00\x05\x06")
    old.device.write_config(3, 1, 0xAA)
    saved = old.device.save()
    new = World()
    new.device.restore(saved)
    assert new.device.config == new.device.kept_config == old.device.config == target + b"\xef\xaa\x05\x06"
    assert new.device.save() == saved  # nothing has changed, so nobody is told
    other = World(b"\x01\x02\x00\x00\x05\x99")
    other.device.restore(saved)
    assert other.device.config == target + b"\xef\xaa\x05\x99"
    assert other.bits == CONFIG_CHANGED


def test_without_kinds_all_of_it_is_the_sidecars() -> None:
    world = World(kinds=b"")
    world.start()
    world.device.write_config(2, 2, 0xBEEF)
    assert (world.device.config, world.changes, world.activated) == (START, 0, [b""])
    assert world.written == [(2, b"\xef\xbe")]
