"""vmmctl save: a whole VM into one file, and its end."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from motorcade.orchestrator.commands.common import find_running
from motorcade.orchestrator.errors import EXIT_OK

_EPILOG = """\
FILE has everything but the disks, which are named in it: the VM ends, so that they stay as they are, and `vmmctl
restore FILE` goes on from there. FILE appears when it is whole; if it cannot be written the guest goes on as before.
With --leave-running it goes on in any case, and the file is of use for as long as its disks are not written to. Ctrl-C
gives up. For copies that have their disks with them: vmmctl snapshot.

examples:
  vmmctl save web /saved/web
  vmmctl restore /saved/web
"""


def add_parser(commands: Any) -> None:
    """Adds ``save``."""
    p = commands.add_parser(
        "save",
        help="write a VM to a file, and end it",
        description="Write a running VM to one checkpoint file, and end it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("name", metavar="NAME")
    p.add_argument("file", metavar="FILE", type=Path)
    p.add_argument("--leave-running", action="store_true", help="let the VM go on")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """See the module. Errors: UserError."""
    vm = find_running(args.name)
    from motorcade.orchestrator.commands.down import Ending
    from motorcade.orchestrator.commands.snapshot import take
    from motorcade.orchestrator.qmpclient import QmpClient

    arguments = {"file": os.path.normpath(args.file.absolute()), "leave-running": args.leave_running}
    end = Ending(vm)
    try:
        with QmpClient(vm.path / "qmp.sock") as qmp:
            if status := take(qmp, args.name, "x-motorcade-save", arguments):
                return status
        if not args.leave_running:
            end.quit()
    finally:
        end.close()
    return EXIT_OK
