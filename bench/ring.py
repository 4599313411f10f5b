"""``python -m bench.ring``: what a request costs in the device side of a virtqueue, with nobody looking and traced.

Taking a chain, publishing its answer and being ready for the next one, in one process: no sleep, no system call, no
I/O. So this is what counters, the latency histogram and the switched-off trace may cost at most, of the microseconds
that a request takes. CPU time, of which the least of many runs counts: other work on the machine does not matter.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import report

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ROOT / "sidecars" / "native"
PARTS = ("virtqueue*.c", "inflight*.c", "watch*.c")
SOURCES = [ROOT / "bench" / "native" / "ring_cost.c", *(p for part in PARTS for p in sorted(NATIVE.glob(part)))]
BATCHES = (1, 8, 32, 128)


def main() -> int:
    """The command."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory(prefix="mc-bench-") as folder:
        program = Path(folder) / "ring_cost"
        include = [f"-I{NATIVE}", f"-I{ROOT / 'tests' / 'harness' / 'native'}"]
        command = ["gcc", "-O2", "-std=gnu11", "-Wall", "-Wextra", *include, "-o", str(program), *map(str, SOURCES)]
        subprocess.run(command, check=True)
        rows, results = [], {}
        for batch in BATCHES:
            output = subprocess.run([program, str(batch)], check=True, capture_output=True, text=True).stdout
            off, on = map(float, output.split())
            results[str(batch)] = {"off_ns": off, "trace_ns": on}
            rows.append([str(batch), f"{off:.1f}", f"{on:.1f}"])
    path = report.save("ring", {"results": results})
    print(report.table(("requests a batch", "ns a request", "with a trace"), rows))
    print(f"written to {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
