"""A guest that breaks its rings: that queue stops with NEEDS_RESET, the rest goes on, and the process lives."""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.disk import GET_ID, IN, OK, OUT, Disk, Driver, header, pattern
from harness.driver import DESC, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Memory, Queue
from motorcade.proto import messages as m
from motorcade.proto.memory import Region

N, W, IND = DESC_F_NEXT, DESC_F_WRITE, DESC_F_INDIRECT
RAM = 16 << 20
TOP = (1 << 64) - 1


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(pattern(1 << 20))
    return path


@pytest.fixture
def disk(image: Path) -> Iterator[Disk]:
    with Disk(image, queues=2) as d:
        yield d


def table(q: Queue, *entries: tuple[int, int, int, int], length: int | None = None, skew: int = 0) -> tuple[int, int]:
    """An indirect table in guest memory."""
    raw = b"".join(DESC.pack(*e) for e in entries)
    gpa = q.memory.alloc(len(raw) + skew) + skew
    q.memory.map.write(gpa, raw)
    return gpa, len(raw) if length is None else length


def offer(q: Queue, *descriptors: tuple[int, int, int, int], head: int = 0) -> None:
    """Makes these descriptors available as they are."""
    for i, (addr, length, flags, nxt) in enumerate(descriptors):
        q.write_desc(i, addr, length, flags, nxt)
    q.put_avail(head)
    q.publish()


def outside(q: Queue, addr: int, length: int) -> None:
    offer(q, (addr, length, 0, 0))


def nested(q: Queue) -> None:
    inner = table(q, (0x2000, 16, 0, 0))
    outer = table(q, (*inner, IND, 0))
    offer(q, (*outer, IND, 0))


def indirect_and_next(q: Queue) -> None:
    offer(q, (*table(q, (0x2000, 16, 0, 0)), IND | N, 1), (0x3000, 1, W, 0))


def indirect_of(length: int) -> Callable[[Queue], None]:
    return lambda q: offer(q, (*table(q, (0x2000, 16, 0, 0), length=length), IND, 0))


def indirect_next_outside(q: Queue) -> None:
    offer(q, (*table(q, (0x2000, 16, N, 7), (0x3000, 1, W, 0)), IND, 0))


def indirect_loop(q: Queue) -> None:
    offer(q, (*table(q, (0x2000, 16, N, 1), (0x2000, 16, N, 0)), IND, 0))


def indirect_too_many(q: Queue) -> None:
    entries = [(0x2000, 16, N, i + 1) for i in range(2000)] + [(0x3000, 1, W, 0)]
    offer(q, (*table(q, *entries), IND, 0))


def avail_ahead(q: Queue) -> None:
    q.set_avail_idx(q._next_avail + q.size + 1)


def no_status(q: Queue) -> None:
    q.submit([header(IN)], [])


def no_header(q: Queue) -> None:
    q.submit([], [512, 1])


def short_header(q: Queue) -> None:
    q.submit([header(IN)[:15]], [512, 1])


HOSTILE: dict[str, tuple[Callable[[Queue], None], str]] = {
    "loop of one": (lambda q: offer(q, (0x2000, 16, N, 0)), "loop"),
    "loop of two": (lambda q: offer(q, (0x2000, 16, N, 1), (0x2000, 16, N, 0)), "loop"),
    "loop of writable": (lambda q: offer(q, (0x2000, 16, N | W, 1), (0x2000, 16, N | W, 0)), "loop"),
    "head past the table": (lambda q: offer(q, head=q.size), "index"),
    "head 65535": (lambda q: offer(q, head=0xFFFF), "index"),
    "next past the table": (lambda q: offer(q, (0x2000, 16, N, q.size)), "index"),
    "avail index ahead": (avail_ahead, "avail index"),
    "avail index far ahead": (lambda q: q.set_avail_idx(0x8000), "avail index"),
    "address past RAM": (lambda q: outside(q, RAM, 16), "outside RAM"),
    "address wraps": (lambda q: outside(q, TOP - 7, 16), "outside RAM"),
    "address at the very top": (lambda q: outside(q, TOP, 1), "outside RAM"),
    "buffer crosses the end": (lambda q: outside(q, RAM - 8, 16), "outside RAM"),
    "length 4 GiB": (lambda q: outside(q, 0x1000, 0xFFFFFFFF), "outside RAM"),
    "length 0": (lambda q: outside(q, 0x1000, 0), "outside RAM, or empty"),
    "readable after writable": (lambda q: offer(q, (0x2000, 16, N | W, 1), (0x2000, 16, 0, 0)), "readable"),
    "nested indirect": (nested, "indirect"),
    "indirect and next": (indirect_and_next, "indirect"),
    "indirect of 0 bytes": (indirect_of(0), "indirect"),
    "indirect of 17 bytes": (indirect_of(17), "indirect"),
    "indirect past RAM": (lambda q: offer(q, (RAM - 16, 32, IND, 0)), "indirect"),
    "indirect of 4 GiB": (indirect_of(0xFFFFFFF0), "indirect"),
    "indirect next outside": (indirect_next_outside, "index"),
    "indirect loop": (indirect_loop, "loop"),
    "indirect of 2001": (indirect_too_many, "loop"),
    "no status": (no_status, "lacks"),
    "no header": (no_header, "lacks"),
    "short header": (short_header, "lacks"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_broken_ring(disk: Disk, name: str) -> None:
    breakage, reason = HOSTILE[name]
    queues = [disk.queue(i, indirect=True) for i in (0, 1)]
    disk.activate(queues)
    victim, other = queues
    good = [victim.submit([header(IN, i)], [512, 1], indirect=False) for i in range(3)]
    victim.kick()
    victim.wait(3)
    assert all(r.status == OK for r in good)

    breakage(victim)
    victim.kick(force=True)
    notice = disk.wait_needs_reset()
    assert notice.queue == 0
    assert reason in notice.reason, notice.reason

    # The queue is left alone, kicks or not; the other one works; and one reset heals it all.
    used = victim.used_idx
    for _ in range(3):
        os.eventfd_write(victim.kick_fd, 1)
    assert Driver(other).read(512, 512) == pattern(1024)[512:]
    assert victim.used_idx == used
    assert len(disk.needs_reset) == 1, "said once"
    disk.reset()
    assert disk.driver(indirect=True).read(0, 4096) == pattern(4096)
    assert disk.shutdown() == 0


def test_indirect_that_was_not_negotiated(disk: Disk) -> None:
    q = disk.queue(0, indirect=False)
    disk.activate([q])
    q.submit([header(IN)], [512, 1], indirect=True)
    q.kick()
    assert "not negotiated" in disk.wait_needs_reset().reason


def test_unaligned_and_long_indirect_tables_are_legal(disk: Disk) -> None:
    """Linux allocates tables with kmalloc, and on a queue of 4 still sends as many segments as seg_max allows."""
    q = disk.queue(0, 4, indirect=True)
    disk.activate([q])
    memory = q.memory
    head, area, status = memory.alloc(16), memory.alloc(8192, 4096), memory.alloc(16)
    memory.map.write(head, header(IN))
    parts = [(head, 16, N, 1)]
    parts += [(area + 512 * i, 512, N | W, i + 2) for i in range(16)]
    parts += [(status, 1, W, 0)]
    for skew in (8, 4, 1):
        memory.map.write(status, b"\xff")
        q.restart()
        disk.reset()
        disk.activate([q])
        offer(q, (*table(q, *parts, skew=skew), IND, 0))
        q.kick(force=True)
        assert q.wait_interrupt(20)
        assert q.used_idx == 1
        assert memory.map.read(area, 8192) == pattern(8192)
        assert memory.map.read(status, 1) == b"\0"


def test_indirect_at_the_end_of_a_chain(disk: Disk) -> None:
    """2.7.5.3.2: direct descriptors may come before the one that refers to a table."""
    q = disk.queue(0, indirect=True)
    disk.activate([q])
    head, area = q.memory.alloc(16), q.memory.alloc(1024)
    q.memory.map.write(head, header(IN, 1))
    # The WRITE flag of the descriptor that refers to the table is to be ignored.
    offer(q, (head, 16, N, 1), (*table(q, (area, 512, W | N, 1), (area + 512, 1, W, 0)), IND | W, 0))
    q.kick(force=True)
    assert q.wait_interrupt(20)
    assert q.memory.map.read(area, 512) == pattern(1024)[512:]


@pytest.mark.parametrize(
    ("desc", "driver", "device"),
    [
        (0x1008, 0x2000, 0x3000),  # misaligned
        (0x1000, 0x2001, 0x3000),
        (0x1000, 0x2000, 0x3002),
        (RAM, 0x2000, 0x3000),  # outside
        (0x1000, RAM - 4, 0x3000),
        (0x1000, 0x2000, RAM - 16),
        (RAM - 4080, 0x2000, 0x3000),
        (TOP & ~15, 0x2000, 0x3000),
        (0x1000, TOP & ~1, 0x3000),
        (0x1000, 0x2000, TOP & ~3),
    ],
)
def test_rings_in_bad_places(disk: Disk, desc: int, driver: int, device: int) -> None:
    good = disk.queue(1)
    bad = m.Queue(index=0, size=256, desc=desc, driver=driver, device=device)
    disk.ask(m.Activate(disk.offered, (bad, good.config)))
    assert disk.wait_needs_reset().queue == 0
    os.eventfd_write(disk.kicks[0], 1)
    assert Driver(good).read(0, 512) == pattern(512)
    disk.reset()
    assert disk.driver().read(0, 512) == pattern(512)


def test_rings_may_end_where_ram_ends(image: Path) -> None:
    with Disk(image) as disk:
        q = disk.queue(0, 16)
        q.device = RAM - (6 + 8 * 16) - 2  # rounded to 4
        q._used = q.memory.map.view(q.device, 6 + 8 * 16)
        q._used16 = q._used.cast("H")
        assert q.device % 4 == 0
        disk.activate([q])
        assert Driver(q).read(0, 512) == pattern(512)


@pytest.mark.parametrize(
    "queues",
    [
        [(0, 512)],  # larger than offered
        [(0, 32768)],
        [(2, 16)],  # no such queue
        [(65535, 16)],
        [(0, 16), (0, 16)],
    ],
)
def test_absurd_activations_are_refused(disk: Disk, queues: list[tuple[int, int]]) -> None:
    body = m.Activate(0, tuple(m.Queue(i, size, 0x1000, 0x2000, 0x3000) for i, size in queues))
    answer = disk.request(body)
    assert isinstance(answer, m.Error)
    assert answer.code is m.ErrorCode.INVALID
    assert disk.driver().read(0, 512) == pattern(512)


def test_features_that_were_not_offered(disk: Disk) -> None:
    answer = disk.request(m.Activate(1 << 20, (disk.queue(0).config,)))
    assert isinstance(answer, m.Error)
    assert "0x100000" in answer.text


def test_second_activation_is_refused(disk: Disk) -> None:
    d = disk.driver(count=1)
    answer = disk.request(m.Activate(0, (disk.queue(1).config,)))
    assert isinstance(answer, m.Error)
    assert answer.code is m.ErrorCode.STATE
    assert d.read(0, 512) == pattern(512)


def test_buffers_across_a_hole_in_ram(image: Path) -> None:
    """Two regions that follow each other in the memfd and not in guest physical space."""
    half = 8 << 20
    memory = Memory(regions=[Region(0, half, 0), Region(4 << 30, half, half)])
    with Disk(image, memory=memory) as disk:
        d = disk.driver(indirect=False)
        q = d.queue
        head, status, high = memory.alloc(16), memory.alloc(16), (4 << 30) + 4096
        memory.map.write(head, header(IN))
        request = q.submit_at([(head, 16)], [(high, 4096), (status, 1)])
        q.kick()
        q.wait(1)
        assert request.status == OK
        assert memory.map.read(high, 4096) == pattern(4096)
        q.submit_at([(head, 16)], [(half - 512, 1024), (status, 1)])
        q.kick()
        assert "outside RAM" in disk.wait_needs_reset().reason
    memory.close()


def test_the_same_head_over_and_over(disk: Disk) -> None:
    """More in flight than the queue is long: only this driver's loss."""
    q, other = disk.start(size=16)
    memory = q.memory
    head, area, status = memory.alloc(16), memory.alloc(4096, 4096), memory.alloc(16)
    memory.map.write(head, header(IN))
    q.write_desc(0, head, 16, N, 1)
    q.write_desc(1, area, 4096, N | W, 2)
    q.write_desc(2, status, 1, W, 0)
    total = 0
    for _ in range(50):
        for _ in range(16):
            q.put_avail(0)
        total += 16
        q.publish()
        q.kick(force=True)
    # Each kick found either the ring as it should be or more than it can hold; both are answered.
    while not disk.needs_reset and q.used_idx != total & 0xFFFF:
        q.set_used_event(q.used_idx)
        select.select([q.call_fd, disk.server.fileno()], [], [], 0.2)
        disk.process()
    assert Driver(other).read(0, 512) == pattern(512)


def test_guest_changes_its_request_meanwhile(disk: Disk) -> None:
    """The header is copied once. Whatever is raced into it, only the disk's own sectors are ever touched."""
    d = disk.driver(count=1)
    q, memory = d.queue, disk.memory
    head, area, status = memory.alloc(16), memory.alloc(4096, 4096), memory.alloc(16)
    for i in range(300):
        memory.map.write(head, header(IN, 0))
        request = q.submit_at([(head, 16)], [(area, 4096), (status, 1)])
        q.kick()
        for k in range(20):
            memory.map.write(head, header(OUT if k % 2 else GET_ID, (1 << 63) + i))
        q.wait(1)
        assert request.status in (0, 1, 2)
    assert disk.alive


@pytest.mark.parametrize("kicks", [1, 1000])
def test_kicks_of_an_idle_device(disk: Disk, kicks: int) -> None:
    """Before activation, and after a reset, a notification reaches nobody and costs nothing."""
    for _ in range(kicks):
        os.eventfd_write(disk.kicks[0], 1)
    disk.ask(m.Ping())
    d = disk.driver()
    assert d.read(0, 512) == pattern(512)
    disk.reset()
    for _ in range(kicks):
        os.eventfd_write(disk.kicks[0], 1)
    disk.ask(m.Ping())
    assert disk.driver().read(0, 512) == pattern(512)
