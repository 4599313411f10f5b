"""What KVM's own calls cost on this host, as native/kvm_floor.c makes them: a part of every restore's time."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

from bench import report

SOURCE = Path(__file__).resolve().parent / "native" / "kvm_floor.c"
SUM = "all until the first instruction"
END = "end of the VM"


def measure(memory: int, runs: int = 30) -> dict[str, dict[str, float]]:
    """Milliseconds of each step and of all, as report.percentiles, for a VM with ``memory`` bytes of RAM."""
    with tempfile.TemporaryDirectory(prefix="mc-bench-", dir="/tmp") as folder:
        program = Path(folder) / "kvm_floor"
        flags = ["-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror"]
        subprocess.run(["gcc", *flags, "-o", str(program), str(SOURCE)], check=True)
        done = subprocess.run([program, str(runs), str(memory)], check=True, stdout=subprocess.PIPE)
    steps: dict[str, list[float]] = json.loads(done.stdout)
    steps[SUM] = [sum(run) for run in zip(*(v for name, v in steps.items() if name != END), strict=True)]
    return {name: report.percentiles([us / 1000 for us in values]) for name, values in steps.items()}


def table(memory: int, floor: dict[str, dict[str, float]]) -> str:
    """For people."""
    rows = [(name, f"{v['p50']:.2f}", f"{v['p99']:.2f}") for name, v in floor.items()]
    return report.table((f"KVM's own calls, {memory >> 20} MiB of RAM", "p50 ms", "p99"), rows)
