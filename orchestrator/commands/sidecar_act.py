"""vmmctl sidecar pause, resume, inject: one device comes to rest, goes on, or fails and delays requests."""

from __future__ import annotations

import argparse
from typing import Any

from motorcade.orchestrator.commands.sidecar_common import add_target, ask, find_device
from motorcade.orchestrator.errors import EXIT_USAGE, UserError


def add_parser(sub: Any) -> None:
    """Adds ``pause``, ``resume`` and ``inject``."""
    pause = sub.add_parser(
        "pause",
        help="bring one to rest",
        description="Bring a sidecar to rest: it finishes what it has in hand, takes nothing more, and raises no "
        "interrupt. The guest waits for it. Snapshots, resets and the VM's end work as ever.",
    )
    add_target(pause)
    pause.set_defaults(run=lambda args: _tell(args, "pause"))
    resume = sub.add_parser("resume", help="let a paused one go on", description="Let a paused sidecar go on.")
    add_target(resume)
    resume.set_defaults(run=lambda args: _tell(args, "resume"))
    inject = sub.add_parser(
        "inject",
        help="fail or delay the next requests, for testing guests",
        description="Have a device's next requests fail or wait, to see what the guest makes of it. A disk answers "
        "them as if the host had failed them, and carries nothing of them out; a NIC loses frames. A second command "
        "replaces the first. Costs nothing when off.",
        epilog=_INJECT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_target(inject)
    inject.add_argument("--fail", metavar="N", type=_count, help="the next N requests fail (a NIC: N frames are lost)")
    inject.add_argument("--status", choices=["ioerr", "unsupp"], help="what a disk says then (default: ioerr)")
    inject.add_argument("--delay", metavar="MS", type=_milliseconds, help="they wait so long before anything happens")
    inject.add_argument("--count", metavar="N", type=_count, help="how many wait (default: 1; with --fail as many)")
    operations = ["read", "write", "flush", "discard", "rx", "tx"]
    inject.add_argument("--op", choices=operations, help="only these (default: any)")
    inject.add_argument("--clear", action="store_true", help="nothing any more from now on")
    inject.set_defaults(run=run_inject)


_INJECT = """\
examples:
  vmmctl sidecar inject web root --fail 1 --op write     the next write: an I/O error
  vmmctl sidecar inject web root --delay 2000 --count 10 ten requests take two seconds each
  vmmctl sidecar inject web lan --fail 50 --op rx        fifty frames never arrive
  vmmctl sidecar inject web root --clear
"""


def _count(value: str) -> int:
    count = int(value)
    if not 0 < count < 1 << 32:
        raise argparse.ArgumentTypeError("1 to 4294967295")
    return count


def _milliseconds(value: str) -> int:
    delay = int(value)
    if not 0 < delay <= 3_600_000:
        raise argparse.ArgumentTypeError("1 to 3600000 milliseconds")
    return delay


def run_inject(args: argparse.Namespace) -> int:
    """One request of the core, which the sidecar may refuse."""
    vm = find_device(args.name, args.device)
    if args.clear == bool(args.fail or args.delay):
        raise UserError("give --fail, --delay or both; or --clear", EXIT_USAGE)
    if args.fail and args.count and args.fail != args.count:
        raise UserError("--count goes with --delay alone; with --fail N it is N requests that wait, too", EXIT_USAGE)
    if args.status and not args.fail:
        raise UserError("--status is of requests that fail: give --fail N", EXIT_USAGE)
    kind = next((d.get("kind") for d in vm.state.get("devices", []) if d["id"] == args.device), "")
    arguments: dict[str, Any] = {"id": args.device, "count": 0 if args.clear else args.fail or args.count or 1}
    if args.fail:
        arguments["status"] = args.status or ("drop" if kind == "net" else "ioerr")
    if args.delay:
        arguments["delay"] = args.delay
    if args.op:
        arguments["operation"] = args.op
    ask(vm, "x-motorcade-sidecar-inject", arguments)
    return 0


def _tell(args: argparse.Namespace, what: str) -> int:
    vm = find_device(args.name, args.device)
    # A disk at rest has flushed: that may take its time.
    ask(vm, f"x-motorcade-sidecar-{what}", {"id": args.device}, timeout=40.0)
    return 0
