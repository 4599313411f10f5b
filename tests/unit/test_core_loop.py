"""The core's two-level loop and the buses."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest

from motorcade.core.bus import Bus
from motorcade.core.layout import VIRTIO_MMIO_SLOTS, slot_gsi
from motorcade.core.loop import Loop


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


def test_call_soon_from_another_thread_wakes_run(loop: Loop) -> None:
    ran_on: list[int] = []

    def call() -> None:
        ran_on.append(threading.get_ident())
        loop.stop()

    thread = threading.Thread(target=lambda: loop.call_soon(call))
    thread.start()
    loop.run()
    thread.join()
    assert ran_on == [threading.get_ident()]


def test_run_until_serves_control_and_not_outer(loop: Loop) -> None:
    control, outer = os.eventfd(1, os.EFD_NONBLOCK), os.eventfd(1, os.EFD_NONBLOCK)
    seen: list[str] = []

    def on_outer(_mask: int) -> None:
        os.eventfd_read(outer)
        seen.append("outer")
        loop.stop()

    def on_control() -> None:
        os.eventfd_read(control)
        seen.append("control")

    loop.add_control(control, on_control)
    loop.outer.register(outer, 1, on_outer)
    assert loop.run_until(lambda: bool(seen), 10)
    assert seen == ["control"]
    loop.run()
    assert seen == ["control", "outer"]
    for fd in (control, outer):
        os.close(fd)


def test_run_until_times_out(loop: Loop) -> None:
    assert not loop.run_until(lambda: False, 0.01)


def test_deadlines_fire_in_both_levels(loop: Loop) -> None:
    due: list[float] = [time.monotonic() + 0.01]
    fired: list[float] = []

    def expire(now: float) -> None:
        fired.append(now)
        due.clear()
        loop.stop()

    loop.add_deadlines(lambda: due[0] if due else None, expire)
    loop.run()
    assert len(fired) == 1
    due.append(time.monotonic() + 0.01)
    assert loop.run_until(lambda: len(fired) == 2, 10)


class Ram:
    def __init__(self) -> None:
        self.written: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        return 0x1122334455667788

    def write(self, offset: int, size: int, value: int) -> None:
        self.written.append((offset, size, value))


def test_bus_decodes_and_masks() -> None:
    bus, low, high = Bus("test"), Ram(), Ram()
    bus.add(0x200, 0x10, high)
    bus.add(0x100, 0x100, low)
    bus.write(0x1FF, 1, 5)
    bus.write(0x200, 4, 6)
    bus.write(0x20E, 4, 7)  # over the end: nobody's
    assert (low.written, high.written) == ([(0xFF, 1, 5)], [(0, 4, 6)])
    assert bus.read(0x100, 2) == 0x7788
    assert bus.read(0x300, 4) == 0xFFFF_FFFF


@pytest.mark.parametrize("base", [0xF8, 0x100, 0x104, 0x10F])
def test_bus_refuses_overlaps(base: int) -> None:
    bus = Bus("test")
    bus.add(0x100, 0x10, Ram())
    with pytest.raises(ValueError, match="overlaps"):
        bus.add(base, 0x10, Ram())


def test_first_disks_and_nics_do_not_share_lines() -> None:
    assert len({slot_gsi(s) for s in (*range(8), *range(16, 20), *range(32, 37))}) == 17
    assert {slot_gsi(s) for s in range(VIRTIO_MMIO_SLOTS)} == {5, 6, 7, *range(10, 24)}
    with pytest.raises(ValueError):
        slot_gsi(VIRTIO_MMIO_SLOTS)
