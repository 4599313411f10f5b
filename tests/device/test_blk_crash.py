"""The overlay under power cuts, on a simulated host that reorders, tears and fails; device/native/blk_crash.c says how.

MOTORCADE_FUZZ_SECONDS runs it for longer, on a fresh seed.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

from harness.compile import NATIVE, compile_c, run

PARTS = [f"blk{part}.c" for part in ("", "_req", "_io", "_flush", "_overlay", "_geometry", "_inject")]
PARTS += ["virtqueue.c", "virtqueue_recover.c", "inflight.c", "watch.c"]


def test_power_cuts(tmp_path: Path) -> None:
    sources = [Path(__file__).parent / "native" / "blk_crash.c", *(NATIVE / p for p in PARTS)]
    program = compile_c(tmp_path / "crash", sources)
    seconds = int(os.environ.get("MOTORCADE_FUZZ_SECONDS", "4"))
    seed = 1 if "MOTORCADE_FUZZ_SECONDS" not in os.environ else random.randrange(1, 1 << 32)
    print(run(program, str(seed), str(seconds), timeout=seconds + 60))
