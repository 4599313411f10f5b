"""A disk whose sidecar is killed under load, and its successor: no request is lost, none is answered twice."""

from __future__ import annotations

import os
import random
import struct
import time
from pathlib import Path

import pytest

from harness.disk import CONFIG_WCE, FLUSH, OK, Disk, Driver, header
from harness.driver import Queue, Request
from motorcade.proto import messages as m

BLOCK = 4096
BLOCKS = 256


def succeed(old: Disk, path: Path, **kwargs: object) -> Disk:
    """A successor that serves what ``old``, which is dead, had been serving."""
    new = Disk(path, predecessor=old, takes_over=True, incoming=True, **kwargs)  # type: ignore[arg-type]
    new.take_over()
    return new


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(BLOCKS * BLOCK))
    return path


def stamp(block: int, generation: int) -> bytes:
    """What a block holds: every word says which block and which write of it that was."""
    return struct.pack("<II", block, generation) * (BLOCK // 8) if generation else bytes(BLOCK)


class Load:
    """Checksummed writes and reads at a depth: at most one request a block at a time, each answered exactly once (the
    harness's driver fails for a head that was not in flight)."""

    def __init__(self, queue: Queue, depth: int, seed: int) -> None:
        self.queue, self.depth, self.rng = queue, depth, random.Random(seed)
        self.driver = Driver(queue)
        self.generation = dict.fromkeys(range(BLOCKS), 0)
        self.busy: dict[int, tuple[Request, int | None]] = {}  # by block: the generation written, or None for a read
        self.flush: Request | None = None
        self.finished = 0

    def fill(self) -> None:
        """Makes requests available up to the depth."""
        while len(self.busy) < self.depth:
            block = self.rng.randrange(BLOCKS)
            if block in self.busy:
                continue
            if self.rng.random() < 0.5:
                generation = self.generation[block] + 1
                self.busy[block] = (self.driver.submit_write(block * BLOCK, stamp(block, generation)), generation)
            else:
                self.busy[block] = (self.driver.submit_read(block * BLOCK, BLOCK), None)
        if self.flush is None and self.rng.random() < 0.2:
            self.flush = self.queue.submit([header(FLUSH)], [1])
        self.queue.kick()

    def settle(self) -> None:
        """Checks what has completed."""
        for block, (request, generation) in list(self.busy.items()):
            if not request.done:
                continue
            del self.busy[block]
            self.finished += 1
            assert request.status == OK
            if generation is not None:
                self.generation[block] = generation
            else:
                assert request.data[0] == stamp(block, self.generation[block])
        if self.flush is not None and self.flush.done:
            assert self.flush.status == OK
            self.flush = None

    def turn(self, n: int = 1) -> None:
        """Waits for ``n`` requests and puts others in their place."""
        self.fill()
        self.queue.wait(n)
        self.settle()

    def drain(self) -> None:
        """Until nothing is in flight, and then all of the disk is what it should be."""
        while self.busy or self.flush is not None:
            self.queue.wait(1)
            self.settle()
        for block in range(BLOCKS):
            assert self.driver.read(block * BLOCK, BLOCK) == stamp(block, self.generation[block]), f"block {block}"


@pytest.mark.parametrize(
    ("engine", "event_idx", "overlay"),
    [("io_uring", True, False), ("io_uring", False, True), ("sync", True, True), ("sync", False, False)],
)
def test_killed_under_load(image: Path, tmp_path: Path, engine: str, event_idx: bool, overlay: bool) -> None:
    """Kills at random moments, some while the successor recovers."""
    options = {"engine": engine, "overlay_path": tmp_path / "overlay" if overlay else None}
    rng = random.Random(7)
    disk = Disk(image, **options)  # type: ignore[arg-type]
    made = [disk]
    try:
        load = Load(disk.start(64, event_idx=event_idx)[0], 20, 3)
        for _ in range(12):
            for _ in range(rng.randrange(3)):
                load.turn(rng.randrange(1, 8))
            load.fill()
            time.sleep(rng.random() * 0.003)  # the test's variety, not its result
            disk.kill()
            if rng.random() < 0.4:
                half = Disk(image, predecessor=disk, takes_over=True, incoming=True, **options)  # type: ignore[arg-type]
                made.append(half)
                assert half.setup is not None
                half.server.request("disk0", half.setup, 10_000, lambda _: None)
                half.server.request("disk0", m.Resume(), 10_000, lambda _: None)
                time.sleep(rng.random() * 0.003)
                half.kill()
                disk = half
            disk = succeed(disk, image, **options)
            made.append(disk)
            load.turn()
        load.drain()
        assert disk.needs_reset == []
        assert disk.shutdown() == 0
        # What is in the file is what the last driver saw.
        with Disk(image, **options) as again:  # type: ignore[arg-type]
            driver = again.driver()
            for block, generation in load.generation.items():
                assert driver.read(block * BLOCK, BLOCK) == stamp(block, generation)
    finally:
        for each in reversed(made):
            each.close()


def test_a_ring_that_the_guest_changed_in_the_gap(image: Path) -> None:
    """A used index that no device wrote breaks that queue, and nothing else."""
    with Disk(image) as disk:
        load = Load(disk.start(64)[0], 8, 1)
        load.turn(4)
        load.fill()
        disk.kill()
        load.queue._used16[1] = (load.queue.used_idx + 77) & 0xFFFF
        with succeed(disk, image) as new:
            assert "used index" in new.wait_needs_reset().reason
            new.reset()
            load.queue.restart()
            new.activate([load.queue])
            assert load.driver.write(0, bytes(BLOCK)) == OK
            assert new.shutdown() == 0


@pytest.mark.parametrize("seed", range(6))
def test_a_region_that_is_anything_at_all(image: Path, seed: int) -> None:
    """Of a process that had been taken over: its successor bounds all of it, and at worst the queue is broken."""
    rng = random.Random(seed)
    with Disk(image) as disk:
        load = Load(disk.start(64)[0], 8, 1)
        load.turn(4)
        load.fill()
        disk.kill()
        for _ in range(40):
            os.pwrite(disk.inflight, rng.randbytes(rng.choice([1, 2, 16])), 4096 + rng.randrange(64 * 16 + 16))
        with succeed(disk, image) as new:
            new.ask(m.Ping())
            new.reset()
            load.queue.restart()
            new.activate([load.queue])
            assert load.driver.write(0, bytes(BLOCK)) == OK
            assert new.shutdown() == 0


def test_what_was_kept_is_of_another_version(image: Path) -> None:
    with Disk(image) as disk:
        disk.start(64)
        disk.kill()
        os.pwrite(disk.inflight, (99).to_bytes(4, "little"), 0)
        with Disk(image, predecessor=disk, takes_over=True, incoming=True, wait=False) as new:
            assert new.wait_exit() == 1
            assert new.stopped is not None
            assert "is of version 99" in new.stopped


def test_the_cache_mode_outlives_the_process(image: Path) -> None:
    """A driver that was told that its writes are permanent is not told less by the next one."""
    with Disk(image) as disk:
        disk.start(64)
        disk.ask(m.ConfigWrite(CONFIG_WCE, b"\0"))
        disk.kill()
        with succeed(disk, image) as new:
            assert new.config[CONFIG_WCE] == 0
