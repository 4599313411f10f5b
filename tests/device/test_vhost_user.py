"""The vhost-user front-end before a real backend: qemu-storage-daemon's disk, and the driver simulator."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import vhostbackend
from harness.disk import CONFIG_WCE, F_CONFIG_WCE, OK, Driver
from harness.driver import Memory, Queue, Request
from harness.sidecar import Sidecar, SidecarGone
from harness.vhostbackend import Storage
from motorcade.proto import messages as m
from motorcade.proto.memory import Region

pytestmark = pytest.mark.skipif(bool(vhostbackend.missing), reason=vhostbackend.missing)

DEVICE = "motorcade.sidecars.vhostuser.device:VhostUserDevice"
SIZE = 4 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Random bytes."""
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def storage(tmp_path: Path, image: Path) -> Iterator[Storage]:
    with Storage(tmp_path, image, queues=2) as s:
        yield s


def bridge(storage: Storage, *, queues: int = 1, device: dict[str, Any] | None = None, **more: Any) -> Sidecar:
    """The sidecar, connected."""
    options = {"type": "blk", "socket": str(storage.path), "queues": queues, "queue_size": 64, **(device or {})}
    fds = storage.connect()
    try:
        role = m.KitBoot("disk0", "vhost-user", json.dumps(options))
        return Sidecar(DEVICE, role, fds, queues=queues, reopen=storage.connect, **more)
    finally:
        os.close(fds["backend"])


def test_a_disk_of_qemu_storage_daemon_is_read_and_written(storage: Storage, image: Path) -> None:
    with bridge(storage) as sidecar:
        assert sidecar.hello is not None
        assert (sidecar.hello.virtio_type, sidecar.hello.queue_sizes, sidecar.hello.whole_memory) == (2, (64,), True)
        assert int.from_bytes(sidecar.config[:8], "little") == SIZE // 512
        (queue,) = sidecar.start()
        disk = Driver(queue)
        assert disk.read(0, 65536) == image.read_bytes()[:65536]
        data = os.urandom(8192)
        assert disk.write(4096, data) == OK
        assert disk.flush() == OK
        assert image.read_bytes()[4096:12288] == data
        (stats,) = sidecar.stats().queues
        assert stats.requests == 3 and 0 < stats.interrupts <= 3
        assert sidecar.interrupt_status == 1
        assert sidecar.shutdown() == 0


def back(sidecar: Sidecar, times: int = 1) -> None:
    """Plays the supervisor until it has had another connection so many times."""
    sidecar.poll_until(lambda: sidecar.stats().detail == (m.Counter("reconnects", times),), "the backend")


def load(disk: Driver, random_: random.Random, count: int) -> list[tuple[Request, int, bytes]]:
    """Makes writes available, each to a place of its own, and kicks: requests, places and data."""
    made = []
    for block in random_.sample(range(SIZE // 4096), count):
        data = random_.randbytes(4096)
        made.append((disk.submit_write(block * 4096, data), block * 4096, data))
    disk.queue.kick()
    return made


def check(image: Path, made: list[tuple[Request, int, bytes]]) -> None:
    """All are done, and on the disk."""
    content = image.read_bytes()
    assert [r.status for r, _, _ in made] == [OK] * len(made)
    assert all(content[at : at + 4096] == data for _, at, data in made)


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("indirect", [False, True])
def test_many_at_once_on_two_queues(storage: Storage, image: Path, event_idx: bool, indirect: bool) -> None:
    rng = random.Random(1)
    with bridge(storage, queues=2) as sidecar:
        assert int.from_bytes(sidecar.config[34:36], "little") == 2  # num_queues
        queues = sidecar.start(event_idx=event_idx, indirect=indirect)
        for _ in range(10):
            made = [load(Driver(q), rng, 16) for q in queues]
            for q, of in zip(queues, made, strict=True):
                q.wait(len(of))
                assert [r.status for r, _, _ in of] == [OK] * 16
        assert [q.requests for q in sidecar.stats().queues] == [160, 160]


def test_fewer_queues_than_the_backend_has(storage: Storage) -> None:
    with bridge(storage) as sidecar:
        assert int.from_bytes(sidecar.config[34:36], "little") == 1


def test_a_reset_starts_from_fresh_rings_again_and_again(storage: Storage, image: Path) -> None:
    with bridge(storage) as sidecar:
        for n in range(1, 4):
            (queue,) = sidecar.start()
            data = bytes([n]) * 512
            assert Driver(queue).write(0, data) == OK
            assert image.read_bytes()[:512] == data
            load(Driver(queue), random.Random(n), 8)  # in flight: none of it is touched afterwards
            sidecar.reset()
            used = queue.used_idx
            sidecar.ask(m.Ping())
            assert queue.used_idx == used
            assert sidecar.stats().detail == (m.Counter("reconnects", 0),)


def come_to_rest(sidecar: Sidecar) -> None:
    """As the core has it do for a snapshot, again where the backend went away meanwhile: qemu-storage-daemon 7.2 may
    give up a ring that is being stopped."""
    end = time.monotonic() + 20
    while (outcome := sidecar.request(m.Quiesce())) != m.Ok():
        assert "is away, with requests in hand" in str(outcome)
        assert time.monotonic() < end, f"{outcome}\n{sidecar.log_tail()}"
        sidecar.ask(m.Ping())


def test_quiesce_under_load_leaves_nothing_in_flight_and_a_clone_goes_on(storage: Storage, image: Path) -> None:
    rng = random.Random(2)
    with bridge(storage) as sidecar:
        (queue,) = sidecar.start(event_idx=False)
        for _ in range(10):
            made = load(Driver(queue), rng, 20)
            come_to_rest(sidecar)
            (at,) = sidecar.save().queues
            rings = sidecar.memory.map.read(0, 64 << 10)
            assert (at.last_avail, at.used_idx) == (queue.used_idx, queue.used_idx)
            sidecar.ask(m.Ping())
            assert sidecar.memory.map.read(0, 64 << 10) == rings
            sidecar.resume()
            queue.wait(20)
            check(image, made)
        made = load(Driver(queue), rng, 20)
        come_to_rest(sidecar)
        state = sidecar.save()
        sidecar.kill()
        with bridge(storage, incoming=True, predecessor=sidecar) as clone:
            clone.restore(state, [queue])
            assert clone.save() == state
            clone.resume()
            queue.wait(20)
            check(image, made)
            assert Driver(queue).flush() == OK


def dirtied(sidecar: Sidecar, queue: Queue) -> tuple[set[int], set[int]]:
    """Pages of the memfd that a read of two pages has to dirty, and those that the log names."""
    request = Driver(queue).submit_read(0, 8192)
    sidecar.memory.take_dirty()
    queue.kick()
    queue.wait(1)
    offset = {r.gpa: r.offset for r in sidecar.memory.regions}
    base = sidecar.memory.regions[0].gpa
    written = [(request.into[0][0], 8192), (request.into[1][0], 1), (queue.device, 4)]
    pages = {(gpa - base + offset[base] + at) // 4096 for gpa, size in written for at in range(0, size, 4096)}
    return pages, sidecar.memory.take_dirty()


def test_what_the_backend_writes_is_in_the_dirty_log_at_once(storage: Storage) -> None:
    with bridge(storage) as sidecar:
        (queue,) = sidecar.start()
        for _ in range(3):
            pages, found = dirtied(sidecar, queue)
            assert pages <= found and len(found) < 20


def test_memory_that_is_not_where_its_file_says_is_in_the_log_when_the_device_rests(storage: Storage) -> None:
    """As above a hole: the log of vhost goes by guest physical address, ours by place in the memfd."""
    memory = Memory(regions=[Region(8 << 30, 8 << 20, 0)])
    try:
        with bridge(storage, memory=memory) as sidecar:
            (queue,) = sidecar.start()
            pages, found = dirtied(sidecar, queue)
            assert found == set()
            come_to_rest(sidecar)
            found = memory.take_dirty()
            assert pages <= found and len(found) < 20
            sidecar.resume()
            pages, _ = dirtied(sidecar, queue)
            come_to_rest(sidecar)
            assert pages <= memory.take_dirty()
    finally:
        memory.close()


@pytest.mark.parametrize("depth", [1, 20])
def test_a_backend_that_is_killed_and_started_again_costs_time_and_nothing_else(
    storage: Storage, image: Path, depth: int
) -> None:
    rng = random.Random(3)
    with bridge(storage) as sidecar:
        (queue,) = sidecar.start()
        for n in range(1, 6):
            made = load(Driver(queue), rng, depth)
            storage.kill()
            storage.start()
            back(sidecar, n)
            queue.wait(depth)
            check(image, made)
        assert not sidecar.needs_reset
        assert sidecar.stats().queues[0].requests >= 5 * depth


@pytest.mark.parametrize("depth", [1, 20])
def test_a_sidecar_that_is_killed_leaves_its_account_to_the_next(storage: Storage, image: Path, depth: int) -> None:
    with bridge(storage) as sidecar:
        (queue,) = sidecar.start()
        done = load(Driver(queue), random.Random(6), depth)
        queue.wait(depth)
        check(image, done)
        made = load(Driver(queue), random.Random(7), depth)
        sidecar.kill()
        with bridge(storage, incoming=True, predecessor=sidecar, takes_over=True) as successor:
            successor.take_over()
            queue.wait(depth)
            check(image, made)
            assert not successor.needs_reset


def test_while_its_backend_is_away_it_is_frozen_if_nothing_was_in_hand(storage: Storage, image: Path) -> None:
    with bridge(storage) as sidecar:
        (queue,) = sidecar.start()
        assert Driver(queue).flush() == OK
        storage.kill()
        sidecar.wait_log("closed the connection")
        come_to_rest(sidecar)
        state = sidecar.save()
        sidecar.kill()
        storage.start()
        with bridge(storage, incoming=True, predecessor=sidecar) as clone:
            clone.restore(state, [queue])
            clone.resume()
            made = load(Driver(queue), random.Random(4), 20)
            queue.wait(20)
            check(image, made)
            storage.kill()
            clone.wait_log("closed the connection")
            made = load(Driver(queue), random.Random(5), 20)  # nobody has these
            come_to_rest(clone)
            assert [q.last_avail for q in clone.save().queues] == [queue.used_idx]
            storage.start()
            clone.resume()
            back(clone)
            queue.wait(20)
            check(image, made)


def test_the_driver_sets_the_write_cache(storage: Storage) -> None:
    with bridge(storage) as sidecar:
        assert sidecar.offered & F_CONFIG_WCE
        (before,) = sidecar.config[CONFIG_WCE : CONFIG_WCE + 1]
        sidecar.start()
        for value in (1 - before, before):
            sidecar.ask(m.ConfigWrite(CONFIG_WCE, bytes([value])))
            sidecar.wait_until(lambda value=value: sidecar.config[CONFIG_WCE] == value, "the change")


def test_more_queues_than_the_backend_has(storage: Storage) -> None:
    with pytest.raises(SidecarGone, match="has 2 queues, not 3"):
        bridge(storage, queues=3)


def test_somebody_else_is_served_already(storage: Storage) -> None:
    with bridge(storage), pytest.raises(SidecarGone, match="does not give its answer to GET_FEATURES within 5 s"):
        bridge(storage)


def test_a_driver_that_breaks_its_ring_hurts_nobody_else(storage: Storage, image: Path) -> None:
    """qemu-storage-daemon gives such a front-end up; one that comes again gets the same, and an end to it."""
    with bridge(storage) as sidecar:
        (queue,) = sidecar.start()
        queue.set_avail_idx(5000)
        queue.kick(force=True)
        notice = sidecar.wait_needs_reset()
        assert storage.process is not None and storage.process.poll() is None, notice
        sidecar.reset()
        (queue,) = sidecar.start()
        sidecar.poll_until(lambda: sidecar.stats().detail[0].value > 0, "the backend")
        assert Driver(queue).read(0, 512) == image.read_bytes()[:512]
