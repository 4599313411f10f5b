"""vmmctl snapshot: freeze a VM into a template."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motorcade.orchestrator.commands.common import find_running, tell
from motorcade.orchestrator.errors import EXIT_OK, UserError

if TYPE_CHECKING:
    from motorcade.orchestrator import rundir
    from motorcade.orchestrator.qmpclient import QmpClient

_POLL = 0.2  # seconds between two looks while nothing is announced
_SHOW = 1.0  # seconds after which progress is shown
_OVER = {"completed", "failed", "cancelled"}

_EPILOG = """\
The guest stands still while its memory is written, and goes on as before; one that was stopped stays stopped. With
--live it goes on while its memory is written, and stands still only for a moment. DIR appears when it is whole; it must
not exist, or be empty. Ctrl-C gives up: the guest goes on, nothing is left.

examples:
  vmmctl snapshot web /templates/web
  vmmctl snapshot web /templates/web-2 --live --base /templates/web    write only what has changed
  vmmctl clone /templates/web -n 10                                    ten VMs from it
"""


def add_parser(commands: Any) -> None:
    """Adds ``snapshot``."""
    p = commands.add_parser(
        "snapshot",
        help="freeze a VM into a template",
        description="Write a running VM's memory, devices and disks to a template, and let it go on.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("name", metavar="NAME")
    p.add_argument("dir", metavar="DIR", type=Path)
    p.add_argument("--live", action="store_true", help="let the guest run while its memory is written")
    p.add_argument("--base", metavar="DIR", type=Path, help="write only what differs from this template")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """See the module."""
    vm = find_running(args.name)
    arguments: dict[str, Any] = {"dir": os.path.normpath(args.dir.absolute())}
    if args.live:
        arguments["live"] = True
    if args.base is not None:
        arguments["base"] = os.path.normpath(args.base.absolute())
    if vm.state.get("accel") == "box":
        _check_shared(vm, args.dir.absolute().parent.resolve())
    from motorcade.orchestrator.qmpclient import QmpClient

    with QmpClient(vm.path / "qmp.sock") as qmp:
        return take(qmp, args.name, "x-motorcade-snapshot", arguments)


def _check_shared(vm: rundir.Vm, folder: Path) -> None:
    """A VM in the box writes to the folders of its files for real, and to the rest of what it sees for nobody."""
    shares = [Path(share) for share in vm.state.get("shares", [])]
    if not any(share.is_dir() and folder.is_relative_to(share) for share in shares):
        there = ", ".join(str(share) for share in shares if share.is_dir()) or "none"
        raise UserError(f"{vm.name} runs in the box, which cannot write to {folder}; folders that it can: {there}")


def take(qmp: QmpClient, name: str, command: str, arguments: dict[str, Any]) -> int:
    """Has it taken by a command that answers at once, and waits until it is over. Ctrl-C, whenever it comes, ends it.

    Errors: UserError where there is no snapshot.
    """
    interrupted = _Interrupts()
    qmp.execute(command, arguments)
    progress = _Progress()
    asked = False
    while True:
        state = qmp.execute("query-migrate")
        if state["status"] in _OVER:
            break
        if interrupted.count and not asked:
            asked = True
            qmp.execute("migrate_cancel")
        progress.show(state)
        try:
            qmp.wait_event(_POLL)  # a MIGRATION, mostly; its news is asked for in every case
        except EOFError:
            raise UserError(f"{name} ended while it was frozen") from None
    progress.end()
    if state["status"] == "cancelled":
        tell("given up; nothing is left of it")
        return 128 + signal.SIGINT if interrupted.count else 1
    if state["status"] == "failed":
        raise UserError(f"no snapshot of {name}: {state.get('error-desc', 'no reason was given')}")
    if sys.stderr.isatty():
        tell(
            f"frozen in {state.get('total-time', 0) / 1000:.1f} s; {name} stood still for {state.get('downtime', 0)} ms"
        )
    return EXIT_OK


class _Interrupts:
    """Counts SIGINTs from now on, instead of ending the program."""

    def __init__(self) -> None:
        self.count = 0
        signal.signal(signal.SIGINT, self._on)

    def _on(self, *_: object) -> None:
        self.count += 1


class _Progress:
    """One line on a terminal's stderr, when it takes long."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.shown = False

    def show(self, state: dict[str, Any]) -> None:
        """What query-migrate says."""
        if time.monotonic() - self.start < _SHOW:
            return
        ram = state.get("ram", {})
        total, left = ram.get("total", 0), ram.get("remaining", 0)
        text = f"{(total - left) >> 20} of {total >> 20} MiB" if total else state["status"]
        if sys.stderr.isatty():
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        elif not self.shown:
            tell(f"{text} ...")
        self.shown = True

    def end(self) -> None:
        """Clears the line."""
        if self.shown and sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
