"""vmmctl logs: what a VM's processes have to say."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from typing import Any

from motorcade.orchestrator.commands.common import find
from motorcade.orchestrator.errors import EXIT_NOT_FOUND, UserError

_EPILOG = """\
ROLE is supervisor, core, or KIND-ID of a sidecar such as blk-root; of a VM that logs to one file (vmmctl run -D) there
is vm alone. Lines are JSON objects: time (UTC), level, role, message.

examples:
  vmmctl logs web                  all of them, also after its end
  vmmctl logs web core -f          what the core says, until the VM ends
"""


def add_parser(commands: Any) -> None:
    """Adds ``logs``."""
    p = commands.add_parser(
        "logs",
        help="show a VM's logs",
        description="Show the logs of a VM's processes, also after it has ended. The guest's own words are on its "
        "console, not here.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("name", metavar="NAME", help="a VM, as vmmctl ps shows it, also one that has ended")
    p.add_argument("role", metavar="ROLE", nargs="?", help="of one process only")
    p.add_argument("-f", "--follow", action="store_true", help="go on until the VM ends")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints each log under its role; following is tail(1)'s business."""
    vm = find(args.name)
    logs = sorted((vm.path / "log").glob("*.log"))
    if args.role:
        chosen = [path for path in logs if path.stem == args.role]
        if not chosen:
            roles = ", ".join(path.stem for path in logs) or "none"
            raise UserError(f"{args.name} has no log of {args.role} (there are: {roles})", EXIT_NOT_FOUND)
        logs = chosen
    if not logs:
        return 0
    if args.follow and vm.alive:
        sys.stdout.flush()
        # By name: the file is renamed when the VM ends, and its last lines are read through the open descriptor.
        os.execvp("tail", ["tail", "-n", "+1", "-f", f"--pid={vm.state.get('pid', os.getpid())}", *map(str, logs)])
    for i, path in enumerate(logs):
        if len(logs) > 1:
            sys.stdout.write(f"{chr(10) if i else ''}==> {path.stem} <==\n")
            sys.stdout.flush()
        with path.open("rb") as f:
            shutil.copyfileobj(f, sys.stdout.buffer)
        sys.stdout.buffer.flush()
    return 0
