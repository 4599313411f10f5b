"""The memfd through which a sidecar is watched: its layout in C and in Python, its ring under a hostile writer."""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path

import pytest

from harness.compile import NATIVE, compile_c, run
from motorcade.proto import watch

SOURCE = Path(__file__).with_name("native") / "watch_layout.c"


def mapping(data: bytes = b"") -> mmap.mmap:
    made = mmap.mmap(-1, watch.SIZE)
    made[: len(data)] = data
    return made


def write(ring: mmap.mmap, number: int, *, seq: int | None = None) -> None:
    """Event ``number``, as the C code writes it."""
    event = struct.pack("<QQqIHBB", number + 1 if seq is None else seq, 1000 + number, number, 0, 0, 0, watch.Kind.TAKE)
    at = watch.RING_AT + number % watch.EVENTS * watch.EVENT_SIZE
    ring[at : at + watch.EVENT_SIZE] = event


def set_next(ring: mmap.mmap, number: int) -> None:
    ring[64:72] = number.to_bytes(8, "little")


def test_the_layout_is_the_one_of_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = run(compile_c(tmp_path / "layout", [SOURCE, NATIVE / "watch.c"]))
    assert [int(word) for word in said.split()] == [
        watch.VERSION, watch.MAX_QUEUES, watch.EVENTS, watch.RING_AT, watch.SIZE, watch.BUCKETS, len(watch.Kind),
        4, 64, watch.QUEUES_AT, watch.QUEUE_SIZE, 9 * 8, 11 * 8, watch.EVENT_SIZE,
    ]  # fmt: skip
    seen = mapping((tmp_path / "watch").read_bytes())
    counted = watch.counters(seen, 3)
    assert (counted.requests, counted.taken, counted.latency[39], counted.kicks_suppressed) == (1, 8, 40, 8)
    ring = watch.Ring(seen)
    ring.position = 0
    events, torn = watch.events(*ring.read(10))
    assert torn == 0
    assert [(e.kind, e.queue, e.head, e.length, e.arg) for e in events] == [
        (watch.Kind.PUSH, 1, 2, 3, 4),
        (watch.Kind.ERROR, watch.NO_QUEUE, 0xFFFF, 7, -5),
    ]


def test_the_halves_of_the_switch_are_apart() -> None:
    ring = mapping()
    ours, qmp = watch.Switch(ring, qmp=False), watch.Switch(ring, qmp=True)
    ours.kinds, qmp.kinds = 0b101, 0b10
    assert (ours.kinds, qmp.kinds, ring[4:8]) == (0b101, 0b10, bytes([5, 0, 2, 0]))
    ours.release()
    qmp.release()


def test_events_are_read_once_in_order_over_the_ring_s_end() -> None:
    ring = mapping()
    set_next(ring, watch.EVENTS - 3)
    reader = watch.Ring(ring)
    for n in range(watch.EVENTS - 3, watch.EVENTS + 4):
        write(ring, n)
    set_next(ring, watch.EVENTS + 4)
    first, data = reader.read(5)
    more = watch.events(*reader.read(100))[0]
    numbers = [e.number for e in watch.events(first, data)[0] + more]
    assert numbers == list(range(watch.EVENTS - 3, watch.EVENTS + 4))
    assert reader.read(100)[1] == b""
    assert reader.lost == 0


def test_a_reader_that_is_lapped_counts_what_it_lost() -> None:
    ring = mapping()
    reader = watch.Ring(ring)
    last = 2 * watch.EVENTS + 10
    for n in range(last - watch.EVENTS, last):
        write(ring, n)
    set_next(ring, last)
    first, data = reader.read(watch.EVENTS)
    assert (first, reader.lost) == (watch.EVENTS + 10, watch.EVENTS + 10)
    assert len(watch.events(first, data)[0]) == watch.EVENTS


def test_an_event_that_is_being_written_is_left_for_the_next_time_and_no_longer() -> None:
    ring = mapping()
    reader = watch.Ring(ring)
    write(ring, 0)
    write(ring, 1, seq=0)
    set_next(ring, 2)
    assert [e.number for e in watch.events(*reader.read(10))[0]] == [0]
    assert watch.events(*reader.read(10)) == ([], 1)  # its writer died, perhaps
    write(ring, 2)
    set_next(ring, 3)
    assert [e.number for e in watch.events(*reader.read(10))[0]] == [2]


@pytest.mark.parametrize("number", [1 << 40, (1 << 64) - 1, 1 << 63, 5])
def test_a_writer_that_lies_about_its_position(number: int) -> None:
    """Nothing but events with the right number is taken for one, and every read ends."""
    ring = mapping(os.urandom(watch.RING_AT + 4096))
    set_next(ring, 10)
    reader = watch.Ring(ring)
    set_next(ring, number)
    for _ in range(3):
        first, data = reader.read(64)
        found, torn = watch.events(first, data)
        assert len(found) + torn == len(data) // watch.EVENT_SIZE <= 64
    assert reader.position <= 1 << 64


def test_a_descriptor_of_another_layout_is_not_written_to() -> None:
    fd = os.memfd_create("other")
    os.ftruncate(fd, watch.SIZE)
    private = watch.map_or_make(fd)
    private[0] = 7
    assert os.pread(fd, 1, 0) == b"\0"
    os.ftruncate(fd, 10)
    assert len(watch.map_or_make(fd)) == watch.SIZE
    os.close(fd)
    made = watch.make("test")
    with pytest.raises(PermissionError):
        os.ftruncate(made, 0)
    shared = watch.map_or_make(made)
    shared[4] = 1
    assert os.pread(made, 5, 0) == b"\1\0\0\0\1"
    os.close(made)
