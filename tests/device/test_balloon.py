"""The balloon sidecar: a real process, the driver simulator, and the holes that it leaves in the memfd."""

from __future__ import annotations

import errno
import json
import os
import select
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from harness.driver import Memory, Queue
from harness.sidecar import Sidecar, SidecarGone
from motorcade.proto import messages as m
from motorcade.proto.memory import Region

PAGE = 4096
SIZE = 32 << 20
HUGE = 2 << 20
F_STATS_VQ, F_DEFLATE_ON_OOM, F_PAGE_POISON, F_REPORTING = 1 << 1, 1 << 2, 1 << 4, 1 << 5
RINGS = 1 << 28 | 1 << 29
FIRST = (16 << 20) // PAGE  # a page far from what the driver itself uses
HIGH = 4 << 30


def balloon(
    memory: Memory, *, predecessor: Sidecar | None = None, incoming: bool = False, **options: object
) -> Sidecar:
    role = m.KitBoot("balloon", "balloon", json.dumps(options))
    return Sidecar("balloon", role, {}, queues=5, memory=memory, incoming=incoming, predecessor=predecessor)


@pytest.fixture
def memory() -> Iterator[Memory]:
    """Guest RAM, of which every page has something in it."""
    made = Memory(SIZE)
    for page in range(FIRST, SIZE // PAGE):
        made.map.write(page * PAGE, page.to_bytes(8, "little"))
    yield made
    made.close()


def holes(memory: Memory, pages: Sequence[int]) -> set[int]:
    """Those pages of the memfd that take no memory of the host's."""
    found = set()
    for page in pages:
        try:
            if os.lseek(memory.fd, page * PAGE, os.SEEK_DATA) != page * PAGE:
                found.add(page)
        except OSError as e:
            assert e.errno == errno.ENXIO
            found.add(page)
    return found


def pfns(*pages: int) -> bytes:
    return struct.pack(f"<{len(pages)}I", *pages)


def counted(sidecar: Sidecar) -> dict[str, int]:
    return {c.name: c.value for c in sidecar.stats().detail}


def command(sidecar: Sidecar, name: str, **arguments: object) -> object:
    outcome = sidecar.request(m.Command(name, json.dumps(arguments)))
    if isinstance(outcome, m.Error):
        return outcome
    assert isinstance(outcome, m.CommandResult), outcome
    return json.loads(outcome.value)


def data_pages() -> list[int]:
    return list(range(FIRST, SIZE // PAGE))


def test_what_is_inflated_is_a_hole_and_comes_back_as_zeros(memory: Memory) -> None:
    with balloon(memory) as sidecar:
        assert sidecar.hello is not None and sidecar.hello.virtio_type == 5
        assert sidecar.offered & ~RINGS == F_STATS_VQ
        assert len(sidecar.hello.config) == 16
        inflate, deflate, *_ = sidecar.start()
        before = os.fstat(memory.fd).st_blocks
        memory.take_dirty()
        given = [FIRST + n for n in (*range(255, -1, -1), 300, 302, 301)]  # as an allocator hands them out: downwards
        assert inflate.run(out=[pfns(*given)]).written == 0
        assert holes(memory, data_pages()) == set(given)
        # But for the page that the request itself took.
        assert before - os.fstat(memory.fd).st_blocks >= (len(given) - 1) * PAGE // 512
        # A live snapshot has to know that they are not what they were.
        assert set(given) <= memory.take_dirty()
        assert memory.map.read(FIRST * PAGE, PAGE) == bytes(PAGE)
        assert memory.map.read((FIRST + 299) * PAGE, 8) == (FIRST + 299).to_bytes(8, "little")
        memory.map.write(given[1] * PAGE, b"mine")
        assert deflate.run(out=[pfns(*given)]).written == 0
        assert memory.map.read(given[1] * PAGE, 4) == b"mine"
        counters = counted(sidecar)
        assert counters["inflated"] == counters["deflated"] == len(given)
        assert counters["discarded"] == len(given) * PAGE and not counters["outside"] + counters["failed"]
        assert sidecar.shutdown() == 0


def test_pages_that_are_no_ram_or_named_twice_touch_nothing_else(memory: Memory) -> None:
    with balloon(memory) as sidecar:
        inflate, deflate, *_ = sidecar.start()
        last = SIZE // PAGE
        hostile = (FIRST, FIRST, last, last + 1, HIGH // PAGE, 0xFFFF_FFFF, 0xFFFF_FFFE, FIRST, 0xD_0000, last - 1)
        assert inflate.run(out=[pfns(*hostile)]).written == 0
        assert holes(memory, data_pages()) == {FIRST, last - 1}
        assert counted(sidecar)["outside"] == 6
        assert deflate.run(out=[pfns(*hostile)]).written == 0
        assert not sidecar.needs_reset
        # Its own rings, too: that is the guest's own business, and no crash.
        ring = inflate.desc // PAGE
        inflate.submit(out=[pfns(ring)])
        inflate.kick()
        sidecar.poll_until(lambda: counted(sidecar)["inflated"] == len(hostile) + 1, "the page with the ring in it")
        assert sidecar.alive


def test_memory_above_the_hole_is_elsewhere_in_the_memfd() -> None:
    low = 16 << 20
    memory = Memory(regions=[Region(0, low, 0), Region(HIGH, low, low)])
    try:
        for page in range(2 * low // PAGE):
            os.pwrite(memory.fd, b"\1", page * PAGE)
        with balloon(memory) as sidecar:
            inflate, *_ = sidecar.start()
            memory.take_dirty()
            above = HIGH // PAGE
            # The end of the one and the beginning of what is not there; all but the first of the other.
            inflate.run(out=[pfns(low // PAGE - 1, low // PAGE, above - 1, *(above + n for n in range(1, 100)))])
            expected = {low // PAGE - 1, *(low // PAGE + n for n in range(1, 100))}
            assert holes(memory, range(2 * low // PAGE)) == expected
            assert expected <= memory.take_dirty()
            assert counted(sidecar)["outside"] == 2
    finally:
        memory.close()


@pytest.mark.parametrize(
    ("queue", "out", "into"),
    [
        (0, [b"abc"], []),  # not a whole number
        (0, [], [64]),  # nothing to read
        (0, [pfns(FIRST)], [64]),  # something to write
        (0, [bytes(4 * 65536 + 4)], []),  # more than anybody sends at a time
        (1, [b"abcde"], []),
        (2, [], [10]),
        (2, [bytes(10)], [10]),
        (3, [bytes(16)], []),  # a queue that was not negotiated
    ],
)
def test_what_no_driver_may_send_breaks_its_queue_and_nothing_else(
    memory: Memory, queue: int, out: list[bytes], into: list[int]
) -> None:
    with balloon(memory) as sidecar:
        queues = sidecar.start()
        queues[queue].submit(out=out, into=into)
        queues[queue].kick()
        assert sidecar.wait_needs_reset().queue == queue
        assert holes(memory, data_pages()) == set()
        other = queues[1 if queue == 0 else 0]
        assert other.run(out=[pfns(FIRST)]).written == 0


def test_reported_pages_go_and_can_be_used_at_once(memory: Memory) -> None:
    with balloon(memory, free_page_reporting=True, deflate_on_oom=True) as sidecar:
        assert sidecar.offered & ~RINGS == F_STATS_VQ | F_DEFLATE_ON_OOM | F_PAGE_POISON | F_REPORTING
        features = sidecar.offered & ~(1 << 28)
        queues = [sidecar.queue(i) for i in (0, 1, 2, 3)]  # Linux leaves no gap for free page hinting
        sidecar.activate(queues, features)
        memory.take_dirty()
        report(queues[3], (FIRST * PAGE, 64 * PAGE), ((FIRST + 100) * PAGE + 512, 2 * PAGE))
        # Of what is no whole page, the whole pages.
        expected = {*range(FIRST, FIRST + 64), FIRST + 101}
        assert holes(memory, data_pages()) == expected
        assert expected <= memory.take_dirty()
        assert counted(sidecar)["discarded"] == 65 * PAGE
        # Free pages that are not zero have to stay as they are (5.5.6.7).
        sidecar.ask(m.ConfigWrite(12, (0xAAAAAAAA).to_bytes(4, "little")))
        report(queues[3], ((FIRST + 200) * PAGE, 8 * PAGE))
        assert holes(memory, data_pages()) == expected
        assert counted(sidecar)["kept"] == 8 * PAGE
        assert sidecar.config_changes == []  # what the driver writes is no news


@pytest.mark.parametrize("index", [2, 4])
def test_the_queue_of_reports_is_where_the_driver_looks_for_it(memory: Memory, index: int) -> None:
    """By the specification's number, and where a driver that wants no statistics has it."""
    with balloon(memory, free_page_reporting=True) as sidecar:
        features = sidecar.offered & ~(1 << 28) & ~(F_STATS_VQ if index == 2 else 0)
        queue = sidecar.queue(index)
        sidecar.activate([sidecar.queue(0), sidecar.queue(1), queue], features)
        report(queue, (FIRST * PAGE, PAGE))
        assert holes(memory, data_pages()) == {FIRST}


def report(queue: Queue, *ranges: tuple[int, int]) -> None:
    """Says that these are free, and waits until they are the driver's again."""
    request = queue.submit_at([], ranges)
    request.into.clear()  # or the simulator would read them, and so get them back
    queue.kick()
    queue.wait(1)
    assert request.done and request.written == 0


@pytest.fixture
def huge_memory() -> Iterator[Memory]:
    """Guest RAM of huge pages, all there."""
    allowed = Path("/proc/sys/vm/nr_overcommit_hugepages")
    before = allowed.read_text()
    memory = None
    try:
        allowed.write_text(str(int(before) + SIZE // HUGE))
        memory = Memory(SIZE, huge_pages=True)
        os.posix_fallocate(memory.fd, 0, SIZE)
    except OSError as e:
        if memory is not None:
            memory.close()
        pytest.skip(f"no huge pages are to be had here: {e}")
    finally:
        allowed.write_text(before)
    yield memory
    memory.close()


def test_a_huge_page_goes_when_all_of_it_is_in_the_balloon(huge_memory: Memory) -> None:
    memory = huge_memory
    small = HUGE // PAGE
    with balloon(memory) as sidecar:
        inflate, deflate, *_ = sidecar.start()
        whole = os.fstat(memory.fd).st_blocks
        for start in range(0, small - 1, 73):
            inflate.run(out=[pfns(*range(FIRST + start, min(FIRST + start + 73, FIRST + small - 1)))])
        assert (os.fstat(memory.fd).st_blocks, counted(sidecar)["discarded"]) == (whole, 0)
        # The guest takes one back, and gives it and the last one.
        deflate.run(out=[pfns(FIRST + 5)])
        inflate.run(out=[pfns(FIRST + small - 1, FIRST + small)])
        assert os.fstat(memory.fd).st_blocks == whole
        memory.take_dirty()
        inflate.run(out=[pfns(FIRST + 5)])
        assert (whole - os.fstat(memory.fd).st_blocks) * 512 == HUGE == counted(sidecar)["discarded"]
        assert set(range(FIRST, FIRST + small)) <= memory.take_dirty()
        sidecar.reset()  # forgets what was in it
        inflate.restart()
        sidecar.activate([inflate])
        inflate.run(out=[pfns(*range(FIRST + small + 1, FIRST + 2 * small))])
        assert counted(sidecar)["discarded"] == HUGE


def test_no_hole_comes_before_the_pager_has_read_of_it(memory: Memory) -> None:
    """This test is the pager. One that fills the page meanwhile has ended that when it comes to read (balloon.h)."""
    bits = os.memfd_create("discarded", os.MFD_CLOEXEC)
    os.ftruncate(bits, SIZE // PAGE // 8)
    role = m.KitBoot("balloon", "balloon")
    try:
        with Sidecar("balloon", role, {"discarded": bits}, queues=5, memory=memory, lazy=True) as sidecar:
            sidecar.wait_until(lambda: sidecar.userfaultfd >= 0, "its userfaultfd")
            inflate, *_ = sidecar.start()
            request = inflate.submit(out=[pfns(FIRST + 1, FIRST)])
            inflate.kick()
            assert select.select([sidecar.userfaultfd], [], [], 20)[0]
            sidecar.stats()  # its main thread waits for nobody
            assert inflate.reap() == [] and holes(memory, data_pages()) == set()
            marked = int.from_bytes(os.pread(bits, SIZE // PAGE // 8, 0), "little")
            assert marked == 3 << FIRST
            assert os.read(sidecar.userfaultfd, 32)[0] == 0x15  # struct uffd_msg: UFFD_EVENT_REMOVE
            inflate.wait(1)
            assert request.done and holes(memory, data_pages()) == {FIRST, FIRST + 1}
    finally:
        os.close(bits)


def test_a_bitmap_that_is_too_short_ends_it_at_once(memory: Memory) -> None:
    bits = os.memfd_create("discarded", os.MFD_CLOEXEC)
    os.ftruncate(bits, SIZE // PAGE // 8 - 8)
    try:
        with pytest.raises(SidecarGone, match="too short"):
            Sidecar("balloon", m.KitBoot("balloon", "balloon"), {"discarded": bits}, queues=5, memory=memory)
    finally:
        os.close(bits)


def entry(tag: int, value: int) -> bytes:
    return struct.pack("<HQ", tag, value)


def test_statistics_are_asked_for_and_the_buffer_waits_meanwhile(memory: Memory) -> None:
    with balloon(memory) as sidecar:
        assert command(sidecar, "statistics", fresh=True) == {"stats": {}, "last-update": 0}  # no driver: at once
        queues = sidecar.start()
        first = queues[2].submit(out=[entry(4, 111)])
        queues[2].kick()
        outcomes: list[object] = []
        sidecar.server.request("balloon", m.Command("statistics", '{"fresh": true}'), 20000, outcomes.append)
        sidecar.wait_until(lambda: queues[2].reap() != [], "the buffer") if not first.done else None
        assert first.done and not outcomes
        # The driver answers; a tag of a later specification is left out.
        queues[2].submit(out=[entry(4, 4096), entry(5, 8192), entry(2, 7), entry(15, 9), entry(99, 1), b"half"])
        queues[2].kick()
        sidecar.wait_until(lambda: bool(outcomes), "the statistics")
        assert isinstance(outcomes[0], m.CommandResult)
        said = json.loads(outcomes[0].value)
        assert said["stats"] == {"stat-major-faults": 7, "stat-free-memory": 4096, "stat-total-memory": 8192}
        assert said["last-update"] > 0
        assert command(sidecar, "statistics") == said
        sidecar.reset()
        assert command(sidecar, "statistics", fresh=True) == {"stats": {}, "last-update": 0}


def test_statistics_come_at_their_interval(memory: Memory) -> None:
    with balloon(memory, stats_interval=1) as sidecar:
        queues = sidecar.start()
        for _ in range(2):
            queues[2].submit(out=[entry(6, 5)])
            queues[2].kick()
            sidecar.poll_until(lambda: queues[2].reap() != [], "the buffer")
        queues[2].submit(out=[entry(6, 77)])
        queues[2].kick()
        sidecar.poll_until(
            lambda: command(sidecar, "statistics")["stats"] == {"stat-available-memory": 77},  # type: ignore[index]
            "what the driver said last",
        )


def test_the_target_is_configuration_space_and_what_the_driver_says_is_no_news(memory: Memory) -> None:
    with balloon(memory) as sidecar:
        sidecar.start()
        assert command(sidecar, "target", pages=1000) == {}
        sidecar.wait_until(lambda: bool(sidecar.config_changes), "the new size")
        assert sidecar.config_changes == [(1000).to_bytes(4, "little") + bytes(12)]
        sidecar.ask(m.ConfigWrite(4, (17).to_bytes(4, "little")))
        sidecar.ask(m.ConfigWrite(0, (5).to_bytes(4, "little")))  # not the driver's to say
        assert command(sidecar, "target", pages=1000) == {}
        assert command(sidecar, "target", pages=0) == {}
        sidecar.wait_until(lambda: len(sidecar.config_changes) == 2, "the last size")
        assert sidecar.config_changes[1] == bytes(4) + (17).to_bytes(4, "little") + bytes(8)
        for pages in (-1, 1 << 32, 1.5, True, None, "many", [1]):
            assert isinstance(command(sidecar, "target", pages=pages), m.Error)
        for text in ("[]", "{", "[" * 5000, '"target"'):
            assert isinstance(sidecar.request(m.Command("target", text)), m.Error)
        assert "no command" in str(command(sidecar, "explode"))
        assert sidecar.alive


def test_a_snapshot_has_the_ring_and_the_core_the_rest(memory: Memory) -> None:
    with balloon(memory) as sidecar:
        queues = sidecar.start()
        queues[0].run(out=[pfns(FIRST)])
        queues[2].submit(out=[entry(4, 111)])
        queues[2].kick()
        sidecar.poll_until(
            lambda: command(sidecar, "statistics")["stats"] == {"stat-free-memory": 111},  # type: ignore[index]
            "the first statistics",
        )
        sidecar.quiesce()
        state = sidecar.save()
        assert state.data == b"" and [(q.index, q.last_avail) for q in state.queues] == [
            (0, 1), (1, 0), (2, 0), (3, 0), (4, 0)
        ]  # fmt: skip
        assert command(sidecar, "target", pages=9) == {}
        before = memory.pages()
        queues[0].submit(out=[pfns(FIRST + 1)])
        queues[0].kick()
        sidecar.ask(m.Ping())
        assert holes(memory, data_pages()) == {FIRST}
        sidecar.kill()
        with balloon(memory, incoming=True, predecessor=sidecar) as clone:
            clone.restore(state, queues)
            assert clone.save() == state
            after = memory.pages()
            rings = {getattr(q, part) // PAGE for q in queues for part in ("desc", "driver", "device")}
            assert {i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b} <= rings | set(range(64))
            clone.resume()
            queues[0].wait(1)
            assert holes(memory, data_pages()) == {FIRST, FIRST + 1}
            clone.poll_until(
                lambda: command(clone, "statistics")["stats"] == {"stat-free-memory": 111},  # type: ignore[index]
                "the statistics that wait in the ring",
            )


def test_what_the_core_has_kept_is_adopted(memory: Memory) -> None:
    with balloon(memory, free_page_reporting=True) as sidecar:
        queues = [sidecar.queue(i) for i in range(4)]
        kept = struct.pack("<4I", 500, 400, 0, 0xAA)
        sidecar.ask(m.Activate(sidecar.offered & ~(1 << 28), tuple(q.config for q in queues), config=kept))
        report(queues[3], (FIRST * PAGE, PAGE))
        assert holes(memory, data_pages()) == set()  # it has its poison
        assert command(sidecar, "target", pages=501) == {}
        sidecar.wait_until(lambda: bool(sidecar.config_changes), "the new size")
        assert sidecar.config_changes == [struct.pack("<4I", 501, 400, 0, 0xAA)]
        sidecar.reset()
        assert len(sidecar.config_changes) == 1
        refused = sidecar.request(m.Activate(0, (queues[0].config,), config=b"short"))
        assert isinstance(refused, m.Error) and "5 bytes" in refused.text


@pytest.mark.parametrize("options", [{"deflate_on_oom": 1}, {"stats_interval": -1}, {"colour": "red"}])
def test_options_that_are_none_end_it_at_once(memory: Memory, options: dict[str, object]) -> None:
    with pytest.raises(SidecarGone, match="ValidationError"):
        balloon(memory, **options)


