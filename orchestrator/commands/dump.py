"""vmmctl dump: a VM's memory as an ELF core file, for gdb, drgn and crash."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from motorcade.orchestrator.commands.common import find_running, tell
from motorcade.orchestrator.errors import EXIT_OK, UserError

_PATIENCE = 60.0  # seconds between two looks whether the VM is still there

_EPILOG = """\
The guest stands still while its memory is written, and goes on as before. FILE appears when it is whole. Pages of zeros
take no room in it.

examples:
  vmmctl dump web web.core
  drgn -c web.core -s vmlinux       or: crash vmlinux web.core, gdb vmlinux web.core
"""


def add_parser(commands: Any) -> None:
    """Adds ``dump``."""
    p = commands.add_parser(
        "dump",
        help="write a VM's memory to an ELF core file",
        description="Write a VM's memory and registers to an ELF core file, which gdb, drgn and crash open.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("name", metavar="NAME")
    p.add_argument("file", metavar="FILE", type=Path)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """See the module. Errors: UserError where there is no dump."""
    vm = find_running(args.name)
    from motorcade.orchestrator.qmpclient import QmpClient

    place = os.path.normpath(args.file.absolute())
    with QmpClient(vm.path / "qmp.sock") as qmp:
        qmp.execute("dump-guest-memory", {"protocol": f"file:{place}", "paging": False, "detach": True})
        while True:
            try:
                event = qmp.wait_event(_PATIENCE)
            except EOFError:
                raise UserError(f"{args.name} ended while it was dumped") from None
            if event is not None and event["event"] == "DUMP_COMPLETED":
                break
        if "error" in event["data"]:
            raise UserError(f"no dump of {args.name}: {event['data']['error']}")
    if sys.stderr.isatty():
        tell(f"{place}: {event['data']['result']['total'] >> 20} MiB of memory")
    return EXIT_OK
