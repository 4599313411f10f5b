"""vmmctl top: VMs and their processes, live."""

from __future__ import annotations

import argparse
import json
import select
import shutil
import sys
import time
from typing import Any

from motorcade.orchestrator import topview
from motorcade.orchestrator.errors import UserError

_EPILOG = """\
keys: c, m, r, n sort by processor, memory, requests, name; space: now; q: leave.

CPU is of one processor, REQ/S and the bytes are of all queues of a device, P99 is how long all but one in a hundred of
the last requests took, from their being taken to their being answered.
"""


def add_parser(commands: Any) -> None:
    """Adds ``top``."""
    p = commands.add_parser(
        "top",
        help="VMs and their processes, live",
        description="Watch VMs and their device processes: what they cost, and what they do.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("names", metavar="NAME", nargs="*", help="these VMs only")
    p.add_argument("-i", "--interval", metavar="S", type=_seconds, default=1.0, help="between two looks (default: 1)")
    p.add_argument("-s", "--sort", choices=sorted(topview.SORTS), default="cpu", help="default: cpu")
    p.add_argument("--once", action="store_true", help="one look, over an interval; so it is without a terminal")
    p.add_argument("--json", action="store_true", help="for programs: an object a look, a line each")
    p.set_defaults(run=run)


def _seconds(value: str) -> float:
    seconds = float(value)
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError("between 0.1 and 3600 seconds")
    return seconds


def run(args: argparse.Namespace) -> int:
    """Until q, Ctrl-C, or, with ``--once``, at once."""
    try:
        if sys.stdout.isatty() and sys.stdin.isatty() and not args.once and not args.json:
            _interactive(args)
        else:
            _plain(args)
    except KeyboardInterrupt:
        pass
    return 0


def collect(names: list[str]) -> list[dict[str, Any]]:
    """The status of each VM that answers; of one that does not, its name and why."""
    from motorcade.orchestrator import rundir, traceclient
    from motorcade.orchestrator.commands.common import find_running

    vms = [find_running(name) for name in names] if names else [vm for vm in rundir.vms() if vm.alive]
    found = []
    for vm in vms:
        try:
            status = traceclient.status(vm.path / "watch.sock")
        except UserError as e:
            status = {"name": vm.name, "error": str(e)}
        status["at"] = time.monotonic()
        found.append(status)
    return found


def _plain(args: argparse.Namespace) -> None:
    before = collect(args.names)
    while True:
        time.sleep(args.interval)  # what -i asks for
        now = collect(args.names)
        looks = topview.compare(now, before)
        if args.json:
            print(json.dumps({"time": time.time(), "vms": looks}), flush=True)
        else:
            columns = shutil.get_terminal_size((200, 50)).columns if sys.stdout.isatty() else 1000
            print("\n".join(topview.lines(looks, args.sort, columns)), flush=True)
        if args.once or not (args.json or sys.stdout.isatty()):
            return
        before = now


def _interactive(args: argparse.Namespace) -> None:
    from motorcade.orchestrator.screen import Screen

    sort = args.sort
    before = now = collect(args.names)
    with Screen() as screen:
        due = time.monotonic() + min(0.3, args.interval)  # the first look soon: it has no past yet
        while True:
            size = shutil.get_terminal_size()
            text = topview.lines(topview.compare(now, before), sort, size.columns)
            footer = f"sorted by {sort}; c m r n: sort, q: leave"[: size.columns]
            screen.draw([*text[: max(0, size.lines - 2)], "", footer])
            ready = select.select([sys.stdin, screen.signals], [], [], max(0.0, due - time.monotonic()))[0]
            key = screen.key() if sys.stdin in ready else ""
            screen.settle()
            if key in ("q", "Q", "\x03", "\x04"):
                return
            sort = {"c": "cpu", "m": "memory", "r": "requests", "n": "name"}.get(key, sort)
            if time.monotonic() >= due or key == " ":
                before, now = now, collect(args.names)
                due = time.monotonic() + args.interval
