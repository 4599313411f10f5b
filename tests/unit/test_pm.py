"""Power management registers as a guest's ACPI code uses them, and the older ways to reset."""

from __future__ import annotations

import pytest

from motorcade.core import pm
from motorcade.core.bus import Bus


class Machine:
    """A port bus with everything of core/pm.py on it, noting what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.pm = pm.PmDevice(
            lambda: self.asked.append("shutdown"),
            lambda: self.asked.append("reset"),
            lambda gsi: self.asked.append(f"gsi {gsi}"),
        )
        self.ports = Bus("port")
        self.ports.add(pm.BASE, pm.SIZE, self.pm)
        self.ports.add(pm.KBD_COMMAND, 1, pm.KeyboardReset(lambda: self.asked.append("reset")))
        self.ports.add(pm.CF9, 1, pm.Cf9Reset(lambda: self.asked.append("reset")))


@pytest.fixture
def machine() -> Machine:
    return Machine()


def test_power_button_sets_the_event_then_interrupts(machine: Machine) -> None:
    assert machine.ports.read(pm.BASE + pm.EVENT_STATUS, 4) == 0
    machine.pm.power_button()
    machine.pm.power_button()
    assert machine.asked == ["gsi 9", "gsi 9"]
    assert machine.ports.read(pm.BASE + pm.EVENT_STATUS, 1) == 0  # a part of it clears nothing
    assert machine.ports.read(pm.BASE + pm.EVENT_STATUS, 4) == pm.EVENT_POWER_BUTTON
    assert machine.ports.read(pm.BASE + pm.EVENT_STATUS, 4) == 0


def test_event_is_set_before_the_interrupt() -> None:
    seen: list[int] = []
    device = pm.PmDevice(lambda: None, lambda: None, lambda _gsi: seen.append(device.read(pm.EVENT_STATUS, 4)))
    device.power_button()
    assert seen == [pm.EVENT_POWER_BUTTON]


def test_reset_forgets_an_unseen_press(machine: Machine) -> None:
    machine.pm.power_button()
    machine.pm.reset()
    assert machine.ports.read(pm.BASE + pm.EVENT_STATUS, 4) == 0


def test_soft_off(machine: Machine) -> None:
    machine.ports.write(pm.BASE + pm.SLEEP_STATUS, 1, 0x80)  # Linux clears WAK_STS first
    assert machine.ports.read(pm.BASE + pm.SLEEP_STATUS, 1) == 0
    machine.ports.write(pm.BASE + pm.SLEEP_CONTROL, 1, pm.SLEEP_TYPE_S5 << 2)  # SLP_EN is not set yet
    assert machine.asked == []
    machine.ports.write(pm.BASE + pm.SLEEP_CONTROL, 1, pm.SLEEP_TYPE_S5 << 2 | 0x20)
    assert machine.asked == ["shutdown"]


def test_other_sleep_types_are_logged_only(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.ports.write(pm.BASE + pm.SLEEP_CONTROL, 1, 3 << 2 | 0x20)
    assert machine.asked == []
    assert "sleep type 3" in caplog.text


def test_reset_register(machine: Machine) -> None:
    machine.ports.write(pm.BASE + pm.RESET, 1, 0x41)
    machine.ports.write(pm.BASE + pm.RESET, 2, pm.RESET_VALUE)
    machine.ports.write(pm.BASE + pm.RESET + 1, 1, pm.RESET_VALUE)
    assert machine.asked == []
    machine.ports.write(pm.BASE + pm.RESET, 1, pm.RESET_VALUE)
    assert machine.asked == ["reset"]


def test_keyboard_controller_reset(machine: Machine) -> None:
    assert machine.ports.read(pm.KBD_COMMAND, 1) & 2 == 0  # its input buffer is empty: a driver may command
    machine.ports.write(pm.KBD_COMMAND, 1, 0xAE)
    assert machine.asked == []
    machine.ports.write(pm.KBD_COMMAND, 1, 0xFE)
    assert machine.asked == ["reset"]


def test_cf9_resets_on_the_rise_of_rst_cpu(machine: Machine) -> None:
    machine.ports.write(pm.CF9, 1, 0x02)
    assert (machine.ports.read(pm.CF9, 1), machine.asked) == (0x02, [])
    machine.ports.write(pm.CF9, 1, 0x06)
    assert machine.asked == ["reset"]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_reserved_registers_read_zero_and_take_no_writes(machine: Machine, size: int) -> None:
    for offset in range(7, pm.SIZE - size + 1):
        assert machine.ports.read(pm.BASE + offset, size) == 0
        machine.ports.write(pm.BASE + offset, size, (1 << 8 * size) - 1)
    assert machine.asked == []


def test_a_new_generation_is_an_event_of_its_own(machine: Machine) -> None:
    machine.pm.generation_changed()
    machine.pm.power_button()
    assert machine.ports.read(pm.BASE, 4) == pm.EVENT_GENERATION | pm.EVENT_POWER_BUTTON


def test_events_that_were_not_read_survive_a_snapshot(machine: Machine) -> None:
    machine.pm.power_button()
    saved = machine.pm.save()
    assert machine.ports.read(pm.BASE, 4) == pm.EVENT_POWER_BUTTON
    assert machine.pm.save() != saved
    machine.pm.restore(saved)
    assert machine.pm.save() == saved
    assert machine.ports.read(pm.BASE, 4) == pm.EVENT_POWER_BUTTON


@pytest.mark.parametrize("data", [b"", bytes(3), bytes(5), b"\x08\0\0\0", b"\xff" * 4])
def test_events_that_cannot_be_are_refused(machine: Machine, data: bytes) -> None:
    with pytest.raises(ValueError):
        machine.pm.restore(data)
    assert machine.pm.save() == bytes(4)


def test_cf9_survives_a_snapshot() -> None:
    asked: list[str] = []
    before, after = (pm.Cf9Reset(lambda: asked.append("reset")) for _ in range(2))
    before.write(0, 1, 0x02)
    after.restore(before.save())
    assert after.read(0, 1) == 0x02
    for data in (b"", b"\x04", b"\x02\x02"):
        with pytest.raises(ValueError):
            after.restore(data)
    assert asked == []
