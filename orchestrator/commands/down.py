"""vmmctl down: end a VM, politely or not."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

from motorcade.orchestrator.commands.common import find, tell
from motorcade.orchestrator.errors import EXIT_ERROR, EXIT_NOT_FOUND, EXIT_OK, EXIT_TIMEOUT, UserError

if TYPE_CHECKING:
    from motorcade.orchestrator import rundir

QUIT_TIMEOUT = 15.0  # seconds for flushing the disks, before the processes are killed

_EPILOG = """\
The power button is pressed (ACPI) and the guest shuts itself down. One that has not done so after the timeout is
ended at once, as with --force: what is on its way to the disks is flushed, but the guest's own caches are lost.

exit status: 0 the guest powered off (or --force); 1 an error; 3 no such VM, or it does not run;
4 the guest did not power off in time and was ended.
"""


def add_parser(commands: Any) -> None:
    """Adds ``down``."""
    p = commands.add_parser(
        "down",
        help="power a VM off",
        description="Power a VM off.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("name", metavar="NAME")
    p.add_argument("--force", action="store_true", help="end it at once")
    p.add_argument(
        "--timeout", type=float, default=60.0, metavar="SECONDS", help="how long the guest may take (default 60)"
    )
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """See the module."""
    vm = find(args.name)
    if not vm.alive:
        return _clear(vm)
    end = Ending(vm)
    try:
        if not args.force:
            if end.powerdown(args.timeout):
                return EXIT_OK
            tell(f"{vm.name} did not power off within {args.timeout:g} s; ending it")
        end.quit()
    finally:
        end.close()
    return EXIT_OK if args.force else EXIT_TIMEOUT


def _clear(vm: rundir.Vm) -> int:
    """Removes what a killed VM left. Errors: UserError for one that ended long ago."""
    from motorcade.orchestrator import rundir

    if (vm.path / "lock").exists():
        rundir.RunDir.acquire(vm.name).release()
        print(f"{vm.name} had been killed; its leftovers are removed")
        return EXIT_OK
    raise UserError(f"{vm.name} does not run", EXIT_NOT_FOUND)


class Ending:
    """One VM on its way to its end. Owns a pidfd of its supervisor until ``close``."""

    def __init__(self, vm: rundir.Vm) -> None:
        """Errors: UserError where the supervisor cannot be found."""
        self.vm = vm
        self.pid = vm.state.get("pid")
        if not isinstance(self.pid, int):
            raise UserError(f"{vm.name} is only just starting; try again")
        try:
            self.pidfd: int | None = os.pidfd_open(self.pid)
        except ProcessLookupError:
            self.pidfd = None  # it has just ended

    def close(self) -> None:
        """Lets go of the pidfd."""
        if self.pidfd is not None:
            os.close(self.pidfd)

    def wait(self, timeout: float, what: str = "") -> bool:
        """Whether the supervisor is gone within ``timeout`` seconds. ``what`` is shown meanwhile on a terminal."""
        if self.pidfd is None:
            return True
        shown = sys.stderr.isatty() and bool(what)
        start = time.monotonic()
        gone = False
        while not gone and (left := start + timeout - time.monotonic()) > 0:
            gone = bool(select.select([self.pidfd], [], [], min(left, 1.0))[0])
            if shown and not gone:
                print(f"\r{what} ... {time.monotonic() - start:.0f} s", end="", file=sys.stderr, flush=True)
        if shown and time.monotonic() - start > 1:
            print(file=sys.stderr)
        return gone

    def powerdown(self, timeout: float) -> bool:
        """Presses the power button. Whether the VM ended within ``timeout`` seconds. Errors: QmpError."""
        from motorcade.orchestrator.qmpclient import QmpClient

        with QmpClient(self.vm.path / "qmp.sock") as qmp:
            over = qmp.execute("query-status")["status"] in ("shutdown", "internal-error")
            # A guest that has ended hears no button: its VM is there only because its owner wished so.
            qmp.execute("quit" if over else "system_powerdown")
        return self.wait(timeout, f"waiting for {self.vm.name} to power off")

    def quit(self) -> None:
        """Ends the VM at once: asks the core; if that is of no use the supervisor; kills at last."""
        from motorcade.orchestrator.qmpclient import QmpClient, QmpError

        try:
            with QmpClient(self.vm.path / "qmp.sock", timeout=3) as qmp:
                qmp.execute("quit")
            if self.wait(QUIT_TIMEOUT, f"ending {self.vm.name}"):
                return
        except QmpError as e:
            # Not swallowed: the supervisor is asked instead, and the reason may interest a person.
            tell(f"QMP: {e}; asking the supervisor")
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.pidfd is not None:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self.pidfd, number)
            if self.wait(QUIT_TIMEOUT, f"ending {self.vm.name} ({number.name})"):
                return
        raise UserError(f"the supervisor of {self.vm.name} (pid {self.pid}) does not end", EXIT_ERROR)
