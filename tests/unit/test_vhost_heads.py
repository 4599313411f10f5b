"""What native/vhost_heads.c knows of requests that a dead backend had, against a model of both sides of a ring."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motorcade.proto.memory import GuestMemory, Region
from motorcade.sidecars import device
from motorcade.sidecars._vhost import ffi, lib

SIZE = 8
DESC, AVAIL, USED = 0x1000, 0x2000, 0x3000


@dataclass
class Ring:
    """Driver and backend; the account of ours is ``loop``'s."""

    memory: GuestMemory
    loop: Any
    free: list[int] = field(default_factory=lambda: list(range(SIZE)))
    held: list[int] = field(default_factory=list)  # with the backend, in the order of submission
    avail_idx: int = 0
    used_idx: int = 0

    def offer(self) -> None:
        """The driver makes a request available."""
        if self.free:
            head = self.free.pop()
            self.memory.write(AVAIL + 4 + 2 * (self.avail_idx % SIZE), struct.pack("<H", head))
            self.avail_idx = (self.avail_idx + 1) & 0xFFFF
            self.memory.write(AVAIL + 2, struct.pack("<H", self.avail_idx))
            self.held.append(head)

    def answer(self, which: int, *, call: bool) -> None:
        """The backend answers one, whichever; ``call``: it says so."""
        if self.held:
            head = self.held.pop(which % len(self.held))
            self.memory.write(USED + 4 + 8 * (self.used_idx % SIZE), struct.pack("<II", head, 0))
            self.used_idx = (self.used_idx + 1) & 0xFFFF
            self.memory.write(USED + 2, struct.pack("<H", self.used_idx))
            self.free.append(head)
        if call:
            os.eventfd_write(lib.mc_vhost_call_fd(self.loop, 0), 1)
            lib.mc_vhost_flush(self.loop)

    def outstanding(self) -> list[int]:
        """What the next backend will find from used.idx on."""
        count = (self.avail_idx - self.used_idx) & 0xFFFF
        raw = self.memory.read(AVAIL + 4, 2 * SIZE)
        ring = struct.unpack(f"<{SIZE}H", raw)
        return [ring[(self.used_idx + i) % SIZE] for i in range(count)]


@pytest.fixture(scope="module")
def parts() -> Iterator[tuple[GuestMemory, Any, list[Any]]]:
    """Memory, a struct mc_mem * of it, and what must outlive both."""
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 1 << 16)
    memory = GuestMemory(fd, [Region(0, 1 << 16, 0)])
    dirty = mmap.mmap(-1, mmap.PAGESIZE)
    mem = ffi.new("struct mc_mem *")
    device.init_memory(ffi, mem, memory, dirty)
    yield memory, mem, [dirty]
    os.close(fd)


def ring(parts: tuple[GuestMemory, Any, list[Any]], start: int, events: list[int]) -> Ring:
    memory, mem, keep = parts
    memory.write(DESC, bytes(0x3000))
    for at in (AVAIL, USED):
        memory.write(at + 2, struct.pack("<H", start))
    vq = ffi.new("struct mc_vq *")
    isr = ffi.new("struct mc_isr *")
    keep += [vq, isr]
    vq.mem, vq.isr = mem, isr
    queue = device.QueueConfig(0, SIZE, DESC, AVAIL, USED, start, start)
    device.init_queue(lib, vq, queue, 0, kick_fd=events[0], call_fd=events[0])
    loop = lib.mc_vhost_new(1)
    assert lib.mc_vhost_attach(loop, 0, vq, ffi.NULL, False) == 0
    lib.mc_vhost_begin(loop, 0, start, start)
    return Ring(memory, loop, avail_idx=start, used_idx=start)


STEPS = st.lists(st.tuples(st.sampled_from(["offer", "offer", "answer", "call"]), st.integers(0, SIZE)), max_size=200)


@settings(max_examples=300, deadline=None)
@given(start=st.sampled_from([0, 65530]), steps=STEPS)
def test_the_next_backend_finds_just_what_was_not_answered_in_its_order(
    parts: tuple[GuestMemory, Any, list[Any]], start: int, steps: list[tuple[str, int]]
) -> None:
    call = os.eventfd(0, os.EFD_NONBLOCK)
    r = ring(parts, start, [call])
    try:
        unseen, lost = 0, False
        for what, which in steps:
            if what == "offer":
                unseen += bool(r.free)
                r.offer()
                continue
            r.answer(which, call=what == "call")
            if what == "call":
                # More than the ring has room for, since the last look: no account is possible until all is answered.
                lost = bool(r.held) and (lost or unseen > SIZE)
                unseen = 0
        lost = bool(r.held) and (lost or unseen > SIZE)
        found = lib.mc_vhost_recover(r.loop, 0)
        if lost:
            assert found == -1
        else:
            assert found == len(r.held)
            assert r.outstanding() == r.held
    finally:
        lib.mc_vhost_free(r.loop)
        os.close(call)


def test_an_answer_to_what_nobody_asked_leaves_no_account(parts: tuple[GuestMemory, Any, list[Any]]) -> None:
    call = os.eventfd(0, os.EFD_NONBLOCK)
    for head in (5, 4000000000):
        r = ring(parts, 0, [call])
        r.offer()
        r.offer()
        r.memory.write(USED + 4, struct.pack("<II", head, 0))
        r.memory.write(USED + 2, struct.pack("<H", 1))
        assert lib.mc_vhost_recover(r.loop, 0) == -1
        lib.mc_vhost_free(r.loop)
    os.close(call)


def test_a_driver_that_runs_ahead_or_names_no_descriptor_leaves_no_account(
    parts: tuple[GuestMemory, Any, list[Any]],
) -> None:
    call = os.eventfd(0, os.EFD_NONBLOCK)
    for entry, index in ((60000, 1), (0, 4000)):
        r = ring(parts, 0, [call])
        r.memory.write(AVAIL + 4, struct.pack("<H", entry))
        r.memory.write(AVAIL + 2, struct.pack("<H", index))
        assert lib.mc_vhost_recover(r.loop, 0) == -1
        lib.mc_vhost_free(r.loop)
    os.close(call)
