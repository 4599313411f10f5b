"""Random rings, some of them changing under the reader. MOTORCADE_FUZZ_SECONDS runs it for longer, on fresh seeds."""

from __future__ import annotations

import os
import random
from pathlib import Path

from harness.compile import NATIVE, compile_c, run

PARTS = [NATIVE / name for name in ("virtqueue.c", "virtqueue_recover.c", "inflight.c", "watch.c")]


def test_random_rings(tmp_path: Path) -> None:
    program = compile_c(tmp_path / "fuzz", [Path(__file__).with_name("virtqueue_fuzz.c"), *PARTS])
    seconds = int(os.environ.get("MOTORCADE_FUZZ_SECONDS", "3"))
    seed = 1 if "MOTORCADE_FUZZ_SECONDS" not in os.environ else random.randrange(1, 1 << 32)
    # The seed is in the report of a failure.
    print(run(program, str(seed), str(seconds), timeout=seconds + 60))
