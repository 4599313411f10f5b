"""``python -m bench.snapshot``: how long a snapshot stops its guest, and how long it takes in all.

A guest of 512 MiB and of 2 GiB with real content writes to its memory at a stated rate meanwhile, and beats on its
console once a millisecond: the longest time between two beats is the pause as seen from outside, alike for both sides
(and beside it the longest that was seen without a snapshot, which is the host's doing).
"stopped" takes everything while the guest stands; "live" lets it run as far as it can be. QEMU's side is ``migrate``
to ``exec:cat>FILE`` with unlimited bandwidth, after a ``stop`` or not; and then ``cont``. Files are on tmpfs: a disk's
speed is not what is compared.
"""

from __future__ import annotations

import argparse
import contextlib
import select
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from bench import frozen, frozen_ours, frozen_qemu, report
from bench.frozen import MIB, PAGE, Console
from harness import microguest

SIZES = (512, 2048)  # MiB
DIRTY = 20  # pages a beat
MODES = ("stopped", "live")


class Beats:
    """Reads a console on a thread of its own, and knows the longest silence since ``watch``."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._end = False
        self._lock = threading.Lock()
        self.watch()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def watch(self) -> None:
        """Forgets what was."""
        with self._lock:
            self.count, self.silence, self._since = 0, 0.0, time.monotonic()
            self._last = self._since

    def _run(self) -> None:
        while not self._end:
            if not select.select([self._console.fd], [], [], 0.05)[0]:
                continue
            data = self._console.read()
            now = time.monotonic()
            with self._lock:
                self.count += data.count(b".")
                self.silence, self._last = max(self.silence, now - self._last), now

    def rate(self) -> float:
        """Beats a second since ``watch``."""
        with self._lock:
            return self.count / (time.monotonic() - self._since)

    def close(self) -> None:
        """Leaves the console to its owner."""
        self._end = True
        self._thread.join()


@dataclass(frozen=True)
class Subject:
    """A running guest, and how to take a snapshot of it. The second argument names what is made; the result is the
    guest's pause in seconds as the VMM tells it."""

    console: Console
    take: Callable[[str, str], float]
    discard: Callable[[str], None]


@contextlib.contextmanager
def qemu(memory: int, kernel: Path, line: str) -> Iterator[Subject]:
    """QEMU's ``migrate``."""
    with frozen.scratch() as folder:
        files = frozen_qemu.prepare(folder, memory, kernel)
        with frozen_qemu.machine(files, shared=True, own=True, line=line) as m:
            m.console.until(rb"ram [0-9a-f]+\n")
            m.monitor.hello()
            m.monitor.run("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
            m.monitor.run("migrate-set-parameters", **{"max-bandwidth": 1 << 40})

            def take(mode: str, name: str) -> float:
                if mode == "stopped":
                    m.monitor.run("stop")
                    started = time.monotonic()
                    m.monitor.migrated("migrate", uri=f"exec:cat>{folder / name}")
                    m.monitor.go_on()
                    return time.monotonic() - started
                m.monitor.migrated("migrate", uri=f"exec:cat>{folder / name}")
                pause: float = m.monitor.run("query-migrate")["downtime"] / 1000
                m.monitor.go_on()
                return pause

            yield Subject(m.console, take, lambda name: (folder / name).unlink())


@contextlib.contextmanager
def motorcade(memory: int, kernel: Path, line: str) -> Iterator[Subject]:
    """Ours, by QMP as ``vmmctl snapshot`` does it."""
    with (
        frozen.scratch() as folder,
        frozen_ours.Host() as host,
        host.source(folder, memory, kernel, line) as console,
        host.monitor("source") as monitor,
    ):

        def take(mode: str, name: str) -> float:
            monitor.migrated("x-motorcade-snapshot", dir=str(folder / name), live=mode == "live")
            pause: float = monitor.run("query-migrate")["downtime"] / 1000
            return pause

        yield Subject(console, take, lambda name: shutil.rmtree(folder / name))


SIDES = {"qemu": qemu, "motorcade": motorcade}


def measure(subject: Subject, runs: int) -> dict[str, dict[str, dict[str, float]]]:
    """Per mode: milliseconds in all, the longest silence then and before, the pause as told; MiB/s of dirt."""
    beats = Beats(subject.console)
    seen: dict[str, dict[str, list[float]]] = {mode: {} for mode in MODES}
    try:
        for run in range(runs + 1):
            for mode in MODES:
                beats.watch()
                time.sleep(0.2)  # what the guest does undisturbed
                rate, before = beats.rate(), beats.silence
                beats.watch()
                started = time.monotonic()
                told = subject.take(mode, f"{mode}{run}")
                total = time.monotonic() - started
                time.sleep(0.05)  # the beats that were under way
                subject.discard(f"{mode}{run}")
                values = {
                    "total": total * 1e3,
                    "silence": beats.silence * 1e3,
                    "before": before * 1e3,
                    "told": told * 1e3,
                    "dirty MiB/s": rate * DIRTY * PAGE / MIB,
                }
                if run:  # the first of each fills caches
                    for what, value in values.items():
                        seen[mode].setdefault(what, []).append(value)
    finally:
        beats.close()
    return {mode: {what: report.percentiles(v) for what, v in values.items()} for mode, values in seen.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.snapshot", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--runs", type=int, default=10, help="of each side, size and mode (default 10)")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="MIB", help="of the guests' RAM")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES, help="(default all)")
    args = parser.parse_args()
    kernel = microguest.build()
    beat = int(frozen.host_tsc_hz() / 1000)
    results: dict[str, Any] = {}
    for size in args.sizes:
        line = frozen.cmdline(size * MIB, beat, DIRTY)
        rows = []
        of_size: dict[str, Any] = {}
        for name in args.sides:
            with SIDES[name](size * MIB, kernel, line) as subject:
                of_size[name] = measure(subject, args.runs)
            for mode, m in of_size[name].items():
                cells = [f"{m[what][p]:.1f}" for what in ("silence", "told", "total") for p in ("p50", "max")]
                rows.append(
                    [
                        f"{name}, {mode}",
                        *cells,
                        f"{m['before']['p50']:.1f}",
                        f"{m['dirty MiB/s']['p50']:.0f}",
                    ]
                )
        columns = (
            "pause seen p50",
            "max",
            "pause told p50",
            "max",
            "total p50",
            "max",
            "silence before",
            "MiB/s dirty",
        )
        header = [f"{size} MiB, ms", *columns]
        print(report.table(header, rows))
        if len(of_size) == len(SIDES):
            for mode in MODES:
                ours, theirs = (of_size[side][mode] for side in ("motorcade", "qemu"))
                ratios = [
                    f"{ours[w]['p50'] / theirs[w]['p50']:.2f} of the {n}"
                    for w, n in (("silence", "pause"), ("total", "total"))
                ]
                print(f"{mode}: motorcade has {' and '.join(ratios)} of QEMU")
        print(flush=True)
        results[f"{size}_mib"] = of_size
    print(report.save("snapshot", {"runs": args.runs, "milliseconds": results}))


if __name__ == "__main__":
    main()
