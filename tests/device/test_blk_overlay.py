"""The copy-on-write overlay: what it holds, what a kill leaves of it, and what it refuses."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.disk import ENGINES, FLUSH, IOERR, OK, UNMAP, Disk, exercise, header, pattern, small_tmpfs
from harness.sidecar import SidecarGone
from motorcade.sidecars.blk import overlay

KIB, MIB = 1 << 10, 1 << 20
BLOCK = overlay.BLOCK


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Path]:
    """A base of 2 MiB and a bit, which nothing may change."""
    path = tmp_path / "base.img"
    content = pattern(2 * MIB + 3 * 512)
    path.write_bytes(content)
    yield path
    assert path.read_bytes() == content


def usage(path: Path, base: Path) -> overlay.Usage:
    """What `check` says."""
    with path.open("rb") as o, base.open("rb") as b:
        return overlay.check(o.fileno(), b.fileno())


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_against_a_model(base: Path, tmp_path: Path, engine: str, direct: bool) -> None:
    """Four lives of a disk, each of which must find what the last one left."""
    model = bytearray(base.read_bytes())
    rng = random.Random(f"{engine}{direct}")
    path = tmp_path / "o"
    for _ in range(4):
        with Disk(base, overlay_path=path, engine=engine, direct=direct) as disk:
            d = disk.driver()
            assert d.read(0, MIB) == model[:MIB]
            exercise(d, model, rng, 40)
            assert d.read(len(model) - MIB, MIB) == model[-MIB:]
            assert disk.shutdown() == 0
    used = usage(path, base)
    assert used.data > 50
    assert used.zero > 5


def test_small_writes_to_one_block_at_the_same_time(base: Path, tmp_path: Path) -> None:
    """Each copies the block up: no copy may undo another's write."""
    rng = random.Random(3)
    model = bytearray(base.read_bytes())
    with Disk(base, overlay_path=tmp_path / "o") as disk:
        d = disk.driver()
        for start in range(0, 64 * BLOCK, 4 * BLOCK):
            order = rng.sample(range(32), 32)
            batch = []
            for sector in order:
                data = rng.randbytes(512)
                at = start + sector * 512
                model[at : at + 512] = data
                batch.append(d.submit_write(at, data))
            d.run_all(batch)
        assert d.read(0, 64 * BLOCK) == model[: 64 * BLOCK]
        assert disk.counter("copied") >= 64


def test_empty_overlay_takes_no_space(tmp_path: Path) -> None:
    base = tmp_path / "base"
    with base.open("wb") as f:
        f.truncate(100 << 30)
    path = tmp_path / "o"
    with Disk(base, overlay_path=path) as disk:
        assert path.stat().st_blocks * 512 <= 64 * KIB
        d = disk.driver()
        assert d.write((99 << 30) + 5 * 512, b"far" + bytes(509)) == OK
        assert d.flush() == OK
        assert d.read((99 << 30) + 5 * 512, 512).startswith(b"far")
        assert path.stat().st_blocks * 512 <= 96 * KIB
    with Disk(base, overlay_path=path) as disk:
        assert disk.driver().read((99 << 30) + 5 * 512, 512).startswith(b"far")


def test_zeroes_and_discards_need_no_space_and_give_it_back(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "o"
    with Disk(base, overlay_path=path) as disk:
        d = disk.driver()
        assert d.write_zeroes(0, MIB, UNMAP) == OK
        assert d.write_zeroes(MIB, 512 * KIB) == OK
        assert d.read(0, MIB) == bytes(MIB)
        assert disk.counter("overlay-blocks") == 0
        assert d.write(0, b"x" * MIB) == OK
        assert d.flush() == OK
        full = path.stat().st_blocks * 512
        assert d.discard(0, MIB) == OK
        assert path.stat().st_blocks * 512 <= full - MIB
        assert d.read(0, MIB) == bytes(MIB)
        # A discard that covers no whole block changes nothing.
        assert d.write(2 * MIB - 8 * KIB, b"y" * 8 * KIB) == OK
        assert d.discard(2 * MIB - 8 * KIB + 512, 4096) == OK
        assert d.read(2 * MIB - 8 * KIB, 8 * KIB) == b"y" * 8 * KIB
        assert disk.shutdown() == 0
    assert usage(path, base) == overlay.Usage(data=2, zero=384)


@pytest.mark.parametrize("engine", ENGINES)
def test_kill_in_mid_load(base: Path, tmp_path: Path, engine: str) -> None:
    """kill -9 with writes in flight: what was flushed is there, what was not is old or new, never anything else."""
    rng = random.Random(engine)
    path = tmp_path / "o"
    blocks = 2 * MIB // BLOCK
    # By sector: the values that it may have. One value: flushed.
    allowed = [{base.read_bytes()[n * 512 : n * 512 + 512]} for n in range(blocks * 8)]
    for life in range(5):
        with Disk(base, overlay_path=path, engine=engine) as disk:
            d = disk.driver()
            content = d.read(0, MIB) + d.read(MIB, MIB)
            for n, values in enumerate(allowed):
                found = content[n * 512 : n * 512 + 512]
                assert found in values, f"life {life}, sector {n}"
                values.clear()
                values.add(found)
            for _ in range(6):
                touched: set[int] = set()
                batch = []
                for _ in range(20):
                    n, count = rng.randrange(blocks * 8 - 40), rng.choice([1, 3, 8, 40])
                    if touched & set(range(n, n + count)):
                        continue  # two writes of a batch to one sector have no order
                    data = rng.randbytes(count * 512)
                    batch.append(d.submit_write(n * 512, data))
                    for k in range(count):
                        touched.add(n + k)
                        allowed[n + k].add(data[k * 512 : k * 512 + 512])
                d.run_all(batch)
                if rng.random() < 0.5:
                    assert d.flush() == OK
                    now = d.read(0, MIB) + d.read(MIB, MIB)
                    for n, values in enumerate(allowed):
                        values.clear()
                        values.add(now[n * 512 : n * 512 + 512])
            for _ in range(30):
                n = rng.randrange(blocks)
                data = rng.randbytes(BLOCK)
                d.submit_write(n * BLOCK, data)
                for k in range(8):
                    allowed[n * 8 + k].add(data[k * 512 : k * 512 + 512])
            d.queue.submit([header(FLUSH)], [1])
            d.queue.kick()
            disk.kill()
        usage(path, base)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a file system")
@pytest.mark.parametrize("engine", ENGINES)
def test_full_disk(base: Path, engine: str) -> None:
    """The guest sees an I/O error; what was flushed is intact; when there is space again, it goes on."""
    with small_tmpfs(1 * MIB) as mount:
        path = mount / "o"
        ballast = mount / "ballast"
        ballast.write_bytes(bytes(256 * KIB))
        with Disk(base, overlay_path=path, engine=engine) as disk:
            d = disk.driver()
            assert d.write(0, b"k" * 128 * KIB) == OK
            assert d.flush() == OK
            statuses = [d.write(at, b"z" * 128 * KIB) for at in range(256 * KIB, 2 * MIB, 128 * KIB)]
            assert IOERR in statuses
            assert statuses[0] == OK
            disk.wait_log("No space left")
            failed = 256 * KIB + statuses.index(IOERR) * 128 * KIB
            assert d.read(0, 128 * KIB) == b"k" * 128 * KIB
            # A write that failed leaves whole blocks of the old content, unless some were written before it did.
            content = d.read(failed, 128 * KIB)
            old = pattern(2 * MIB)[failed : failed + 128 * KIB]
            for i in range(0, 128 * KIB, BLOCK):
                assert content[i : i + BLOCK] in (old[i : i + BLOCK], b"z" * BLOCK)
            assert len(disk.log_lines()) < 20, "a guest can do this as often as it likes: the log does not grow with it"
            ballast.unlink()
            assert d.write(failed, b"n" * 4096) == OK
            assert d.flush() == OK
            disk.kill()
        with Disk(base, overlay_path=path, engine=engine) as disk:
            d = disk.driver()
            assert d.read(0, 128 * KIB) == b"k" * 128 * KIB
            assert d.read(failed, 4096) == b"n" * 4096


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a file system")
def test_no_space_for_the_map(tmp_path: Path) -> None:
    """The data fits and the map does not: the flush fails, and the next one, with space again, keeps it all."""
    base = tmp_path / "base"
    with base.open("wb") as f:
        f.truncate(64 << 30)
    with small_tmpfs(256 * KIB) as mount:
        path = mount / "o"
        ballast = mount / "ballast"
        with Disk(base, overlay_path=path) as disk:
            d = disk.driver()
            assert d.write(0, b"a" * 4096) == OK
            with ballast.open("wb", buffering=0) as f, pytest.raises(OSError, match="No space"):
                while True:
                    f.write(bytes(4096))
            assert d.flush() == IOERR
            assert d.read(0, 4096) == b"a" * 4096
            ballast.unlink()
            assert d.flush() == OK
            disk.kill()
        with Disk(base, overlay_path=path) as disk:
            assert disk.driver().read(0, 4096) == b"a" * 4096


def refusal(base: Path, path: Path) -> str:
    """Why a sidecar does not start on these."""
    with Disk(base, overlay_path=path, wait=False) as disk, pytest.raises(SidecarGone):
        disk.wait_until(lambda: disk.hello is not None, "its refusal")
    assert disk.exit_status == 1
    assert disk.stopped is not None
    return disk.stopped


def test_a_base_that_changed_is_refused(tmp_path: Path) -> None:
    base, path = tmp_path / "base", tmp_path / "o"
    base.write_bytes(pattern(MIB))
    with Disk(base, overlay_path=path) as disk:
        assert disk.shutdown() == 0
    info = base.stat()

    os.utime(base, ns=(info.st_atime_ns, info.st_mtime_ns + 1))
    assert "modified after the overlay was made" in refusal(base, path)
    base.write_bytes(pattern(MIB, seed=2))
    os.utime(base, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert "another content" in refusal(base, path)
    base.write_bytes(pattern(MIB + 512))
    assert "has 1049088 bytes now and had 1048576" in refusal(base, path)
    base.write_bytes(pattern(MIB))
    os.utime(base, ns=(info.st_atime_ns, info.st_mtime_ns))
    with Disk(base, overlay_path=path) as disk:
        assert disk.driver().read(0, 512) == pattern(512)


@pytest.mark.parametrize(
    ("offset", "data", "reason"),
    [
        (0, b"QFI\xfb", "not an overlay"),
        (8, b"\2", "version 2"),
        (16, b"\1", "checksum"),
        (90, b"\0\0", "checksum"),
        (4096, b"\3", "state that does not exist"),
        (4096 + 129, b"\1", "state that does not exist"),  # a block past the end of the disk
    ],
)
def test_damage_is_refused(tmp_path: Path, offset: int, data: bytes, reason: str) -> None:
    base, path = tmp_path / "base", tmp_path / "o"
    base.write_bytes(pattern(2 * MIB))
    with base.open("rb") as f:
        overlay.create(path, f.fileno())
    with path.open("r+b") as f:
        f.seek(offset)
        f.write(data)
    assert reason in refusal(base, path)


def test_cut_off_overlay_is_refused(tmp_path: Path) -> None:
    base, path = tmp_path / "base", tmp_path / "o"
    base.write_bytes(pattern(2 * MIB))
    with base.open("rb") as f:
        header = overlay.create(path, f.fileno())
    os.truncate(path, header.data_offset + MIB)
    assert "cut off" in refusal(base, path)
    os.truncate(path, 100)
    assert "not an overlay" in refusal(base, path)


def test_create_never_replaces(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "o"
    with base.open("rb") as f:
        overlay.create(path, f.fileno())
        before = path.read_bytes()
        with pytest.raises(FileExistsError):
            overlay.create(path, f.fileno())
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.img", "o"], "no temporary file is left"
