"""The decoders under mutated input, in a process of their own: an abort in pycapnp is a failure here, too.

MOTORCADE_FUZZ_SECONDS makes it run longer, MOTORCADE_FUZZ_SEED repeats a run.
"""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = float(os.environ.get("MOTORCADE_FUZZ_SECONDS", "3"))
SEED = int(os.environ.get("MOTORCADE_FUZZ_SEED", secrets.randbelow(1 << 32)))


@pytest.mark.timeout(SECONDS + 120)
def test_mutated_input_raises_malformed_and_nothing_else() -> None:
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run(
        [
            sys.executable,
            "-X",
            "faulthandler",
            str(Path(__file__).with_name("proto_mutate.py")),
            str(SEED),
            str(SECONDS),
        ],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=SECONDS + 100,
        check=False,
    )
    assert run.returncode == 0, f"seed {SEED}, status {run.returncode}\n{run.stdout}{run.stderr[-4000:]}"
    counts = re.match(r"(\d+) inputs, (\d+) of them messages", run.stdout)
    assert counts is not None
    inputs, messages = map(int, counts.groups())
    # Mutations that never, or always, yield a message would test nothing.
    assert 0.01 * inputs < messages < 0.99 * inputs
