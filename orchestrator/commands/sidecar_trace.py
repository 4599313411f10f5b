"""vmmctl sidecar trace: control messages and events of the data path, as they happen, or as a file for Perfetto."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from motorcade.orchestrator.commands.common import tell
from motorcade.orchestrator.commands.sidecar_common import CORE, PAGER, add_target, find_device

if TYPE_CHECKING:
    from motorcade.orchestrator import rundir
    from motorcade.orchestrator.perfetto import Writer
    from motorcade.orchestrator.traceclient import Item, Trace

_EPILOG = """\
events: take (a request was taken from the avail ring), push (and answered), kick (the guest notified), interrupt (and
was interrupted), submit and complete (work for the host), error. Control messages: -> to the sidecar, <- from it.

examples:
  vmmctl sidecar trace web root                       as it happens, until Ctrl-C
  vmmctl sidecar trace web core                       the control messages of all its sidecars
  vmmctl sidecar trace web root --seconds 5 --perfetto root.json     then open root.json in ui.perfetto.dev
  vmmctl sidecar trace web root --events push,error
"""


def add_parser(sub: Any) -> None:
    """Adds ``trace``."""
    p = sub.add_parser(
        "trace",
        help="what it does, as it happens",
        description="Show a sidecar's control messages and what its queues do, as it happens. Events that came faster "
        "than they could be read are counted. Nothing is recorded, and nothing costs, when nobody looks.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_target(p, core=True)
    p.add_argument("--seconds", metavar="N", type=_seconds, help="for so long (default: until Ctrl-C)")
    p.add_argument("--perfetto", metavar="FILE", help="write a trace that ui.perfetto.dev opens, and show nothing")
    p.add_argument("--json", action="store_true", help="for programs: an object a line")
    p.add_argument("--events", metavar="LIST", type=_kinds, help="only these, with commas between; none: no events")
    p.add_argument("--no-control", action="store_true", help="no control messages")
    p.set_defaults(run=run)


def _seconds(value: str) -> float:
    seconds = float(value)
    if not 0 < seconds <= 1e6:
        raise argparse.ArgumentTypeError("more than 0 and at most a million seconds")
    return seconds


def _kinds(value: str) -> int:
    from motorcade.proto.watch import Kind

    bits = 0
    for word in value.split(","):
        if word == "none":
            continue
        try:
            bits |= 1 << Kind[word.strip().upper()]
        except KeyError:
            names = ", ".join(kind.name.lower() for kind in Kind)
            raise argparse.ArgumentTypeError(f"there is no event {word.strip()!r} (there are: {names})") from None
    return bits


def run(args: argparse.Namespace) -> int:
    """Until the time is up, Ctrl-C, or the VM's end; 0 in each case."""
    from motorcade.proto.watch import ALL_KINDS

    vm = find_device(args.name, args.device, also=(CORE,))
    devices = [] if args.device in (CORE, PAGER) else [args.device]
    kinds = ALL_KINDS if args.events is None else args.events
    with contextlib.suppress(KeyboardInterrupt), _trace(vm, args, devices, kinds) as trace:
        until = None if args.seconds is None else time.monotonic() + args.seconds
        with contextlib.suppress(KeyboardInterrupt):  # wherever it comes, the file is completed and losses are told
            if args.perfetto:
                _write_file(vm, args, trace, until)
            else:
                _show(args, trace, until)
        if trace.lost:
            tell(f"{trace.lost} events came faster than they were read, and are missing")
    return 0


def _trace(vm: rundir.Vm, args: argparse.Namespace, devices: list[str], kinds: int) -> Trace:
    from motorcade.orchestrator.traceclient import Trace

    return Trace(vm.path / "watch.sock", devices, kinds=kinds, control=not args.no_control)


def _items(args: argparse.Namespace, trace: Trace, until: float | None) -> Any:
    """What is to be shown; ends when the time is up, or with the VM."""
    from motorcade.proto.tap import Said

    try:
        for item in trace.read(until):
            if isinstance(item, Said) and args.device not in (CORE, item.device):
                continue
            yield item
    except EOFError:
        tell(f"{args.name} is over")


def _show(args: argparse.Namespace, trace: Trace, until: float | None) -> None:
    for item in _items(args, trace, until):
        line = json.dumps(plain(item)) if args.json else text(item, trace.start)
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def _write_file(vm: rundir.Vm, args: argparse.Namespace, trace: Trace, until: float | None) -> None:
    from motorcade.orchestrator.perfetto import Writer

    processes = {
        p.get("device") or str(p["role"]): (str(p["role"]), int(p["pid"]))
        for p in vm.state.get("processes", [])
        if isinstance(p.get("pid"), int)
    }
    with open(args.perfetto, "w", encoding="utf-8") as file:
        writer = Writer(file, args.name, trace.start, processes)
        count = _fill(writer, args, trace, until)
    tell(f"{args.perfetto}: {count} events; open it in https://ui.perfetto.dev")


def _fill(writer: Writer, args: argparse.Namespace, trace: Trace, until: float | None) -> int:
    count = 0
    try:
        for item in _items(args, trace, until):
            writer.add(item)
            count += 1
    finally:
        writer.close()
    return count


def plain(item: Item) -> dict[str, Any]:
    """For programs; ``ns`` is CLOCK_MONOTONIC."""
    from motorcade.orchestrator.traceclient import Happened, Lost, Note

    if isinstance(item, Happened):
        e = item.event
        return {"device": item.device, "event": event_name(e.kind), "ns": e.ns, "queue": e.queue, "head": e.head,
                "length": e.length, "arg": e.arg}  # fmt: skip
    if isinstance(item, Lost):
        return {"device": item.device, "lost": item.count}
    if isinstance(item, Note):
        return {"device": item.device, "ns": item.ns, "note": item.text}
    return {"device": item.device, "ns": item.ns, "to_sidecar": item.to_sidecar, "id": item.id, "message": item.type,
            "body": item.body}  # fmt: skip


def event_name(kind: int) -> str:
    """A sidecar may write any number."""
    from motorcade.proto.watch import Kind

    return Kind(kind).name.lower() if kind < len(Kind) else f"event {kind}"


def text(item: Item, start: int) -> str:
    """A line for a person: seconds since ``start``, whose, what."""
    from motorcade.orchestrator.traceclient import Happened, Lost, Note
    from motorcade.proto.watch import NO_QUEUE

    if isinstance(item, Lost):
        return f"{'':>12} {item.device:<10} {item.count} events are missing here"
    if isinstance(item, Happened):
        e = item.event
        queue = "" if e.queue == NO_QUEUE else f"queue {e.queue}"
        return f"{_when(e.ns, start)} {item.device:<10} {queue:<8} {event_name(e.kind):<9} {_detail(e)}".rstrip()
    if isinstance(item, Note):
        return f"{_when(item.ns, start)} {item.device:<10} {item.text}"
    arrow = "->" if item.to_sidecar else "<-"
    body = json.dumps(item.body) if item.body else ""
    number = f"#{item.id}" if item.id else ""
    return f"{_when(item.ns, start)} {item.device:<10} {arrow} {item.type} {number} {body}".rstrip()


def _when(ns: int, start: int) -> str:
    return f"{(ns - start) / 1e9:12.6f}"


def _detail(e: Any) -> str:
    """What watch.h says of each kind."""
    from motorcade.orchestrator.commands.sidecar_stats import nanoseconds
    from motorcade.proto.watch import NO_QUEUE, Kind

    head = f"head {e.head:<4}" if e.queue != NO_QUEUE else "flush"
    if e.kind == Kind.TAKE:
        return f"{head} {e.length} bytes from the guest, room for {e.arg}"
    if e.kind == Kind.PUSH:
        took = f" after {nanoseconds(e.arg)}" if e.arg else ""
        return f"{head} {e.length} bytes to the guest{took}"
    if e.kind == Kind.SUBMIT:
        return f"{head} {e.length} bytes at {e.arg}"
    if e.kind == Kind.COMPLETE:
        return f"{head} result {e.arg}"
    if e.kind == Kind.INTERRUPT:
        return f"used index {e.arg}"
    if e.kind == Kind.ERROR:
        if e.head == 0xFFFF:
            return f"the queue is broken ({e.arg})"
        return f"{head} answered with status {e.length}, errno {e.arg}"
    return "" if e.kind == Kind.KICK else f"{head} length {e.length} arg {e.arg}"
