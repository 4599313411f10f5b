"""vmmctl console: a terminal on one of a VM's consoles."""

from __future__ import annotations

import argparse
from typing import Any

from motorcade.orchestrator.commands.common import find_running
from motorcade.orchestrator.errors import EXIT_NOT_FOUND, UserError

_EPILOG = """\
examples:
  vmmctl console web                        the console of `vmmctl up`: its terminal, else ttyS0
  vmmctl console web hvc0                   another
  echo uptime | vmmctl console web          in a script; output goes on until the VM ends
  vmmctl console web < /dev/null | grep -m1 login:

MOTORCADE_LEAVE_KEY sets another key than Ctrl-] (^A, ~, none). exit status: 0; 3 no such VM or console.
"""


def add_parser(commands: Any) -> None:
    """Adds ``console``."""
    p = commands.add_parser(
        "console",
        help="attach to a VM's console",
        description="Attach to a console of a running VM. What it said before is shown first. Ctrl-] leaves; the VM "
        "goes on.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("name", metavar="NAME", help="a VM, as vmmctl ps shows it")
    p.add_argument("device", metavar="DEV", nargs="?", help="the console's id (default: the terminal, else ttyS0)")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Attaches until the person leaves or the VM ends."""
    import sys

    from motorcade.orchestrator.console import attach

    vm = find_running(args.name)
    consoles = [d["id"] for d in vm.state.get("devices", []) if d.get("kind") == "serial"]
    device = args.device or vm.state.get("console")
    if device is None or device not in consoles:
        there = f"it has: {', '.join(consoles)}" if consoles else "it has none"
        raise UserError(f"{args.name} has no console {device or ''}; {there}".replace(" ;", ";"), EXIT_NOT_FOUND)
    attach(str(vm.path / f"console-{device}.sock"), stdin=sys.stdin.fileno(), stdout=sys.stdout.fileno())
    return 0
