"""A disk that comes to rest, is saved, and goes on in another process; and what its dirty log says."""

from __future__ import annotations

import os
import random
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.disk import (
    CONFIG_WCE,
    ENGINES,
    FLUSH,
    GET_ID,
    IN,
    IOERR,
    OK,
    Disk,
    Driver,
    exercise,
    extent,
    header,
    pattern,
    small_tmpfs,
)
from harness.driver import Memory, Queue, Request
from motorcade.proto import messages as m
from motorcade.proto.memory import Region

MIB = 1 << 20
DEPTH = 32


@pytest.fixture
def memory() -> Iterator[Memory]:
    """Two regions that are not in the memfd where the guest has them."""
    made = Memory(regions=[Region(0, 8 * MIB, 4 * MIB), Region(4 << 30, 4 * MIB, 0)])
    yield made
    made.close()


def places(model: bytearray, rng: random.Random, n: int = DEPTH) -> list[int]:
    """``n`` different blocks: writes to one have no order."""
    return rng.sample(range(len(model) // 4096), n)


def write_batch(d: Driver, model: bytearray, rng: random.Random, blocks: list[int]) -> list[Request]:
    """Writes to these blocks, published without a kick."""
    batch = []
    for at in blocks:
        data = rng.randbytes(4096)
        batch.append(d.submit_write(at * 4096, data))
        model[at * 4096 : (at + 1) * 4096] = data
    return batch


def is_still(disk: Disk, queue: Queue) -> bool:
    """Nothing happens to guest memory, nor an interrupt, while the sidecar answers some pings."""
    before, isr = disk.memory.pages(), disk.interrupt_status
    queue.wait_interrupt(0)
    for _ in range(5):
        disk.ask(m.Ping())
    return disk.memory.pages() == before and disk.interrupt_status == isr and not queue.wait_interrupt(0)


@pytest.mark.parametrize("over", [False, True], ids=["raw", "overlay"])
@pytest.mark.parametrize("engine", ENGINES)
def test_quiesce_under_load(tmp_path: Path, engine: str, over: bool) -> None:
    """What was taken is finished. What was not taken stays, and is served after resume, its kick long past."""
    image = tmp_path / "image"
    image.write_bytes(pattern(4 * MIB))
    model = bytearray(image.read_bytes())
    rng = random.Random(engine)
    with Disk(image, overlay_path=tmp_path / "o" if over else None, engine=engine) as disk:
        d = disk.driver()
        for _ in range(8):
            blocks = places(model, rng, 2 * DEPTH)
            batch = write_batch(d, model, rng, blocks[:DEPTH])
            d.queue.kick()
            disk.quiesce()
            assert is_still(disk, d.queue)
            state = disk.save().queues[0]
            assert state.used_idx == state.last_avail == d.queue.used_idx, "nothing is in flight"
            batch += write_batch(d, model, rng, blocks[DEPTH:])
            d.queue.kick(force=True)
            assert is_still(disk, d.queue)
            disk.resume()
            d.run_all(batch)
            assert d.read(0, 2 * MIB) + d.read(2 * MIB, 2 * MIB) == model
        assert disk.counter("writes") == 16 * DEPTH
        assert disk.shutdown() == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_every_write_is_there_when_it_was_quiesced_in_between(tmp_path: Path, engine: str) -> None:
    image = tmp_path / "image"
    image.write_bytes(pattern(4 * MIB))
    model = bytearray(image.read_bytes())
    rng = random.Random(engine)
    with Disk(image, overlay_path=tmp_path / "o", engine=engine) as disk:
        d = disk.driver()
        for _ in range(10):
            batch = write_batch(d, model, rng, places(model, rng, 80))
            d.queue.kick()
            disk.quiesce()
            disk.resume()
            d.run_all(batch)
        assert d.read(0, 2 * MIB) + d.read(2 * MIB, 2 * MIB) == model
        assert disk.shutdown() == 0


@pytest.mark.parametrize("over", [False, True], ids=["raw", "overlay"])
@pytest.mark.parametrize("engine", ENGINES)
def test_goes_on_in_another_process(tmp_path: Path, engine: str, over: bool) -> None:
    """Lives with requests in the ring at each end: none is lost, and none done twice."""
    image = tmp_path / "image"
    image.write_bytes(pattern(4 * MIB))
    model = bytearray(image.read_bytes())
    rng = random.Random(engine)
    overlay_path = tmp_path / "o" if over else None
    first = disk = Disk(image, overlay_path=overlay_path, engine=engine, queues=2)
    lives = [disk]
    try:
        queues = disk.start()
        written = 0
        for _ in range(6):
            d = Driver(queues[rng.randrange(2)])
            batch = write_batch(d, model, rng, places(model, rng))
            d.queue.kick()
            disk.quiesce()
            state = disk.save()
            assert disk.save() == state
            written += disk.counter("writes")
            disk.kill()
            disk = Disk(image, overlay_path=overlay_path, engine=engine, queues=2, incoming=True, predecessor=first)
            lives.append(disk)
            disk.restore(state, queues)
            assert disk.save() == state, "a snapshot of a restored disk is the same snapshot"
            assert is_still(disk, d.queue)
            disk.resume()
            d.run_all(batch)
            assert d.read(0, 2 * MIB) + d.read(2 * MIB, 2 * MIB) == model
        assert written + disk.counter("writes") == 6 * DEPTH
        assert disk.shutdown() == 0
    finally:
        for life in reversed(lives):
            life.close()


def test_the_cache_mode_goes_with_it(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(pattern(MIB))
    with Disk(image) as disk:
        queues = disk.start()
        disk.quiesce()
        back = disk.save()
        disk.resume()
        disk.ask(m.ConfigWrite(CONFIG_WCE, b"\0"))
        disk.quiesce()
        through = disk.save()
        disk.kill()
        assert back != through
        with Disk(image, incoming=True, predecessor=disk) as restored:
            restored.restore(through, queues)
            assert restored.save() == through
            assert restored.config_changes == [], "the driver has chosen it: no news"
            restored.resume()
            syncs = restored.counter("syncs")
            assert Driver(queues[0]).write(0, bytes(512)) == OK
            assert restored.counter("syncs") == syncs + 1


def test_a_broken_queue_stays_broken_and_is_not_said_again(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(pattern(MIB))
    with Disk(image, queues=2) as disk:
        queues = disk.start()
        queues[1].put_avail(9999)
        queues[1].publish()
        queues[1].kick(force=True)
        disk.wait_needs_reset()
        disk.quiesce()
        state = disk.save()
        assert [bool(q.error) for q in state.queues] == [False, True]
        disk.kill()
        with Disk(image, queues=2, incoming=True, predecessor=disk) as restored:
            restored.restore(state, queues)
            restored.resume()
            assert Driver(queues[0]).read(0, 512) == pattern(512)
            queues[1].kick(force=True)
            assert is_still(restored, queues[1])
            assert restored.needs_reset == []
            restored.reset()
            for q in queues:
                q.restart()
            restored.activate(queues)
            assert Driver(queues[1]).read(0, 512) == pattern(512)


def test_a_disk_that_no_driver_had_is_loaded_without_an_activation(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(pattern(MIB))
    with Disk(image) as disk:
        disk.quiesce()
        state = disk.save()
        assert state.queues == ()
    with Disk(image, incoming=True) as disk:
        disk.restore(state, [])
        disk.resume()
        assert disk.driver().read(0, 512) == pattern(512)


def test_a_copy_of_a_quiesced_overlay_is_the_disk(tmp_path: Path) -> None:
    """With nothing flushed by the driver, and after a reset too."""
    base, path, copy = tmp_path / "base", tmp_path / "o", tmp_path / "copy"
    base.write_bytes(pattern(2 * MIB))
    model = bytearray(base.read_bytes())
    rng = random.Random(5)
    with Disk(base, overlay_path=path) as disk:
        d = disk.driver()
        for reset in (False, True):
            exercise(d, model, rng, 20)
            if reset:
                disk.reset()
            disk.quiesce()
            shutil.copyfile(path, copy)
            disk.resume()
            if not reset:
                d.write(0, b"later" * 512 * 8)
            with Disk(base, overlay_path=copy) as other:
                assert other.driver().read(0, 2 * MIB) == model
                assert other.shutdown() == 0
            if not reset:
                model[: 5 * 512 * 8] = b"later" * 512 * 8


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a file system")
def test_no_space_to_quiesce(tmp_path: Path) -> None:
    """The map cannot be made permanent: an error, the disk goes on, and can be quiesced when there is space."""
    base = tmp_path / "base"
    with base.open("wb") as f:
        f.truncate(64 << 30)
    with small_tmpfs(256 << 10) as mount:
        path, ballast = mount / "o", mount / "ballast"
        with Disk(base, overlay_path=path) as disk:
            d = disk.driver()
            assert d.write(0, b"a" * 4096) == OK
            with ballast.open("wb", buffering=0) as f, pytest.raises(OSError, match="No space"):
                while True:
                    f.write(bytes(4096))
            answer = disk.request(m.Quiesce())
            assert isinstance(answer, m.Error)
            assert "ENOSPC" in answer.text
            assert d.read(0, 4096) == b"a" * 4096
            assert isinstance(disk.request(m.Save()), m.Error)
            assert d.flush() == IOERR
            ballast.unlink()
            disk.quiesce()
            disk.kill()
        with Disk(base, overlay_path=path) as disk:
            assert disk.driver().read(0, 4096) == b"a" * 4096


STATE = struct.Struct("<B3xIQ")
GOOD = STATE.pack(1, 512, MIB // 512)


@pytest.mark.parametrize(
    ("state", "why"),
    [
        (m.DeviceState(0, GOOD), "version 0"),
        (m.DeviceState(2, GOOD), "version 2"),
        (m.DeviceState(65535, b""), "version 65535"),
        (m.DeviceState(1, b""), "0 bytes"),
        (m.DeviceState(1, GOOD[:-1]), "15 bytes"),
        (m.DeviceState(1, GOOD + b"\0"), "17 bytes"),
        (m.DeviceState(1, bytes(m.MAX_STATE)), "524288 bytes"),
        (m.DeviceState(1, b"\2" + GOOD[1:]), "cache mode"),
        (m.DeviceState(1, b"\0\1" + GOOD[2:]), "cache mode"),
        (m.DeviceState(1, STATE.pack(1, 0, MIB // 512)), "at a time"),
        (m.DeviceState(1, STATE.pack(1, 256, MIB // 512)), "at a time"),
        (m.DeviceState(1, STATE.pack(1, 512, MIB // 512 + 1)), "2048 sectors, the saved disk had 2049"),
        (m.DeviceState(1, STATE.pack(1, 512, 0)), "sectors"),
        (m.DeviceState(1, GOOD, (m.QueueState(1, 0, 0),)), "queues"),
        (m.DeviceState(1, GOOD, (m.QueueState(65535, 0, 0),)), "queues"),
    ],
)
def test_states_that_cannot_be_are_refused(tmp_path: Path, state: m.DeviceState, why: str) -> None:
    image = tmp_path / "image"
    image.write_bytes(pattern(MIB))
    with Disk(image, incoming=True) as disk:
        answer = disk.request(m.Load(state))
        assert isinstance(answer, m.Error)
        assert answer.code is m.ErrorCode.INVALID
        assert why in answer.text
        assert disk.save() == m.DeviceState(1, GOOD), "as if nothing had been asked"


def test_hostile_queue_positions_break_the_queue_and_no_more(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(pattern(MIB))
    with Disk(image, queues=3, incoming=True) as disk:
        queues = [disk.queue(i) for i in range(3)]
        states = (m.QueueState(0, 40000, 7), m.QueueState(1, 0, 65535), m.QueueState(2, 0, 0, 60000))
        disk.restore(m.DeviceState(1, GOOD, states), queues)
        disk.resume()
        assert disk.wait_needs_reset().queue == 0
        assert disk.stats().queues[1].errors == 0
        disk.reset()
        for q in queues:
            q.restart()
        disk.activate(queues)
        for q in queues:
            assert Driver(q).read(0, 512) == pattern(512)


@pytest.mark.parametrize("kind", ["raw", "direct", "overlay", "direct-overlay"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("event_idx", [False, True])
def test_the_dirty_log_names_every_page_that_changed(
    tmp_path: Path, memory: Memory, engine: str, kind: str, event_idx: bool
) -> None:
    """And no page that the device had no business with."""
    image = tmp_path / "image"
    image.write_bytes(pattern(4 * MIB))
    over = tmp_path / "o" if "overlay" in kind else None
    rng = random.Random(f"{engine}{kind}{event_idx}")
    with Disk(image, overlay_path=over, engine=engine, direct="direct" in kind, memory=memory) as disk:
        d = disk.driver(event_idx=event_idx)
        q = d.queue
        for _ in range(6):
            disk.quiesce()  # so that nothing is served before the memory was looked at
            requests = []
            for _ in range(30):
                sector, n = rng.randrange(4000), rng.choice([1, 8, 16, 200])
                choice = rng.randrange(8)
                if choice < 4:
                    sizes = [n * 512, 1] if n < 3 else [512 + 64, n * 512 - 512 - 64, 1]
                    requests.append(q.submit([header(IN, sector)], sizes))
                elif choice == 4:
                    requests.append(d.submit_write(sector * 512, rng.randbytes(n * 512)))
                elif choice == 5:
                    requests.append(q.submit([header(13), extent(sector, n)], [1]))
                elif choice == 6:
                    requests.append(q.submit([header(rng.choice([GET_ID, 77]))], [20, 1]))
                else:
                    requests.append(q.submit([header(IN, rng.choice([0, 1 << 40])), b"x"], [511, rng.choice([1, 600])]))
            requests.append(q.submit([header(FLUSH)], [1]))
            due = q.used_idx + len(requests) & 0xFFFF
            memory.take_dirty()
            before = memory.pages()
            disk.resume()
            disk.ping_until(lambda due=due: q.used_idx == due, "all requests")  # type: ignore[misc]
            disk.quiesce()
            after, dirty = memory.pages(), memory.take_dirty()
            changed = {i for i, page in enumerate(before) if page != after[i]}
            assert changed
            assert changed <= dirty
            mine = [(q.device, 6 + 8 * q.size)] + [part for r in requests for part in r.into]
            offset = memory.regions[0].offset
            allowed = {page for gpa, n in mine for page in range(gpa + offset >> 12, (gpa + offset + n - 1 >> 12) + 1)}
            assert dirty <= allowed
            disk.resume()
            while not all(r.done for r in requests):
                q.wait(1)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_arrived_before_an_error_is_in_the_dirty_log(tmp_path: Path, memory: Memory, engine: str) -> None:
    """Somebody cuts the image off: the read brings two pages, and then nothing more."""
    image = tmp_path / "image"
    image.write_bytes(pattern(MIB))
    with Disk(image, engine=engine, memory=memory) as disk:
        d = disk.driver()
        os.truncate(image, 8192)
        disk.quiesce()
        request = d.submit_read(0, 5 * 4096)
        memory.take_dirty()
        before = memory.pages()
        disk.resume()
        d.queue.wait(1)
        disk.quiesce()
        assert request.status == IOERR
        assert request.data[0][:8192] == pattern(8192)
        changed = {i for i, (a, b) in enumerate(zip(before, memory.pages(), strict=True)) if a != b}
        driver = {d.queue.driver + memory.regions[0].offset >> 12}
        assert len(changed) >= 4
        assert changed - driver <= memory.take_dirty()


def test_the_log_of_a_whole_life_is_enough(tmp_path: Path, memory: Memory) -> None:
    """As a live snapshot does it: take the bits, copy those pages, again and again, once more at rest. The copy is the
    memory, but for what the driver wrote since."""
    image = tmp_path / "image"
    image.write_bytes(pattern(4 * MIB))
    with Disk(image, memory=memory) as disk:
        d = disk.driver()
        target = [(memory.alloc(8192), 8192) for _ in range(DEPTH)]
        status = [(memory.alloc(16), 1) for _ in range(DEPTH)]
        head = memory.alloc(16)
        for round_ in range(20):
            disk.quiesce()
            memory.map.write(head, header(IN, round_ * 16))
            requests = [d.queue.submit_at([(head, 16)], [t, s]) for t, s in zip(target, status, strict=True)]
            memory.take_dirty()
            copy = memory.pages()
            disk.resume()
            disk.quiesce()
            for page in memory.take_dirty():
                copy[page] = os.pread(memory.fd, 4096, page * 4096)
            assert copy == memory.pages()
            disk.resume()
            d.run_all(requests)
