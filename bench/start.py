"""``python -m bench.start``: the way from the command to the guest's first byte, and what the processes weigh.

The same micro-guest (tests/guests) on the same /dev/kvm, by ``vmmctl up`` and by QEMU's microvm, alternating; its
first instructions print a line. The first byte on the command's stdout ends the measurement. PSS is taken while the
guest sleeps. Where the time goes in Python is taken apart by one more run with ``-X importtime`` and by the core's
KVM parts alone.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from bench import report, sides
from harness import microguest

CMDLINE = "print=hello"


def first_byte(running: sides.Running) -> float:
    """Seconds from the command to its first byte of output, which must be the guest's."""
    assert running.process.stdout is not None
    byte = os.read(running.process.stdout.fileno(), 1)
    elapsed = time.monotonic() - running.started
    if byte != b"h":
        raise SystemExit(f"the guest did not print: {byte!r}")
    return elapsed


def pss(pids: dict[str, int]) -> dict[str, float]:
    """MiB of proportional set size of each process."""
    out = {}
    for role, pid in pids.items():
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        out[role] = sum(int(kib) for kib in re.findall(r"^Pss: +(\d+) kB", rollup, re.M)) / 1024
    return out


def imports(kernel: Path) -> dict[str, dict[str, float]]:
    """Milliseconds of importing by top-level package: vmmctl, and beside it the supervisor it forked at its start.

    Core and sidecars are forked from the supervisor with all of it there. Tracing costs about a third.
    """
    read, write = os.pipe()
    with sides.motorcade(kernel, CMDLINE, python=("-X", "importtime"), stderr=write) as running:
        os.close(write)
        first_byte(running)
    with os.fdopen(read) as pipe:
        ours = pipe.read()
    preload = "from motorcade.orchestrator import daemon; daemon.preload()"
    command = [sys.executable, "-X", "importtime", "-c", preload]
    theirs = subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True).stderr
    return {"vmmctl": by_package(ours), "supervisor": by_package(theirs)}


def by_package(trace: str) -> dict[str, float]:
    """Milliseconds in all and of the most expensive packages, from the output of ``-X importtime``."""
    spent: Counter[str] = Counter()
    for self_us, name in re.findall(r"import time: +(\d+) \| +\d+ \| +(\S+)", trace):
        parts = name.split(".")
        spent[".".join(parts[:2]) if parts[0] == "motorcade" else parts[0]] += int(self_us)
    return {"all": sum(spent.values()) / 1000, **{name: us / 1000 for name, us in spent.most_common(6)}}


def interpreter() -> float:
    """Milliseconds of an interpreter that does nothing."""
    times = []
    for _ in range(5):
        start = time.monotonic()
        subprocess.run([sys.executable, "-c", ""], check=True)
        times.append((time.monotonic() - start) * 1000)
    return report.spread(times)["median"]


def kvm_alone() -> dict[str, float]:
    """Milliseconds of each step of the core's KVM parts, in this (warm) process."""
    from harness.microvm import MicroVm

    steps: dict[str, list[float]] = {"VM, vCPU, UART": [], "load and start": [], "to the first byte": [], "end": []}
    for _ in range(5):
        marks = [time.monotonic()]
        vm = MicroVm(CMDLINE, memory=sides.MEMORY)
        marks.append(time.monotonic())
        vm.vcpus.start(vm.load())
        marks.append(time.monotonic())
        vm.vcpus.resume()
        vm.wait_for(b"h")
        marks.append(time.monotonic())
        vm.close()
        marks.append(time.monotonic())
        for name, start, end in zip(steps, marks, marks[1:], strict=False):
            steps[name].append((end - start) * 1000)
    return {name: report.spread(values)["median"] for name, values in steps.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.start", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--runs", type=int, default=7, help="of each side (default 7)")
    runs = parser.parse_args().runs
    kernel = microguest.build()
    times: dict[str, list[float]] = {name: [] for name in sides.SIDES}
    weights: dict[str, dict[str, float]] = {}
    for run in range(runs + 1):
        for name, side in sides.SIDES.items():
            with side(kernel, CMDLINE) as running:
                elapsed = first_byte(running)
                if run:  # the first run of each fills the page cache
                    times[name].append(elapsed * 1000)
                weights[name] = pss(running.pids())
    took = {name: report.spread(values) for name, values in times.items()}
    bare, imported, kvm = interpreter(), imports(kernel), kvm_alone()
    results = {"milliseconds": took, "pss_mib": weights, "interpreter_ms": bare, "imports_ms": imported, "kvm_ms": kvm}
    path = report.save("start", results)

    rows = [
        (name, *(f"{took[name][k]:.0f}" for k in ("median", "min", "max")), f"{sum(weights[name].values()):.1f}")
        for name in sides.SIDES
    ]
    print(report.table(("command to first byte", "median ms", "min", "max", "PSS MiB"), rows))
    print(f"motorcade takes {took['motorcade']['median'] / took['qemu']['median']:.2f} of QEMU's time\n")
    print(report.table(("process", "PSS MiB"), [(r, f"{v:.1f}") for w in weights.values() for r, v in w.items()]))
    print()
    parts = [("a bare interpreter", bare)]
    parts += [(f"{role} imports: {name}", v) for role, spent in imported.items() for name, v in spent.items()]
    parts += [(f"KVM: {name}", v) for name, v in kvm.items()]
    print(report.table(("where motorcade's time goes", "ms"), [(name, f"{v:.1f}") for name, v in parts]))
    print(f"\n{path}")


if __name__ == "__main__":
    main()
