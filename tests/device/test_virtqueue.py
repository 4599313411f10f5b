"""The virtqueue in C by itself, with sanitizers; device/native/virtqueue_test.c has the tests."""

from __future__ import annotations

from pathlib import Path

from harness.compile import NATIVE, compile_c, run

HERE = Path(__file__).parent


def test_virtqueue(tmp_path: Path) -> None:
    run(compile_c(tmp_path / "vq", [HERE / "native" / "virtqueue_test.c", NATIVE / "virtqueue.c", NATIVE / "watch.c"]))


def test_handshakes_at_full_speed(tmp_path: Path) -> None:
    """Without sanitizers, whose own fences hide missing ones."""
    sources = [HERE / "native" / "virtqueue_test.c", NATIVE / "virtqueue.c", NATIVE / "watch.c"]
    run(compile_c(tmp_path / "vq", sources, flags=["-O2"]))
