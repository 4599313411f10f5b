"""vmmctl sidecar restart and upgrade: another process behind a device, while its guest runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from motorcade.orchestrator.commands.common import find_running
from motorcade.orchestrator.errors import EXIT_USAGE, UserError

TIMEOUT = 150.0  # seconds: a new process to be ready, and the present one to finish what is in flight

_RESTART = """Put a new process in the place of a device's sidecar while the guest runs.

The new one is brought up first; then the present one finishes what is in flight and makes way. The guest sees a
moment's latency. A device whose sidecar has failed for good (see `vmmctl sidecar ls`) gets another; a driver in the
guest that had it in use has to reset it."""
_UPGRADE = """The same with the code that is on disk now: a new interpreter, instead of a copy of the VM's supervisor.

Code that does not start leaves the present sidecar serving, and is this command's error. The device goes on with that
code after a crash, too."""
_RESTART_EXAMPLES = """examples:
  vmmctl sidecar restart web root
"""
_UPGRADE_EXAMPLES = """examples:
  vmmctl sidecar upgrade web root                      what is installed now
  vmmctl sidecar upgrade --path ~/src/motorcade web root   a checkout (the directory that has motorcade/ in it)
"""


def add_parser(sub: Any) -> None:
    """Adds ``restart`` and ``upgrade``."""
    for name, text, examples, run in (
        ("restart", _RESTART, _RESTART_EXAMPLES, run_restart),
        ("upgrade", _UPGRADE, _UPGRADE_EXAMPLES, run_upgrade),
    ):
        p = sub.add_parser(
            name,
            help="put a new process in its place" if name == "restart" else "the same, with the code on disk",
            description=text,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        p.add_argument("name", metavar="NAME", help="the VM")
        p.add_argument("device", metavar="DEV", help="the device's id in machine.yaml")
        if name == "upgrade":
            p.add_argument("--path", metavar="DIR", default="", help="look for modules in this directory first")
        p.set_defaults(run=run)


def run_restart(args: argparse.Namespace) -> int:
    """Answers when the new one serves."""
    return _ask(args, "x-motorcade-sidecar-restart", {"id": args.device})


def run_upgrade(args: argparse.Namespace) -> int:
    """Answers when the new one serves."""
    path = args.path
    if path:
        if not Path(path).is_dir():
            raise UserError(f"--path {path}: there is no such directory", EXIT_USAGE)
        path = str(Path(path).resolve())
    return _ask(args, "x-motorcade-sidecar-upgrade", {"id": args.device, "path": path})


def _ask(args: argparse.Namespace, command: str, arguments: dict[str, str]) -> int:
    from motorcade.orchestrator.qmpclient import QmpClient

    vm = find_running(args.name)
    with QmpClient(vm.path / "qmp.sock", timeout=TIMEOUT) as qmp:
        qmp.execute(command, arguments)
    return 0
