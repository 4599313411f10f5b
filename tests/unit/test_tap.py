"""Control messages through a ring, as text: whole, in order, and from a writer that may lie."""

from __future__ import annotations

import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motorcade.proto import messages, tap, watch


@pytest.fixture
def ring() -> tuple[tap.Tap, watch.Ring]:
    """A writer that somebody listens to, and the reader."""
    fd = watch.make("test")
    written, seen = tap.Tap(fd), watch.map_or_make(fd)
    os.close(fd)
    watch.Switch(seen, qmp=False).kinds = 1
    return written, watch.Ring(seen, tap.SLOTS, tap.SLOT_SIZE)


def report(n: int) -> messages.Message:
    """A long one: several slots."""
    queues = tuple(messages.QueueStats(i, latency=(1 << 40,) * 40) for i in range(20))
    return messages.Message(n, 0, messages.StatsReport(queues))


def test_messages_come_out_as_they_went_in(ring: tuple[tap.Tap, watch.Ring]) -> None:
    writer, reader = ring
    writer(True, "root", messages.Message(7, 100, messages.ConfigWrite(3, b"x" * 200)))
    writer(False, "root", report(8))
    writer(False, "lan", messages.Message(9, 0, messages.Error(messages.ErrorCode.STATE, "nö\n")))
    joiner = tap.Joiner()
    first, second, third = joiner.add(*reader.read(tap.SLOTS))
    assert (first.device, first.to_sidecar, first.id, first.type) == ("root", True, 7, "ConfigWrite")
    assert first.body == {"offset": 3, "data": {"bytes": 200, "hex": "78" * 32}}
    assert (second.type, len(second.body["queues"])) == ("StatsReport", 17)
    assert second.body["queues"][16] == "... 4 more"
    assert third.body == {"code": "state", "text": "nö\n"}
    assert first.ns <= second.ns <= third.ns
    assert joiner.unreadable == 0


def test_nobody_looks_and_nothing_is_written() -> None:
    fd = watch.make("test")
    tap.Tap(fd)(True, "root", report(1))
    assert os.pread(fd, 8, 64) == bytes(8)
    os.close(fd)


def test_a_reader_that_is_lapped_goes_on_at_the_next_message(ring: tuple[tap.Tap, watch.Ring]) -> None:
    writer, reader = ring
    joiner = tap.Joiner()
    count = 0
    while reader._next() - reader.position <= tap.SLOTS:
        writer(True, "root", report(count))
        count += 1
    said = list(joiner.add(*reader.read(tap.SLOTS)))
    assert [s.id for s in said] == list(range(count - len(said), count))
    assert 0 < len(said) < count
    assert reader.lost > 0


@given(st.binary(max_size=4 * tap.SLOT_SIZE), st.integers(0, 1 << 20))
def test_any_bytes_are_messages_or_are_counted(data: bytes, first: int) -> None:
    joiner = tap.Joiner()
    assert list(joiner.add(first, data)) == []
    assert joiner.unreadable == len(data) // tap.SLOT_SIZE


@pytest.mark.parametrize("text", [b"{}", b"[1]", b'{"device":1,"to":1,"id":"x","type":1,"body":{}}', b"[" * 230])
def test_slots_that_hold_other_json_are_counted(text: bytes) -> None:
    slot = struct.pack("<QQHHHH", 1, 0, 0, 1, len(text), 0) + text
    joiner = tap.Joiner()
    assert list(joiner.add(0, slot.ljust(tap.SLOT_SIZE, b"\0"))) == []
    assert joiner.unreadable == 1
