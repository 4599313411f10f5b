"""vmmctl restore: a VM goes on from the file that vmmctl save wrote."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from motorcade.orchestrator.commands.common import tell

_EPILOG = """\
All of FILE is looked at before anything starts, and so are the disks that it names: they must be what they were. The
file stays, and memory is read from it while the VM runs; it may be restored again as long as the disks are not written
to. In a terminal it is like `vmmctl up`: Ctrl-] leaves the console, and the VM goes on in the background.

examples:
  vmmctl restore /saved/web
  vmmctl restore -d --name web2 /saved/web
"""


def add_parser(commands: Any) -> None:
    """Adds ``restore``."""
    p = commands.add_parser(
        "restore",
        help="start a VM from what save wrote",
        description="Start the VM that a checkpoint file has, where it was.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("file", metavar="FILE", type=Path)
    p.add_argument("-d", "--detach", action="store_true", help="return when the VM runs, leave it in the background")
    p.add_argument("--name", help="instead of the saved one:")
    p.add_argument("--paused", action="store_true", help="do not run the CPUs yet")
    p.add_argument("--same-id", action="store_true", help="the guest keeps its VM generation ID")
    p.add_argument("--accel", choices=["auto", "kvm", "box"], help="instead of the saved machine's")
    about = "the core's pid is in this file as long as the VM lives"
    p.add_argument("--pidfile", metavar="FILE", type=Path, help=about)
    p.add_argument("--report", action="store_true", help=argparse.SUPPRESS)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """See the module. Errors: UserError."""
    from motorcade.orchestrator import restore, savefile
    from motorcade.orchestrator.commands import up

    path = Path(os.path.normpath(args.file.absolute()))
    plan = savefile.read(path)
    savefile.verify(path, _Progress().show)
    savefile.check_disks(plan.disks)
    machine = restore.renamed(plan.machine, name=args.name, accel=args.accel)
    generation_id = b"" if args.same_id else os.urandom(restore.GENERATION_ID)
    return up.start(args, machine, plan.source, savefile.incoming(plan, generation_id))


class _Progress:
    """A line on a terminal, when it takes long."""

    def __init__(self) -> None:
        self._shown = False

    def show(self, done: int, total: int) -> None:
        """Bytes."""
        if sys.stderr.isatty() and done and done % (1 << 30) == 0:
            tell(f"looked at {done >> 20} of {total >> 20} MiB")
