"""``python -m bench.console``: bytes a second through ttyS0, from a guest's OUT instructions to the command's stdout.

The micro-guest writes its 16550 as Linux's driver does with FIFOs: a look at LSR, then 16 bytes. The same guest runs
under ``vmmctl up`` and under QEMU's microvm, alternating, on the same /dev/kvm. On a KVM that emulates port
accesses one exit costs tens of microseconds and hides much of what the VMMs do: exit_us says how much.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from bench import report, sides
from harness import microguest

PATTERN = b"0123456789abcdefghijklmnopqrstuvwxyz"


def rate(running: sides.Running, total: int) -> float:
    """Bytes a second between the first and the last of ``total``; SystemExit where one is lost or wrong."""
    assert running.process.stdout is not None
    fd = running.process.stdout.fileno()
    got = bytearray(os.read(fd, 1 << 16))
    start, first = time.monotonic(), len(got)
    while len(got) < total:
        chunk = os.read(fd, 1 << 16)
        if not chunk:
            break
        got += chunk
    elapsed = time.monotonic() - start
    if bytes(got) != (PATTERN * (total // len(PATTERN) + 1))[:total]:
        raise SystemExit(f"{len(got)} of {total} bytes, or wrong ones")
    return (total - first) / elapsed


def exit_us(kernel: Path) -> float:
    """Microseconds of an exit to the C loop and back: what a look at LSR costs the guest."""
    from harness.microvm import MicroVm

    vm = MicroVm("fill=2000 print=end")
    vm.elf = kernel
    vm.vcpus.start(vm.load())
    start = time.monotonic()
    vm.vcpus.resume()
    vm.wait_for(b"end\n")
    elapsed = time.monotonic() - start
    exits: int = vm.vcpus.vcpus[0].native.stats.exits
    vm.close()
    return elapsed / exits * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.console", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="of each side (default 5)")
    parser.add_argument("--bytes", type=int, default=50_000, help="a run (default 50000)")
    args = parser.parse_args()
    kernel = microguest.build()
    rates: dict[str, list[float]] = {name: [] for name in sides.SIDES}
    for _ in range(args.runs):
        for name, side in sides.SIDES.items():
            with side(kernel, f"flood={args.bytes}") as running:
                rates[name].append(rate(running, args.bytes))
    cost = exit_us(kernel)
    spread = {name: report.spread(values) for name, values in rates.items()}
    path = report.save("console", {"bytes_per_second": spread, "bytes": args.bytes, "exit_us": cost})
    rows = [(name, *(f"{s[k] / 1000:.1f}" for k in ("median", "min", "max"))) for name, s in spread.items()]
    print(report.table(("ttyS0 to stdout", "kB/s", "min", "max"), rows))
    print(f"motorcade has {spread['motorcade']['median'] / spread['qemu']['median']:.2f} of QEMU's rate")
    print(f"an exit costs {cost:.1f} us here: {1e3 / cost / (1 + 1 / 16):.1f} kB/s if nothing else did\n{path}")


if __name__ == "__main__":
    main()
