"""Which pages a forked process has written to, and copying them ahead."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import setproctitle

from motorcade.orchestrator import footprint
from motorcade.proto.memory import PAGE

PAGES = 64


@pytest.fixture
def region() -> Iterator[mmap.mmap]:
    """Private memory, all of it there."""
    with mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[:] = b"\1" * len(memory)
        yield memory


def address(region: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(region))


def within(ranges: footprint.Ranges, region: mmap.mmap) -> list[int]:
    """The numbers of the region's pages in ``ranges``."""
    start = address(region)
    pages = (at for begin, size in ranges for at in range(begin, begin + size, PAGE))
    return [(at - start) // PAGE for at in pages if start <= at < start + PAGES * PAGE]


@contextmanager
def forked(act: Callable[[], None]) -> Iterator[int]:
    """A process that has done ``act`` and waits; its pid."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            act()
            os.write(writer, b"!")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    try:
        assert os.read(reader, 1) == b"!"
        yield pid
    finally:
        os.close(reader)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_the_pages_that_each_kind_of_process_wrote_to_are_found(region: mmap.mmap) -> None:
    with forked(lambda: supervise(region)) as pid:
        found = footprint.learn(pid)
        assert set(found) == {"supervisor", "blk"}
        assert within(found["supervisor"], region) == [1]
        assert within(found["blk"], region) == [3, 4, 9]
        assert (address(region) + 3 * PAGE, 2 * PAGE) in found["blk"]


def supervise(region: mmap.mmap) -> None:
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            supervisor = os.getppid()
            setproctitle.setproctitle("motorcade: blk-root (web)")
            for page in (3, 4, 9):
                region[page * PAGE] = 2
            os.write(writer, b"!")
            while os.getppid() == supervisor:
                signal.sigtimedwait((signal.SIGTERM,), 0.05)
        finally:
            os._exit(0)
    assert os.read(reader, 1) == b"!"
    region[PAGE] = 2


def test_of_a_process_that_is_gone_nothing_is_known() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    assert footprint.learn(pid) == {}


def test_pages_are_copied_ahead_and_those_that_are_unmapped_left_out(region: mmap.mmap) -> None:
    start = address(region)
    with mmap.mmap(-1, PAGE) as other:
        gone = address(other)
    with forked(
        lambda: footprint.copy_ahead([(start + PAGE, 2 * PAGE), (gone, PAGE), (start + 7 * PAGE, PAGE)])
    ) as pid:
        assert within(footprint.learn(pid)["supervisor"], region) == [1, 2, 7]
