"""Every block request against the image's file, through a real sidecar and both engines."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.disk import (
    CONFIG_WCE,
    DISCARD,
    ENGINES,
    F_CONFIG_WCE,
    F_DISCARD,
    F_FLUSH,
    F_MQ,
    F_RO,
    F_WRITE_ZEROES,
    GET_ID,
    IN,
    IOERR,
    OK,
    OUT,
    UNMAP,
    UNSUPP,
    WRITE_ZEROES,
    Disk,
    Driver,
    extent,
    header,
    pattern,
)
from motorcade.proto import messages as m

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(pattern(4 * MIB))
    return path


@pytest.fixture(params=ENGINES)
def disk(request: pytest.FixtureRequest, image: Path) -> Iterator[Disk]:
    with Disk(image, engine=request.param) as d:
        yield d


def test_read_and_write(disk: Disk, image: Path) -> None:
    d = disk.driver()
    before = image.read_bytes()
    assert d.read(0, 4096) == before[:4096]
    assert d.read(4 * MIB - 512, 512) == before[-512:]
    data = os.urandom(128 << 10)
    assert d.write(77 * 512, data) == OK
    assert d.read(77 * 512, len(data)) == data
    after = image.read_bytes()
    assert after == before[: 77 * 512] + data + before[77 * 512 + len(data) :]


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("event_idx", [False, True])
def test_many_in_flight(image: Path, event_idx: bool, indirect: bool) -> None:
    rng = random.Random(5)
    model = bytearray(image.read_bytes())
    with Disk(image) as disk:
        d = disk.driver(event_idx=event_idx, indirect=indirect)
        for _ in range(20):
            # Sectors that no other request of the batch touches, so that the result is sure.
            slots = rng.sample(range(4 * MIB // 8192), 40)
            batch, expected = [], {}
            for i, slot in enumerate(slots):
                at = slot * 8192
                if i % 2:
                    data = rng.randbytes(512 * rng.randint(1, 16))
                    batch.append(d.submit_write(at, data))
                    model[at : at + len(data)] = data
                else:
                    r = d.submit_read(at, 8192)
                    batch.append(r)
                    expected[id(r)] = bytes(model[at : at + 8192])
            d.run_all(batch)
            for r in batch:
                if id(r) in expected:
                    assert r.data[0] == expected[id(r)]
        stats = disk.stats().queues[0]
        assert stats.requests == 800
        assert stats.errors == 0
    assert image.read_bytes() == model


def test_ring_wraps_many_times(image: Path) -> None:
    """The slots; that the 16-bit indices wrap too is virtqueue_test.c's."""
    with Disk(image) as disk:
        d = disk.driver(size=4)
        for i in range(300):
            assert d.read(i * 512, 512) == pattern(512 * (i + 1))[-512:]


def test_header_and_status_in_any_framing(disk: Disk, image: Path) -> None:
    """Virtio 1.2, 2.7.4.1: nothing may be assumed about how a request is split into buffers."""
    d = disk.driver()
    q = d.queue
    data = os.urandom(1536)
    whole = header(OUT, 8) + data
    splits = [[16, 1536], [1] * 16 + [1536], [3, 13, 700, 836], [16 + 700, 836], [1552], [15, 2, 1535]]
    for sizes in splits:
        assert d.write(8 * 512, bytes(1536)) == OK
        parts, at = [], 0
        for n in sizes:
            parts.append(whole[at : at + n])
            at += n
        request = q.run(parts, [1])
        assert (request.status, request.written) == (OK, 1)
        assert image.read_bytes()[8 * 512 : 11 * 512] == data, sizes
    for into in [[1537], [1536, 1], [1, 1535, 1], [700, 837], [1, 1, 1535]]:
        request = q.run([header(IN, 8)[:5], header(IN, 8)[5:]], into)
        assert request.written == 1537
        assert b"".join(request.data) == data + b"\0", into


def test_get_id(image: Path) -> None:
    with Disk(image, serial="twenty-bytes-in-all!") as disk:
        d = disk.driver()
        request = d.queue.run([header(GET_ID)], [20, 1])
        assert (request.data, request.written) == ([b"twenty-bytes-in-all!", b"\0"], 21)
        assert d.queue.run([header(GET_ID)], [7, 1]).data == [b"twenty-", b"\0"]
        roomy = d.queue.run([header(GET_ID)], [64, 1])
        assert roomy.data[0][:20] == b"twenty-bytes-in-all!"
        assert roomy.status == OK
        assert roomy.written == 20  # the bytes up to there were written, those between and the status not all


def test_flush(disk: Disk) -> None:
    d = disk.driver()
    assert d.write(0, b"x" * 512) == OK
    assert d.flush() == OK
    batch = [d.queue.submit([header(4)], [1]) for _ in range(20)]
    d.run_all(batch)
    assert disk.counter("flushes") == 21


def test_write_zeroes(disk: Disk, image: Path) -> None:
    d = disk.driver()
    before = image.read_bytes()
    assert d.write_zeroes(3 * 512, 5 * 512) == OK
    assert d.write_zeroes(MIB, MIB, UNMAP) == OK
    after = image.read_bytes()
    assert after[3 * 512 : 8 * 512] == bytes(5 * 512)
    assert after[MIB : 2 * MIB] == bytes(MIB)
    assert after[: 3 * 512] == before[: 3 * 512]
    assert after[8 * 512 : MIB] == before[8 * 512 : MIB]
    assert after[2 * MIB :] == before[2 * MIB :]
    allocated = image.stat().st_blocks * 512
    assert allocated <= 3 * MIB + 64 * 1024, "UNMAP gives the space back"


def test_write_zeroes_without_unmap_keeps_space(disk: Disk, image: Path) -> None:
    blocks = image.stat().st_blocks
    assert disk.driver().write_zeroes(MIB, MIB) == OK
    assert image.read_bytes()[MIB : 2 * MIB] == bytes(MIB)
    assert image.stat().st_blocks >= blocks


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount")
@pytest.mark.parametrize("engine", ENGINES)
def test_write_zeroes_where_the_host_cannot_zero_a_range(engine: str) -> None:
    """tmpfs can punch holes and not zero ranges: without UNMAP that means to write zeroes."""
    from harness.disk import small_tmpfs

    with small_tmpfs(16 * MIB) as mount:
        image = mount / "disk.img"
        image.write_bytes(pattern(8 * MIB))
        with Disk(image, engine=engine) as disk:
            d = disk.driver()
            assert d.write_zeroes(512, 3 * MIB) == OK
            data = image.read_bytes()
            assert data[512 : 512 + 3 * MIB] == bytes(3 * MIB)
            assert data[:512] + data[512 + 3 * MIB :] == pattern(8 * MIB)[:512] + pattern(8 * MIB)[512 + 3 * MIB :]
            assert image.stat().st_blocks * 512 >= 8 * MIB
            assert d.write_zeroes(0, 4 * MIB, UNMAP) == OK
            assert image.stat().st_blocks * 512 <= 4 * MIB


def test_discard(disk: Disk, image: Path) -> None:
    d = disk.driver()
    blocks = image.stat().st_blocks
    assert d.discard(MIB, MIB) == OK
    assert image.stat().st_blocks <= blocks - MIB // 512
    after = image.read_bytes()
    assert after[:MIB] + after[2 * MIB :] == pattern(4 * MIB)[:MIB] + pattern(4 * MIB)[2 * MIB :]


def test_discard_off(image: Path) -> None:
    """``discard: false``: neither offered, nor done behind WRITE_ZEROES' back."""
    blocks = image.stat().st_blocks
    with Disk(image, discard=False) as disk:
        assert not disk.offered & F_DISCARD
        assert disk.offered & F_WRITE_ZEROES
        assert disk.config[56] == 0, "write_zeroes_may_unmap"
        d = disk.driver()
        assert d.discard(0, MIB) == UNSUPP
        assert d.write_zeroes(0, MIB, UNMAP) == OK
    assert image.read_bytes()[:MIB] == bytes(MIB)
    assert image.stat().st_blocks >= blocks


def test_unsupported(disk: Disk) -> None:
    d = disk.driver()
    for kind in (2, 3, 5, 9, 10, 12, 14, 15, 0x80000000, 0xFFFFFFFF):
        request = d.queue.run([header(kind)], [1])
        assert request.status == UNSUPP, kind
    assert d.write_zeroes(0, 512, 2) == UNSUPP
    assert d.write_zeroes(0, 512, 0xFFFFFFFE) == UNSUPP
    assert d.discard(0, 512, UNMAP) == UNSUPP, "5.2.6.2: the unmap flag is WRITE_ZEROES' own"
    assert disk.counter("io-errors") == 0
    assert disk.counter("refused") == 13


def test_out_of_range(disk: Disk, image: Path) -> None:
    d = disk.driver()
    last = 4 * MIB // 512
    before = image.read_bytes()
    for sector, size in [
        (last, 512),
        (last - 1, 1024),
        (1 << 55, 512),
        ((1 << 64) // 512, 512),
        ((1 << 64) - 1, 512),
        ((1 << 64) - 8, 4096),
        (0, 511),
        (0, 1),
        (5, 513),
    ]:
        assert d.queue.run([header(OUT, sector), b"x" * size], [1]).status == IOERR, (sector, size)
        request = d.queue.run([header(IN, sector)], [size, 1])
        assert request.status == IOERR
        assert request.written == 0, "nothing from the first writable byte on was written"
        assert request.data[0] == b"\xa5" * size
    for kind in (DISCARD, WRITE_ZEROES):
        for sector, count in [
            (last, 1),
            (last - 1, 2),
            ((1 << 64) - 1, 1),
            ((1 << 64) - 1, 0xFFFFFFFF),
            (0, 0xFFFFFFFF),
        ]:
            assert d.queue.run([header(kind), extent(sector, count)], [1]).status == IOERR, (kind, sector, count)
        two = extent(0, 1) + extent(8, 1)
        assert d.queue.run([header(kind), two], [1]).status == IOERR, "more than max_*_seg segments"
        assert d.queue.run([header(kind), two[:15]], [1]).status == IOERR
        assert d.queue.run([header(kind)], [1]).status == IOERR
    assert image.read_bytes() == before


def test_readonly(image: Path) -> None:
    before = image.read_bytes()
    with Disk(image, readonly=True) as disk:
        assert disk.offered & F_RO
        assert not disk.offered & (F_DISCARD | F_WRITE_ZEROES | F_CONFIG_WCE)
        d = disk.driver()
        assert d.read(512, 512) == before[512:1024]
        assert d.write(0, b"x" * 512) == IOERR
        assert d.write_zeroes(0, 512) == UNSUPP
        assert d.flush() == OK
        assert disk.shutdown() == 0
    assert image.read_bytes() == before


def test_multiqueue(image: Path) -> None:
    with Disk(image, queues=4) as disk:
        assert disk.offered & F_MQ
        assert struct.unpack_from("<H", disk.config, 34) == (4,)
        drivers = [Driver(q) for q in disk.start()]
        requests = [
            d.submit_write((i * 8 + k) * 4096, bytes([i * 8 + k]) * 4096)
            for i, d in enumerate(drivers)
            for k in range(8)
        ]
        for d in drivers:
            d.queue.kick()
        for d in drivers:
            d.queue.wait(8)
        for i, d in enumerate(drivers):
            assert d.read((31 - i) * 4096, 4096) == bytes([31 - i]) * 4096
        assert all(r.status == OK for r in requests)
        assert [q.requests for q in disk.stats().queues] == [9] * 4


def test_one_queue_of_many(image: Path) -> None:
    """A driver may leave queues alone; their notifications are of no consequence."""
    with Disk(image, queues=3) as disk:
        queue = disk.queue(1)
        disk.activate([queue])
        for kick in (disk.kicks[0], disk.kicks[2]):
            os.eventfd_write(kick, 1)
        assert Driver(queue).read(0, 512) == pattern(512)
        assert disk.alive
        assert not disk.needs_reset


def test_config_space(image: Path) -> None:
    with image.open("ab") as f:
        f.write(b"tail")  # not a whole sector: not part of the disk
    with Disk(image) as disk:
        config = disk.config
        assert len(config) == 60
        capacity, _, seg_max = struct.unpack_from("<QII", config)
        blk_size, exponent, _, min_io, _ = struct.unpack_from("<IBBHI", config, 20)
        assert capacity == 4 * MIB // 512
        assert (seg_max, blk_size, exponent, min_io) == (254, 512, 3, 8)
        assert config[CONFIG_WCE] == 1
        assert disk.hello is not None
        assert disk.hello.virtio_type == 2
        d = disk.driver()
        assert d.read(capacity * 512 - 512, 512) == pattern(4 * MIB)[-512:]


def test_seg_max_segments(image: Path) -> None:
    with Disk(image) as disk:
        d = disk.driver()
        data = os.urandom(254 * 512)
        parts = [data[i : i + 512] for i in range(0, len(data), 512)]
        assert d.queue.run([header(OUT, 4), *parts], [1]).status == OK
        request = d.queue.run([header(IN, 4)], [512] * 254 + [1])
        assert b"".join(request.data[:-1]) == data


def test_no_interrupt_is_respected(image: Path) -> None:
    with Disk(image) as disk:
        d = disk.driver(event_idx=False)
        q = d.queue
        q.set_no_interrupt(True)
        for i in range(10):
            q.submit([header(IN, i)], [512, 1])
        q.kick()
        # With its queue stopped the device has published everything; the answer to the reset comes after that.
        disk.poll_until(lambda: q.used_idx == 10, "ten used entries")
        disk.ask(m.Reset())
        assert not q.wait_interrupt(0)
        assert disk.interrupt_status == 0
        assert disk.stats().queues[0].interrupts == 0


def test_event_idx_spares_interrupts(image: Path) -> None:
    with Disk(image) as disk:
        d = disk.driver()
        q = d.queue
        q.set_used_event(9)  # wake me when the tenth is done
        for i in range(10):
            q.submit([header(IN, i)], [512, 1])
            q.kick(force=True)
        assert q.wait_interrupt(20)
        assert q.used_idx == 10
        assert disk.interrupt_status == 1
        stats = disk.stats().queues[0]
        assert stats.interrupts == 1
        assert len(q.wait(10)) == 10


def test_writethrough(image: Path) -> None:
    """CONFIG_WCE off: each write is followed by an fdatasync before it completes. Seen in the sidecar's own calls."""
    with Disk(image) as disk:
        d = disk.driver()
        disk.ask(m.ConfigWrite(CONFIG_WCE, b"\0"))
        disk.wait_until(lambda: bool(disk.config_changes), "the new configuration")
        assert disk.config[CONFIG_WCE] == 0
        assert d.write(0, b"y" * 4096) == OK
        assert disk.counter("syncs") == 1
        disk.ask(m.ConfigWrite(CONFIG_WCE, b"\1"))
        assert d.write(0, b"z" * 4096) == OK
        assert disk.counter("syncs") == 1
        assert disk.request(m.ConfigWrite(58, b"\1\2\3")) != m.Ok(), "past the end"
        disk.ask(m.ConfigWrite(0, b"\xff"))
        assert disk.config[0] == 0, "what is not writable is ignored"


def test_driver_without_flush_gets_writethrough(image: Path) -> None:
    with Disk(image) as disk:
        queue = disk.queue(0)
        disk.activate([queue], disk.offered & ~(F_FLUSH | F_CONFIG_WCE | 1 << 28))
        assert Driver(queue).write(0, b"y" * 4096) == OK
        assert disk.counter("syncs") == 1


def test_reset_in_mid_load_and_again(image: Path) -> None:
    with Disk(image, queues=2) as disk:
        for _ in range(10):
            queues = disk.start()
            for q in queues:
                for i in range(60):
                    q.submit([header(IN, i * 8)], [4096, 1], indirect=False)
                q.kick()
            disk.reset()
            for q in queues:
                used = q.used_idx
                q.reap()
                os.eventfd_write(q.kick_fd, 1)
                assert q.used_idx == used, "a device that was reset leaves memory alone"
        d = disk.driver()
        assert d.read(0, 512) == pattern(512)


def test_file_cut_off_behind_its_back(disk: Disk, image: Path) -> None:
    d = disk.driver()
    os.truncate(image, MIB)
    request = d.queue.run([header(IN, 2 * MIB // 512)], [4096, 1])
    assert request.status == IOERR
    assert disk.counter("io-errors") == 1
    assert d.read(0, 512) == pattern(512)
    disk.wait_log("failed")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("with_overlay", [False, True])
def test_direct(image: Path, tmp_path: Path, engine: str, with_overlay: bool) -> None:
    """O_DIRECT, with buffers that it cannot take among those that it can."""
    model = bytearray(image.read_bytes())
    rng = random.Random(9)
    with Disk(image, direct=True, engine=engine, overlay_path=tmp_path / "o" if with_overlay else None) as disk:
        d = disk.driver()
        memory = disk.memory
        area = memory.alloc(256 << 10, 4096)
        status = memory.alloc(16)
        for i in range(60):
            size = 512 * rng.randint(1, 300)
            at = 512 * rng.randint(0, (4 * MIB - size) // 512)
            skew = rng.choice([0, 0, 512, 1, 4, 1022])
            cut = rng.choice([0, 0, 3, 512]) % size
            data = rng.randbytes(size)
            pieces = [(area + skew, cut), (area + skew + cut, size - cut)] if cut else [(area + skew, size)]
            head = memory.alloc(16)
            if i % 2:
                memory.map.write(area + skew, data)
                memory.map.write(head, header(OUT, at // 512))
                request = d.queue.submit_at([(head, 16), *pieces], [(status, 1)])
                model[at : at + size] = data
            else:
                memory.map.write(area, bytes(256 << 10))
                memory.map.write(head, header(IN, at // 512))
                request = d.queue.submit_at([(head, 16)], [*pieces, (status, 1)])
            d.queue.kick()
            d.queue.wait(1)
            assert request.status == OK, (i, size, at, skew, cut)
            if not i % 2:
                assert memory.map.read(area + skew, size) == model[at : at + size]
        assert disk.counter("bounced") > 5
        assert d.read(0, MIB) == model[:MIB]
        assert disk.shutdown() == 0


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a loop device")
@pytest.mark.parametrize("engine", ENGINES)
def test_block_device(image: Path, engine: str) -> None:
    import subprocess

    # 4096-byte sectors: the driver must be told, and held to it.
    loop = subprocess.run(
        ["losetup", "--find", "--show", "--sector-size", "4096", "--direct-io=on", image],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    try:
        with Disk(Path(loop), engine=engine, direct=True) as disk:
            assert struct.unpack_from("<I", disk.config, 20) == (4096,)
            d = disk.driver()
            assert d.read(MIB, 8192) == pattern(4 * MIB)[MIB : MIB + 8192]
            assert d.write(4096, b"w" * 4096) == OK
            assert d.write(512, b"w" * 512) == IOERR, "half a block"
            assert d.write_zeroes(2 * MIB, MIB) == OK
            assert d.write_zeroes(3 * MIB, 64 << 10, UNMAP) == OK
            assert d.discard(8192, 8192) == OK
            assert d.flush() == OK
            assert disk.shutdown() == 0
    finally:
        subprocess.run(["losetup", "--detach", loop], check=True)
    data = image.read_bytes()
    assert data[4096:8192] == b"w" * 4096
    assert data[2 * MIB : 3 * MIB + (64 << 10)] == bytes(MIB + (64 << 10))


def test_cold_start_and_shutdown(image: Path) -> None:
    """The process as the supervisor could also start it: python -m motorcade.sidecars.blk --boot-fd N."""
    with Disk(image, cold=True) as disk:
        d = disk.driver()
        assert d.write(0, b"c" * 512) == OK
        assert disk.shutdown() == 0
    assert image.read_bytes()[:512] == b"c" * 512
