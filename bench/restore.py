"""``python -m bench.restore``: from the request to a restored machine, to its first instruction, to its answer.

Templates of 128 MiB, 512 MiB and 2 GiB with real content (bench/frozen.py), restored on the same /dev/kvm by both
sides, alternating; each end point apart. "warm" starts from processes that wait: our pool of prepared VMs, and a QEMU
that was started with ``-incoming defer``. "cold" starts from nothing but the command. Each time one machine is restored
paused; and another runs at once, and is asked a question on its console when its first byte is there. What KVM's own
calls cost is measured in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from bench import floor, frozen, frozen_ours, frozen_qemu, report
from bench.frozen import MIB, Way
from harness import microguest

SIZES = (128, 512, 2048)  # MiB
BASE = "qemu warm"  # what the others are compared with


@contextlib.contextmanager
def qemu(memory: int, kernel: Path) -> Iterator[dict[str, Way]]:
    """QEMU's ways. Its state comes from ``cat`` as in the manuals; from a descriptor as its best."""
    with frozen.scratch() as folder:
        template = frozen_qemu.freeze(folder, memory, kernel)
        yield {
            "qemu cold": frozen_qemu.cold(template),
            "qemu warm": frozen_qemu.warm(template),
            "qemu warm, fd": frozen_qemu.warm(template, by_fd=True),
        }


@contextlib.contextmanager
def motorcade(memory: int, kernel: Path) -> Iterator[dict[str, Way]]:
    """Ours."""
    with frozen.scratch() as folder, frozen_ours.Host() as bare, frozen_ours.Host() as host:
        template = frozen_ours.freeze(bare, folder, memory, kernel)
        host.start_zygote()
        yield {
            "motorcade warm": frozen_ours.warm(template),
            "motorcade cold": frozen_ours.cold(bare, template),
        }


SIDES = {"qemu": qemu, "motorcade": motorcade}


def measure(sides: Sequence[str], memory: int, runs: int, kernel: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Per way and end point, percentiles of milliseconds."""
    with contextlib.ExitStack() as stack:
        ways: dict[str, Way] = {}
        for side in sides:
            ways |= stack.enter_context(SIDES[side](memory, kernel))
        seen: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for run in range(runs + 1):
            for name, way in ways.items():
                points = way.measure()
                if run:  # the first of each fills the page cache
                    seen[name].append(points)
    return {
        name: {point: report.percentiles([one[point] for one in all_]) for point in Way.POINTS}
        for name, all_ in seen.items()
    }


def show(memory: int, ways: dict[str, dict[str, dict[str, float]]]) -> str:
    """A table for people."""
    short = ("paused", "first instruction", "answer")
    header = [f"{memory >> 20} MiB, ms", *(text for point in short for text in (f"{point} p50", "p99"))]
    rows = [[name, *(f"{w[point][p]:.1f}" for point in Way.POINTS for p in ("p50", "p99"))] for name, w in ways.items()]
    base = ways.get(BASE, {})
    ratios = [
        f"{name} needs " + ", ".join(f"{w[p]['p50'] / base[p]['p50']:.2f} ({p})" for p in Way.POINTS)
        for name, w in ways.items()
        if base and name != BASE
    ]
    return "\n".join([report.table(header, rows), *(f"{line} of {BASE}'s time" for line in ratios)])


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.restore", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--runs", type=int, default=50, help="of each way and size (default 50)")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="MIB", help="of the guests' RAM")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES, help="(default all)")
    args = parser.parse_args()
    kernel = microguest.build()
    results: dict[str, Any] = {}
    for size in args.sizes:
        memory = size * MIB
        base = floor.measure(memory)
        ways = measure(args.sides, memory, args.runs, kernel)
        results[f"{size}_mib"] = {"milliseconds": ways, "kvm_floor_ms": base}
        print(show(memory, ways), floor.table(memory, base), sep="\n\n", end="\n\n", flush=True)
    print(report.save("restore", {"runs": args.runs, **results}))


if __name__ == "__main__":
    main()
