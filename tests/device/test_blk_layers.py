"""Overlays over overlays: what a clone's disk is made of."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from harness.disk import ENGINES, OK, UNMAP, Disk, exercise, pattern
from harness.sidecar import SidecarGone
from motorcade.sidecars.blk import overlay

MIB = 1 << 20
BLOCK = overlay.BLOCK


def make_layer(path: Path, below: Path, *, first: bool, blocks: dict[int, bytes | None]) -> None:
    """An overlay over ``below`` with these blocks; None is a zero block."""
    with below.open("rb") as b:
        made = overlay.create(path, b.fileno(), layer=not first)
    with path.open("r+b") as f:
        for block, content in blocks.items():
            f.seek(made.map_offset + block // 4)
            byte = f.read(1)[0] | (2 if content is None else 1) << block % 4 * 2
            f.seek(made.map_offset + block // 4)
            f.write(bytes([byte]))
            f.seek(made.data_offset + block * BLOCK)
            f.write(b"\xbe" * BLOCK if content is None else content)


def refusal(base: Path, layers: Sequence[Path], top: Path) -> str:
    """Why a sidecar does not start on these."""
    with Disk(base, layers=layers, overlay_path=top, wait=False) as disk, pytest.raises(SidecarGone):
        disk.wait_until(lambda: disk.hello is not None, "its refusal")
    assert disk.exit_status == 1
    assert disk.stopped is not None
    return disk.stopped


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_each_life_on_top_of_the_last_ones(tmp_path: Path, engine: str, direct: bool) -> None:
    """Reads, copy-up and zeroing over three layers, against a model; nothing below the top changes."""
    base = tmp_path / "base"
    base.write_bytes(pattern(2 * MIB + 3 * 512))
    model = bytearray(base.read_bytes())
    rng = random.Random(f"{engine}{direct}")
    layers: list[Path] = []
    frozen: dict[Path, bytes] = {base: bytes(model)}
    for life in range(4):
        path = tmp_path / f"layer{life}"
        for _ in range(2):  # the second finds what the first left in the top
            with Disk(base, layers=layers, overlay_path=path, engine=engine, direct=direct) as disk:
                d = disk.driver()
                assert d.read(0, MIB) == model[:MIB]
                exercise(d, model, rng, 15)
                assert d.read(len(model) - MIB, MIB) == model[-MIB:]
                assert disk.shutdown() == 0
        layers.append(path)
        frozen[path] = path.read_bytes()
    for path, content in frozen.items():
        assert path == layers[-1] or path.read_bytes() == content


def test_the_highest_layer_that_knows_a_block_has_it(tmp_path: Path) -> None:
    base, low, high, top = (tmp_path / name for name in ("base", "low", "high", "top"))
    base.write_bytes(b"b" * 8 * BLOCK)
    one, two = b"1" * BLOCK, b"2" * BLOCK
    make_layer(low, base, first=True, blocks={1: one, 2: one, 3: None, 4: None, 5: one})
    make_layer(high, low, first=False, blocks={2: two, 4: two, 5: None})
    expected = bytearray(b"b" * BLOCK + one + two + bytes(BLOCK) + two + bytes(BLOCK) + b"b" * 2 * BLOCK)
    with Disk(base, layers=[low, high], overlay_path=top) as disk:
        d = disk.driver()
        assert d.read(0, 8 * BLOCK) == expected
        assert d.read(BLOCK + 512, 3 * BLOCK) == expected[BLOCK + 512 : 4 * BLOCK + 512]
        # Copying up takes the rest of a block from where it is.
        for block in range(8):
            at = block * BLOCK + 1024
            assert d.write(at, b"t" * 512) == OK
            expected[at : at + 512] = b"t" * 512
        assert d.read(0, 8 * BLOCK) == expected
        # What is zero here hides what is below.
        assert d.discard(2 * BLOCK, 2 * BLOCK) == OK
        assert d.write_zeroes(4 * BLOCK, BLOCK, UNMAP) == OK
        expected[2 * BLOCK : 5 * BLOCK] = bytes(3 * BLOCK)
        assert d.read(0, 8 * BLOCK) == expected
        assert disk.shutdown() == 0
    with Disk(base, layers=[low, high], overlay_path=top) as disk:
        assert disk.driver().read(0, 8 * BLOCK) == expected


def test_the_most_layers(tmp_path: Path) -> None:
    """63, each with a block of its own, each hiding one of the layer below; and one more is refused."""
    base = tmp_path / "base"
    base.write_bytes(bytes(70 * BLOCK))
    below, layers = base, []
    for n in range(overlay.MAX_LAYERS):
        layers.append(tmp_path / f"layer{n}")
        content = bytes([n + 1]) * BLOCK
        make_layer(layers[-1], below, first=n == 0, blocks={n: content, n + 1: content})
        below = layers[-1]
    with Disk(base, layers=layers, overlay_path=tmp_path / "top") as disk:
        d = disk.driver()
        expected = b"".join(bytes([n]) * BLOCK for n in [*range(1, 64), 63])
        assert d.read(0, 64 * BLOCK) == expected
        assert d.write(10 * BLOCK + 512, b"x" * 512) == OK
        assert d.read(10 * BLOCK, 1536) == b"\x0b" * 512 + b"x" * 512 + b"\x0b" * 512
    make_layer(tmp_path / "more", below, first=False, blocks={})
    assert "64 layers" in refusal(base, [*layers, tmp_path / "more"], tmp_path / "top2")


def test_a_lower_layer_that_changed_is_refused(tmp_path: Path) -> None:
    base, low, high, top = (tmp_path / name for name in ("base", "low", "high", "top"))
    base.write_bytes(pattern(MIB))
    make_layer(low, base, first=True, blocks={1: b"1" * BLOCK})
    make_layer(high, low, first=False, blocks={2: b"2" * BLOCK})
    with Disk(base, layers=[low, high], overlay_path=top) as disk:
        assert disk.shutdown() == 0
    info = low.stat()
    with low.open("r+b") as f:
        f.seek(4096)
        f.write(b"\1")
    assert "layer 1: its base was modified" in refusal(base, [low, high], top)
    with low.open("r+b") as f:
        f.seek(4096)
        f.write(b"\4")
    os.utime(low, ns=(info.st_atime_ns, info.st_mtime_ns))
    with Disk(base, layers=[low, high], overlay_path=top) as disk:
        assert disk.driver().read(BLOCK, 2 * BLOCK) == b"1" * BLOCK + b"2" * BLOCK
    info = base.stat()
    os.utime(base, ns=(info.st_atime_ns, info.st_mtime_ns + 1))
    assert "layer 0: its base was modified" in refusal(base, [low, high], top)
    os.utime(base, ns=(info.st_atime_ns, info.st_mtime_ns))
    os.utime(high, ns=(info.st_atime_ns, info.st_mtime_ns + 1))
    assert refusal(base, [low, high], top).startswith("OverlayError: its base was modified")


def test_a_stack_in_another_order_or_with_something_missing_is_refused(tmp_path: Path) -> None:
    base, low, high, top = (tmp_path / name for name in ("base", "low", "high", "top"))
    base.write_bytes(pattern(MIB))
    make_layer(low, base, first=True, blocks={})
    make_layer(high, low, first=False, blocks={})
    with Disk(base, layers=[low, high], overlay_path=top) as disk:
        assert disk.shutdown() == 0
    assert "base" in refusal(base, [high, low], top)
    assert "base" in refusal(base, [low], top)
    assert "base" in refusal(base, [high], top)
    assert "base" in refusal(base, [], top)
    assert "layer 0: it is not an overlay" in refusal(base, [base, high], top)


def test_a_damaged_layer_is_refused(tmp_path: Path) -> None:
    base, low, top = (tmp_path / name for name in ("base", "low", "top"))
    base.write_bytes(pattern(MIB))
    make_layer(low, base, first=True, blocks={})
    with low.open("r+b") as f:
        f.seek(4096)
        f.write(b"\3")
    assert "layer 0's map is damaged" in refusal(base, [low], top)


def test_an_image_that_looks_like_an_overlay_is_an_image(tmp_path: Path) -> None:
    """What a guest writes to its disk must not decide what the disk is."""
    base, fake, top = (tmp_path / name for name in ("base", "fake", "top"))
    base.write_bytes(pattern(MIB))
    make_layer(fake, base, first=True, blocks={1: b"1" * BLOCK})
    content = fake.read_bytes()
    with Disk(fake, overlay_path=top) as disk:
        d = disk.driver()
        assert d.read(0, len(content)) == content
        assert d.write(0, bytes(512)) == OK
    assert fake.read_bytes() == content


def test_only_an_overlay_can_be_a_layer(tmp_path: Path) -> None:
    base, low, top = (tmp_path / name for name in ("base", "low", "top"))
    base.write_bytes(pattern(MIB))
    make_layer(low, base, first=True, blocks={})
    with base.open("rb") as b, low.open("rb") as f, pytest.raises(overlay.OverlayError, match="not an overlay"):
        overlay.create(top, b.fileno(), layer=True)
        overlay.create(top, f.fileno(), layer=True)
    assert not top.exists()
    with low.open("rb") as f:
        assert overlay.create(top, f.fileno(), layer=True).size == MIB
