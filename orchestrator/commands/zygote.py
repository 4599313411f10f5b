"""vmmctl zygote: the warm interpreter that VMs are forked from."""

from __future__ import annotations

import argparse
import json
from typing import Any

from motorcade.orchestrator.errors import EXIT_NOT_FOUND, EXIT_OK

_EPILOG = """\
One runs for each user, in the directory of run directories. `vmmctl clone` starts it; `vmmctl up` uses it if it runs.
VMs do not depend on it: it can be stopped, or killed, at any time. docs/zygote.md says more.

exit status: 0 it runs (start, status) or runs no more (stop); 1 an error; 3 status: it does not run.
"""


def add_parser(commands: Any) -> None:
    """Adds ``zygote``."""
    p = commands.add_parser(
        "zygote",
        help="keep warm what VMs are started from",
        description="Keep an interpreter warm, and a few VMs prepared, so that clones start in milliseconds.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = p.add_subparsers(dest="action", metavar="ACTION", required=True)
    start = actions.add_parser("start", help="start it, unless it runs")
    start.add_argument(
        "--idle", type=float, metavar="SECONDS",
        help="end it after so long without a request (default 600)",
    )  # fmt: skip
    start.add_argument(
        "--pool", type=int, metavar="N",
        help="prepared VMs of each shape that was asked for lately (default 4; 0: none)",
    )  # fmt: skip
    start.set_defaults(run=_start)
    actions.add_parser("stop", help="end it, and the VMs that it has prepared").set_defaults(run=_stop)
    status = actions.add_parser("status", help="what it does")
    status.add_argument("--json", action="store_true", help="everything, as JSON")
    status.set_defaults(run=_status)


def _start(args: argparse.Namespace) -> int:
    from motorcade.orchestrator import zygoteclient

    options = {name: value for name in ("idle", "pool") if (value := getattr(args, name)) is not None}
    with zygoteclient.start(**options) as zygote:
        print(f"the zygote runs (pid {zygote.ask({'do': 'status'})['pid']})")
    return EXIT_OK


def _stop(_args: argparse.Namespace) -> int:
    from motorcade.orchestrator import zygoteclient

    zygote = zygoteclient.find()
    if zygote is None:
        print("no zygote runs")
        return EXIT_OK
    with zygote:
        zygote.stop()
    return EXIT_OK


def _status(args: argparse.Namespace) -> int:
    from motorcade.orchestrator import zygoteclient

    zygote = zygoteclient.find()
    if zygote is None:
        print("no zygote runs")
        return EXIT_NOT_FOUND
    with zygote:
        status = zygote.ask({"do": "status"})
    if args.json:
        print(json.dumps(status, indent=1))
        return EXIT_OK
    age = "" if status["current"] else ", of code that has changed since: it will not be used"
    print(f"pid {status['pid']}, up {status['seconds']:.0f} s{age}")
    print(f"forked {status['forked']}, of which {status['running']} run")
    for shape in status["pool"]:
        sidecars = ", ".join(f"{number} {kind}" for kind, number in shape["sidecars"].items())
        print(f"{shape['ready']} of {shape['size']} prepared with {sidecars or 'no sidecars'}")
    return EXIT_OK
