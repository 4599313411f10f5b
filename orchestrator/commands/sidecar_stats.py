"""vmmctl sidecar stats: what a device's queues have done, and how long it took."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

from motorcade.orchestrator.commands.common import table
from motorcade.orchestrator.commands.sidecar_common import add_target, ask, find_device
from motorcade.orchestrator.commands.sidecar_ls import memory

_WIDTH = 40  # columns of the longest bar


def add_parser(sub: Any) -> None:
    """Adds ``stats``."""
    p = sub.add_parser(
        "stats",
        help="requests, bytes, errors and latencies of one",
        description="Show what a device's queues have done since the VM started, and how long requests took, from "
        "their being taken to their being answered.",
    )
    add_target(p)
    p.add_argument("--json", action="store_true", help="for programs; with --watch one object a line")
    p.add_argument("--watch", metavar="S", type=_seconds, help="again every S seconds: what was new in them")
    p.set_defaults(run=run)


def _seconds(value: str) -> float:
    seconds = float(value)
    if not 0.05 <= seconds <= 86400:
        raise argparse.ArgumentTypeError("between 0.05 and 86400 seconds")
    return seconds


def run(args: argparse.Namespace) -> int:
    """Once, or until Ctrl-C or the VM's end."""
    import json

    vm = find_device(args.name, args.device)
    before: dict[str, Any] | None = None
    while True:
        now = ask(vm, "x-motorcade-sidecar-stats", {"id": args.device})
        shown = now if before is None else difference(now, before)
        if args.json:
            print(json.dumps(shown, indent=None if args.watch else 1), flush=True)
        else:
            show(shown, "" if before is None else f"the last {args.watch:g} s")
        if args.watch is None:
            return 0
        before = now
        sys.stdout.flush()
        try:
            time.sleep(args.watch)  # what --watch asks for
        except KeyboardInterrupt:
            return 0


def difference(now: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """What has come since; a gauge stays what it is."""
    old = {q["index"]: q for q in before["queues"]}

    def since(queue: dict[str, Any]) -> dict[str, Any]:
        past = old.get(queue["index"], {})
        result = {k: v if k in ("index", "in-flight") or isinstance(v, list) else v - past.get(k, 0)
                  for k, v in queue.items()}  # fmt: skip
        past_latency = past.get("latency") or [0] * len(queue["latency"])
        result["latency"] = [a - b for a, b in zip(queue["latency"], past_latency, strict=False)]
        return result

    detail = {k: v - before["detail"].get(k, 0) for k, v in now["detail"].items()}
    return {**now, "queues": [since(q) for q in now["queues"]], "detail": detail}


def show(stats: dict[str, Any], what: str) -> None:
    """For a person."""
    if what:
        print(f"--- {what}")
    rows = [["QUEUE", "REQUESTS", "FROM GUEST", "TO GUEST", "ERRORS", "IN FLIGHT", "KICKS", "SPARED", "INTERRUPTS",
             "SPARED", "P50", "P99"]]  # fmt: skip
    for q in stats["queues"]:
        latency = q["latency"]
        rows.append(
            [
                str(q["index"]),
                str(q["requests"]),
                memory(q["bytes-in"]),
                memory(q["bytes-out"]),
                str(q["errors"]),
                str(q["in-flight"]),
                str(q["kicks"]),
                str(q["kicks-suppressed"]),
                str(q["interrupts"]),
                str(q["suppressed"]),
                _at_most(latency, 0.5),
                _at_most(latency, 0.99),
            ]
        )
    if len(rows) > 1:
        table(rows)
    for q in stats["queues"]:
        histogram(q["index"], q["latency"])
    if counts := {k: v for k, v in stats["detail"].items() if v}:
        print("  ".join(f"{key} {value}" for key, value in counts.items()))


def percentile(latency: Sequence[int], part: float) -> int | None:
    """The bucket in which the fraction ``part`` of the requests was over; None where there was none."""
    total, seen = sum(latency), 0
    for bucket, count in enumerate(latency):
        seen += count
        if count and seen >= part * total:
            return bucket
    return None


def _at_most(latency: Sequence[int], part: float) -> str:
    bucket = percentile(latency, part)
    return "" if bucket is None else f"<{nanoseconds(2 << bucket)}"


def nanoseconds(n: int) -> str:
    """Such as 512 ns, 66 us, 1.0 ms, 2.1 s."""
    if n < 1000:
        return f"{n} ns"
    for unit, size in (("us", 1e3), ("ms", 1e6), ("s", 1e9)):
        if n < 1000 * size or unit == "s":
            return f"{n / size:.1f} {unit}" if n < 10 * size else f"{n / size:.0f} {unit}"
    raise AssertionError


def histogram(index: int, latency: Sequence[int]) -> None:
    """A bar a bucket, from the first to the last that has any."""
    found = [bucket for bucket, count in enumerate(latency) if count]
    if not found:
        return
    most = max(latency)
    print(f"latency of queue {index}, from taken to answered:")
    for bucket in range(found[0], found[-1] + 1):
        count = latency[bucket]
        low = 0 if bucket == 0 else 1 << bucket
        bar = "#" * max(1, round(_WIDTH * count / most)) if count else ""
        print(f"{nanoseconds(low):>9} to {nanoseconds(2 << bucket):>7} {count:>10} {bar}".rstrip())


