"""``python -m bench.clones``: 100 clones of one template at once.

Wall time from the request until each is restored, and until each has answered on its console (its guest sleeps
otherwise); memory a clone over all its processes, beyond the guest's own pages; and what each first touch of a page
costs a guest, in one clone that has the host for itself. QEMU's side in the same run: 100 processes started at once,
with ``x-ignore-shared`` and RAM mapped privately from the template's file.

Shared pages count once: PSS over all processes, with the zygote's. "host" is by how much MemAvailable fell, a clone:
the kernel's own structures, page tables and the guests' pages are part of it.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import select
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from bench import frozen, frozen_ours, frozen_qemu, report, weigh
from bench.frozen import MIB, Console
from harness import microguest

TOUCHES = 2000


@dataclass(frozen=True)
class Crowd:
    """Clones that are restored and run. ``family``: their processes, and those that they share pages with."""

    consoles: Sequence[Console]
    family: Sequence[int]
    guest: str  # in the names of their mappings of guest memory
    restored: float  # time.monotonic()


@dataclass(frozen=True)
class Side:
    """A way to have clones; each call is a context manager."""

    crowd: Callable[[int], contextlib.AbstractContextManager[Crowd]]
    touching: dict[str, Callable[[], contextlib.AbstractContextManager[Console]]]
    """One clone, by what is different about its first touches."""


@contextlib.contextmanager
def qemu(memory: int, kernel: Path) -> Iterator[Side]:
    """QEMU with ``x-ignore-shared``."""
    with frozen.scratch() as folder:
        template = frozen_qemu.freeze(folder, memory, kernel, asleep=True)

        @contextlib.contextmanager
        def crowd(n: int) -> Iterator[Crowd]:
            with contextlib.ExitStack() as stack:
                herd = [stack.enter_context(frozen_qemu.machine(template, "-incoming", "defer")) for _ in range(n)]
                for m in herd:  # each answers when it has started; the next one starts meanwhile
                    m.monitor.hello()
                    m.monitor.capabilities()
                    m.monitor.run("migrate-incoming", uri=template.by_exec)
                for m in herd:
                    m.monitor.completed("migrate-incoming")
                pids = [m.process.pid for m in herd]
                yield Crowd([m.console for m in herd], pids, f"{folder}/memory", time.monotonic())

        @contextlib.contextmanager
        def one() -> Iterator[Console]:
            with crowd(1) as c:
                yield c.consoles[0]

        yield Side(crowd, {"": one})


@contextlib.contextmanager
def motorcade(memory: int, kernel: Path) -> Iterator[Side]:
    """Ours: a zygote with its usual pool. The working set is that of a clone that made all the touches."""
    with frozen.scratch() as folder, frozen_ours.Host() as host:
        template = frozen_ours.freeze(host, folder, memory, kernel, asleep=True)
        host.start_zygote()
        template.learn()

        @contextlib.contextmanager
        def crowd(n: int) -> Iterator[Crowd]:
            with contextlib.ExitStack() as stack:
                clones = [stack.enter_context(frozen_ours.ended(template.request())) for _ in range(n)]
                for clone in clones:
                    clone.hear("running")
                family = [pid for clone in clones for pid in clone.pids()]
                consoles = [clone.joined for clone in clones]
                yield Crowd(consoles, [*family, frozen_ours.zygote_pid()], frozen_ours.GUEST, time.monotonic())

        @contextlib.contextmanager
        def one() -> Iterator[Console]:
            with crowd(1) as c:
                yield c.consoles[0]

        @contextlib.contextmanager
        def unrecorded() -> Iterator[Console]:
            template.forget_working_set()
            with one() as console:
                yield console

        @contextlib.contextmanager
        def recorded() -> Iterator[Console]:
            template.record_working_set(touch)
            with one() as console:
                yield console

        yield Side(crowd, {"": unrecorded, ", working set": recorded})


SIDES = {"qemu": qemu, "motorcade": motorcade}


def answered(consoles: Sequence[Console]) -> None:
    """Until each has answered the '?' that it was sent."""
    waiting = {console.fd: console for console in consoles}
    end = time.monotonic() + frozen.DEADLINE
    while waiting:
        ready = select.select(list(waiting), [], [], max(0.0, end - time.monotonic()))[0]
        if not ready:
            raise SystemExit(f"{len(waiting)} clones have not answered")
        for fd in ready:
            console = waiting[fd]
            console.seen += console.read()
            if re.search(rb"pong [0-9a-f]+\n", console.seen):  # what it said before it was frozen may come first
                del waiting[fd]


def together(side: Side, n: int) -> dict[str, float]:
    """Starts ``n`` clones; seconds, and bytes a clone."""
    before = weigh.available()
    started = time.monotonic()
    with side.crowd(n) as crowd:
        for console in crowd.consoles:
            console.ask(b"?")
        answered(crowd.consoles)
        all_answered = time.monotonic() - started
        fell = before - weigh.available()
        weight = weigh.weigh(crowd.family, crowd.guest)
    return {
        "restored_s": crowd.restored - started,
        "answered_s": all_answered,
        "pss": weight.pss / n,
        "guest": weight.guest / n,
        "host": fell / n,
    }


def touch(console: Console) -> dict[str, list[int]]:
    """TSC ticks of each first touch: some pages are read, and others written."""
    # Those that are read are the first so-many of the order; the writes go on from there.
    return {"read": console.touch(b"r", TOUCHES), "write": console.touch(b"w", 2 * TOUCHES)[TOUCHES:]}


def touches(side: Side) -> dict[str, dict[str, dict[str, float]]]:
    """Microseconds of first touches."""
    out = {}
    for name, one in side.touching.items():
        with one() as console:
            hertz = console.tsc_hz()
            ticks = touch(console)
            console.check()
        out[name] = {how: report.percentiles([t / hertz * 1e6 for t in all_]) for how, all_ in ticks.items()}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.clones", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("-n", type=int, default=100, help="clones (default 100)")
    parser.add_argument("--size", type=int, default=128, metavar="MIB", help="of a guest's RAM (default 128)")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES, help="(default all)")
    args = parser.parse_args()
    kernel = microguest.build()
    crowds: dict[str, dict[str, float]] = {}
    tails: dict[str, dict[str, dict[str, float]]] = {}
    for name in args.sides:
        with SIDES[name](args.size * MIB, kernel) as side:
            crowds[name] = together(side, args.n)
            tails |= {name + suffix: tail for suffix, tail in touches(side).items()}
    results: dict[str, Any] = {"n": args.n, "memory": args.size * MIB, "clones": crowds, "first_touch_us": tails}
    rows = [
        (
            name,
            f"{c['restored_s']:.2f}",
            f"{c['answered_s']:.2f}",
            *(f"{c[k] / MIB:.1f}" for k in ("pss", "guest", "host")),
        )
        for name, c in crowds.items()
    ]
    header = (f"{args.n} clones of {args.size} MiB", "restored s", "answered s", "PSS MiB each", "guest", "host")
    print(report.table(header, rows))
    if len(crowds) == len(SIDES):
        ratio = crowds["motorcade"]["answered_s"] / crowds["qemu"]["answered_s"]
        print(f"motorcade needs {ratio:.2f} of QEMU's time")
    print()
    tail_rows = [
        (f"{name}: {how}", *(f"{v[p]:.1f}" for p in ("p50", "p99", "max")))
        for name, t in tails.items()
        for how, v in t.items()
    ]
    print(report.table(("first touch of a page, us", "p50", "p99", "max"), tail_rows))
    print(f"\n{report.save('clones', results)}")


if __name__ == "__main__":
    main()
