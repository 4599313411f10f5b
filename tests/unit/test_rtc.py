"""The MC146818 as Linux's driver uses it, in each of its formats."""

from __future__ import annotations

from calendar import timegm

import pytest

from motorcade.core.rtc import Rtc

NS = 1_000_000_000


class Clock:
    """An Rtc whose host clock the test moves, and a driver's accesses to it."""

    def __init__(self, *utc: int) -> None:
        self.ns = timegm(utc) * NS
        self.rtc = Rtc(lambda: self.ns)

    def get(self, index: int) -> int:
        self.rtc.write(0, 1, index)
        return self.rtc.read(1, 1)

    def put(self, index: int, value: int) -> None:
        self.rtc.write(0, 1, index)
        self.rtc.write(1, 1, value)

    def date(self) -> list[int]:
        """Century, year, month, day, weekday, hours, minutes, seconds as they stand in the registers."""
        return [self.get(i) for i in (0x32, 9, 8, 7, 6, 4, 2, 0)]


def test_bcd_24_hours_is_the_default() -> None:
    clock = Clock(2026, 11, 22, 17, 45, 59)
    assert clock.get(0x0B) == 0x02
    assert clock.date() == [0x20, 0x26, 0x11, 0x22, 1, 0x17, 0x45, 0x59]  # a Sunday
    clock.ns += NS
    assert clock.date()[5:] == [0x17, 0x46, 0x00]


def test_binary() -> None:
    clock = Clock(2026, 11, 22, 17, 45, 59)
    clock.put(0x0B, 0x06)
    assert clock.date() == [20, 26, 11, 22, 1, 17, 45, 59]


@pytest.mark.parametrize(("hour", "register"), [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)])
def test_12_hours(hour: int, register: int) -> None:
    clock = Clock(2026, 1, 1, hour, 0, 0)
    clock.put(0x0B, 0x00)
    assert clock.get(4) == register
    clock.put(4, register)
    clock.put(0x0B, 0x02)
    assert clock.get(4) == hour // 10 << 4 | hour % 10


def test_update_in_progress_only_just_before_the_tick() -> None:
    clock = Clock(2026, 1, 1, 0, 0, 0)
    for ns, uip in ((0, 0), (NS // 2, 0), (NS - 245_000, 0), (NS - 244_000, 0x80), (NS - 1, 0x80), (NS, 0)):
        clock.ns = timegm((2026, 1, 1, 0, 0, 0)) * NS + ns
        assert clock.get(0x0A) == 0x26 | uip
    clock.ns = timegm((2026, 1, 1, 0, 0, 0)) * NS + NS - 1
    clock.put(0x0B, 0x82)
    assert clock.get(0x0A) == 0x26  # a clock that is being set does not update


def test_setting_the_time_as_linux_does() -> None:
    clock = Clock(2026, 11, 22, 17, 45, 59)
    clock.put(0x0B, 0x82)
    clock.ns += 90 * NS
    assert clock.date()[6:] == [0x45, 0x59]  # it stands still
    for index, value in ((0x32, 0x20), (9, 0x24), (8, 0x02), (7, 0x29), (4, 0x23), (2, 0x59), (0, 0x58)):
        clock.put(index, value)
    clock.put(0x0B, 0x02)
    assert clock.date() == [0x20, 0x24, 0x02, 0x29, 5, 0x23, 0x59, 0x58]
    clock.ns += NS // 2  # the first tick comes after half a second
    assert clock.get(0) == 0x59
    clock.ns += NS
    assert clock.date() == [0x20, 0x24, 0x03, 0x01, 6, 0, 0, 0]


def test_setting_one_register_on_the_run_keeps_the_rest() -> None:
    clock = Clock(2026, 11, 22, 17, 45, 59)
    clock.put(4, 0x03)
    assert clock.date() == [0x20, 0x26, 0x11, 0x22, 1, 0x03, 0x45, 0x59]


@pytest.mark.parametrize("value", range(0, 256, 5))
def test_nonsense_is_taken_without_complaint(value: int) -> None:
    for b in (0x80, 0x82, 0x84, 0x86):
        clock = Clock(2026, 2, 28, 17, 45, 59)
        clock.put(0x0B, b)
        for index in (0, 2, 4, 6, 7, 8, 9, 0x32):
            clock.put(index, value)
        clock.put(0x0B, b & ~0x80)
        clock.ns += 400 * 86400 * NS
        clock.date()
    clock = Clock(2026, 1, 31, 0, 0, 0)
    for index in range(128):
        clock.put(index, value)
    clock.date()


def test_alarm_and_nvram_are_kept_and_status_is_not_writable() -> None:
    clock = Clock(2026, 1, 1, 0, 0, 0)
    for index in (1, 3, 5, 0x0E, 0x31, 0x33, 0x7F):
        clock.put(index, index ^ 0x5A)
    assert [clock.get(i) for i in (1, 3, 5, 0x0E, 0x31, 0x33, 0x7F)] == [
        i ^ 0x5A for i in (1, 3, 5, 0x0E, 0x31, 0x33, 0x7F)
    ]
    clock.put(0x0C, 0xFF)
    clock.put(0x0D, 0x00)
    clock.put(0x0A, 0xFF)
    assert (clock.get(0x0C), clock.get(0x0D), clock.get(0x0A)) == (0, 0x80, 0x7F)


def test_access_sizes_and_the_nmi_bit() -> None:
    clock = Clock(2026, 1, 1, 0, 0, 0)
    clock.put(0x80 | 0x20, 7)
    assert clock.get(0x20) == 7
    clock.rtc.write(0, 2, 0x0921)  # index 0x21, value 9
    assert clock.get(0x21) == 9
    assert clock.rtc.read(0, 1) == 0xFF
    assert clock.rtc.read(0, 2) == 0xFFFF


def test_a_snapshot_has_the_offset_and_not_the_time() -> None:
    clock = Clock(2026, 11, 22, 17, 45, 59)
    clock.put(0x09, 0x31)  # 2031
    clock.put(0x40, 0x5A)
    saved = clock.rtc.save()
    clock.ns += 90 * NS
    assert clock.rtc.save() == saved
    other = Clock(2026, 12, 1, 0, 0, 0)
    other.rtc.restore(saved)
    assert other.rtc.save() == saved
    assert other.date()[:2] == [0x20, 0x31]
    assert other.get(0x40) == 0x5A


def test_a_clock_that_is_being_set_is_saved_as_it_stands() -> None:
    clock = Clock(2026, 11, 22, 17, 45, 59)
    clock.put(0x0B, 0x82)
    clock.put(0x04, 0x03)
    other = Clock(2027, 1, 1, 0, 0, 0)
    other.rtc.restore(clock.rtc.save())
    assert other.date() == [0x20, 0x26, 0x11, 0x22, 1, 0x03, 0x45, 0x59]
    other.put(0x0B, 0x02)
    assert other.get(0x04) == 0x03


def test_a_year_far_away_survives() -> None:
    clock = Clock(2026, 11, 22, 17, 45, 59)
    clock.put(0x32, 0x89)
    other = Clock(2026, 11, 22, 17, 45, 59)
    other.rtc.restore(clock.rtc.save())
    assert other.date()[:2] == [0x89, 0x26]


@pytest.mark.parametrize(
    ("at", "byte"),
    [(0, 0x80), (1, 0x01), (1, 0x02), (-1, 0x7F), (-1, 0x80)],
    ids=["index", "frozen", "neither", "far ahead", "far back"],
)
def test_states_that_cannot_be_are_refused(at: int, byte: int) -> None:
    clock = Clock(2026, 11, 22, 17, 45, 59)
    saved = clock.rtc.save()
    wrong = bytearray(saved)
    wrong[at] = byte
    for data in (bytes(wrong), saved[:-1], saved + b"x", b""):
        with pytest.raises(ValueError):
            clock.rtc.restore(data)
    assert clock.rtc.save() == saved
