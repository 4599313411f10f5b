"""``python -m bench.boot``: the way from the command to Linux's first user-space line.

Debian's unmodified cloud kernel and the tests' initrd, by ``vmmctl up`` and by QEMU's microvm, alternating: the same
bzImage, initrd, command line, RAM and CPUs, and the 16550 as console. The line is the first that the initrd's
processes print (tests/guests/linux/agent.sh). Where /dev/kvm cannot boot Linux, both sides run in one private box,
whose processes are emulated: Python's start, which is instructions and small files, weighs far more there than
on hardware.

Both sides get the bzImage. vmmctl unpacks it once and keeps the result; QEMU's guest unpacks it at every boot. As a
third side QEMU gets that unpacked kernel too, which it enters by its PVH note, as vmmctl does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from bench import report, sides
from harness import images
from motorcade.orchestrator import kvmprobe, resources

ROOT = sides.REPO
# quiet: each character on an emulated serial port is an exit, and hides what is measured here.
CMDLINE = "console=ttyS0 quiet panic=-1"
FIRST_LINE = b"agent: ready on ttyS0"
SIDES = ("motorcade", "qemu", "qemu, unpacked kernel")
PARTS = ("Python, machine.yaml", "resources, forks", "core and sidecars", "kernel, initrd")


def side(name: str, memory: int, cpus: int) -> AbstractContextManager[sides.Running]:
    """Starts one."""
    kernel, initrd = images.kernel().image, images.initrd()
    if name == "motorcade":
        return sides.motorcade(kernel, CMDLINE, initrd=initrd, memory=memory, cpus=cpus)
    if name != "qemu":
        kernel = resources.unpacked_kernel(str(kernel))
    # The host's CPU, as vmmctl gives it to its guests: QEMU's default has no kvmclock-friendly TSC and no x2APIC.
    return sides.qemu(kernel, CMDLINE, initrd=initrd, memory=memory, cpus=cpus, extra=("-cpu", "host"))


def first_line(running: sides.Running) -> float:
    """Seconds from the command to the line; SystemExit where the guest ends without it."""
    assert running.process.stdout is not None
    seen = b""
    while FIRST_LINE not in seen:
        chunk = os.read(running.process.stdout.fileno(), 1 << 16)
        if not chunk:
            raise SystemExit(f"the guest ended early: {seen.decode(errors='replace')}")
        seen += chunk
    return time.monotonic() - running.started


def parts(running: sides.Running, whole: float) -> list[float]:
    """Seconds of each of PARTS of our ``whole`` start, from what the supervisor noted."""
    assert running.run_dir is not None
    vm = running.run_dir / "bench"
    began = running.started + time.time() - time.monotonic()
    lines = [json.loads(line) for line in (vm / "log" / "supervisor.log").read_text().splitlines()]
    at = {line["msg"].split(",")[0].split(" is pid")[0]: _seconds(line["ts"]) - began for line in lines}
    supervisor = json.loads((vm / "state.json").read_text())["started"] - began
    marks = [0.0, supervisor, at["core"], at["running"], whole]
    return [end - start for start, end in itertools.pairwise(marks)]


def _seconds(stamp: str) -> float:
    return datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()


def measure(runs: int, memory: int, cpus: int) -> dict[str, Any]:
    """Right here. The first run of each side only fills caches: Python's files, the unpacked kernel, QEMU's ROMs."""
    times: dict[str, list[float]] = {name: [] for name in SIDES}
    split: list[list[float]] = []
    for run in range(runs + 1):
        for name in SIDES if run else SIDES[:2]:
            with side(name, memory, cpus) as running:
                took = first_line(running)
                if run:
                    times[name].append(took)
                    if running.run_dir is not None:
                        split.append(parts(running, took))
            print(f"  {name}: {took:.2f} s{'' if run else ' (not counted)'}", file=sys.stderr, flush=True)
    columns = zip(*split, strict=True)
    return {
        "seconds": {name: report.spread(values) for name, values in times.items()},
        "parts": {name: report.spread(values) for name, values in zip(PARTS, columns, strict=True)},
    }


def measure_in_box(arguments: list[str]) -> dict[str, Any]:
    """The same, by this program in a box of its own. Errors: BoxError where there can be none."""
    from motorcade.orchestrator.box.session import carried_environment, run
    from motorcade.orchestrator.box.vm import ensure_box, stop_box

    def say(line: str) -> None:
        print(f"box: {line}", file=sys.stderr, flush=True)

    output = bytearray()
    with tempfile.TemporaryDirectory(prefix="mc-bench-") as scratch, open(os.devnull, "rb") as null:
        directory = Path(scratch) / "box"
        box = ensure_box(say, directory=directory, private=True)
        try:
            environment = carried_environment() | {"PYTHONPATH": str(ROOT)}
            command = [sys.executable, "-m", "bench.boot", "--here", *arguments]
            # Shared, not as an overlay: that would say ESTALE for a file which an editor replaces meanwhile.
            status = run(box, command, cwd=ROOT, env=environment, shares=[ROOT], stdin=null.fileno(), out=output.extend)
        finally:
            stop_box(directory)
    if status:
        raise SystemExit(f"the benchmark in the box ended with status {status}")
    results: dict[str, Any] = json.loads(output)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.boot", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--runs", type=int, default=3, help="of each side that count (default 3)")
    parser.add_argument("--memory", type=int, default=256, metavar="MIB", help="of the guest (default 256)")
    parser.add_argument("--cpus", type=int, default=1, help="of the guest (default 1)")
    parser.add_argument("--here", action="store_true", help="print JSON of a measurement right here, box or not")
    args = parser.parse_args()
    images.initrd()
    if args.here:
        json.dump(measure(args.runs, args.memory << 20, args.cpus), sys.stdout)
        return
    kvm = kvmprobe.probe()
    if kvm.boots_linux:
        place, results = "directly on /dev/kvm", measure(args.runs, args.memory << 20, args.cpus)
    else:
        place = "in the box"
        results = measure_in_box([f"--{name}={getattr(args, name)}" for name in ("runs", "memory", "cpus")])
    guest = {"memory_mib": args.memory, "cpus": args.cpus, "kernel": images.kernel().release, "cmdline": CMDLINE}
    path = report.save("boot", {"place": place, "kvm": kvm.summary, "guest": guest, **results})

    took, split = results["seconds"], results["parts"]
    ours = took["motorcade"]["median"]
    rows = [
        (n, *(f"{s[k]:.2f}" for k in ("median", "min", "max")), f"{ours / s['median']:.2f}") for n, s in took.items()
    ]
    print(f"{place} ({kvm.summary})")
    print(report.table(("command to first user-space line", "median s", "min", "max", "motorcade takes"), rows))
    print()
    print(report.table(("where motorcade's time goes", "s"), [(n, f"{s['median']:.2f}") for n, s in split.items()]))
    print(f"\n{path}")


if __name__ == "__main__":
    main()
