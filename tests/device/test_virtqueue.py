"""The virtqueue in C by itself, with sanitizers; device/native/virtqueue_test.c has the tests."""

from __future__ import annotations

from pathlib import Path

from harness.compile import NATIVE, SANITIZE, compile_c, run

HERE = Path(__file__).parent
SOURCES = [HERE / "native" / "virtqueue_test.c"]
SOURCES += [NATIVE / name for name in ("virtqueue.c", "virtqueue_recover.c", "inflight.c", "watch.c")]


def test_virtqueue(tmp_path: Path) -> None:
    run(compile_c(tmp_path / "vq", SOURCES))


def test_handshakes_at_full_speed(tmp_path: Path) -> None:
    """Without sanitizers, whose own fences hide missing ones."""
    run(compile_c(tmp_path / "vq", SOURCES, flags=["-O2"]))


def test_killed_between_any_two_stores(tmp_path: Path) -> None:
    """And recovered, over and over; and from regions and rings that cannot be."""
    sources = [HERE / "native" / "recover_test.c", *SOURCES[1:]]
    flags = [*SANITIZE, "-DMC_CRASH_POINTS"]
    print(run(compile_c(tmp_path / "recover", sources, flags=flags), "1", "100000"))
