"""``python -m bench.restart``: what a guest sees of its disk's sidecar being killed under load.

A micro-guest on bare KVM keeps DEPTH checksummed requests of 4 KiB in flight and measures, by its TSC, the time between
two completions. The sidecar gets kill -9 a hundred times; of each kill the longest such time counts, from the last
answer of the dead process to the first of its successor: the kernel's report of the death, the fork, the sandbox, the
hello, and the recovery of the queue. For comparison: what `vmmctl sidecar restart` costs, where the successor is there
before.

At the end every block is read once more. A block that is wrong, an error or a doubled answer is this command's failure.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from bench import frozen, report
from harness.killing import Victim
from harness.vmmctl import Host

LEAST = 0.5e-3  # seconds: shorter times between two completions are not reported


def measure(depth: int, kills: int, *, ordered: bool) -> dict[str, float]:
    """Milliseconds of the longest gap of each kill, or of each restart (``ordered``)."""
    hertz = frozen.host_tsc_hz()
    worst = []
    with tempfile.TemporaryDirectory(prefix="mc-bench-", dir="/dev/shm") as folder, Host() as host:
        options = {"consoles": [{"id": "ttyS0", "type": "uart", "scrollback": "4M"}]}
        with Victim(host, Path(folder), depth, gap=int(LEAST * hertz), **options) as victim:
            victim.gaps(0.5)
            for _ in range(kills):
                if ordered:
                    victim.qmp.execute("x-motorcade-sidecar-restart", {"id": "root"})
                else:
                    victim.kill("blk-root")
                # It works again for a while, and says how long it could not.
                worst.append(max(victim.gaps(0.1), default=0) / hertz * 1000)
            said = victim.finish()
    if not said.clean:
        raise SystemExit(f"depth {depth}: the load is not what it was: {said}")
    print(f"depth {depth}, {'restart' if ordered else 'kill -9'}: {said.requests} requests, none lost, none doubled")
    return report.percentiles(worst)


def main() -> None:
    """Prints a table and writes bench/results/restart.json."""
    parser = argparse.ArgumentParser(description="Longest gaps that a guest sees when its disk's sidecar is killed.")
    parser.add_argument("--kills", type=int, default=100, help="of each kind (default: 100)")
    options = parser.parse_args()
    rows, results = [], {}
    for depth in (1, 32):
        for ordered in (False, True):
            found = measure(depth, options.kills, ordered=ordered)
            name = f"{'sidecar restart' if ordered else 'kill -9'}, depth {depth}"
            results[name] = found
            rows.append([name, *(f"{found[key]:.1f}" for key in ("p50", "p99", "max"))])
    print(report.table(["longest gap, ms", "p50", "p99", "max"], rows))
    print(report.save("restart", {"kills": options.kills, "gap_ms": results}))


if __name__ == "__main__":
    main()
