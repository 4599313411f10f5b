"""What the commands on one sidecar share: finding it, and asking its VM."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from motorcade.orchestrator.commands.common import find_running
from motorcade.orchestrator.errors import EXIT_NOT_FOUND, UserError

if TYPE_CHECKING:
    from motorcade.orchestrator import rundir

PAGER = "pager"
CORE = "core"


def add_target(parser: Any, *, core: bool = False) -> None:
    """NAME and DEV."""
    parser.add_argument("name", metavar="NAME", help="the VM")
    parser.add_argument("device", metavar="DEV", help="the device's id" + (", or core" if core else ""))


def find_device(name: str, device: str, *, also: tuple[str, ...] = ()) -> rundir.Vm:
    """The running VM, which has that device. ``also``: other words that will do. Errors: UserError."""
    vm = find_running(name)
    known = [str(d["id"]) for d in vm.state.get("devices", [])]
    known += [PAGER for p in vm.state.get("processes", []) if p.get("device") == PAGER]
    known += also
    if device not in known:
        close = difflib.get_close_matches(device, known, 1)
        hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(known) or 'none'}"
        raise UserError(f"{name} has no device {device} ({hint})", EXIT_NOT_FOUND)
    return vm


def process_of(vm: rundir.Vm, device: str) -> dict[str, Any]:
    """Of state.json. Errors: UserError where it has ended."""
    for process in vm.state.get("processes", []):
        if process.get("device") == device and isinstance(process.get("pid"), int):
            if str(process.get("state", "")).startswith(("exited", "killed")):
                raise UserError(f"the sidecar of {device} {process['state']} (vmmctl sidecar log {vm.name} {device})")
            return dict(process)
    raise UserError(f"{vm.name} has no process for {device}")


def ask(vm: rundir.Vm, command: str, arguments: dict[str, Any] | None = None, *, timeout: float = 15.0) -> Any:
    """One QMP command's answer. Errors: UserError."""
    from motorcade.orchestrator.qmpclient import QmpClient, QmpError

    with QmpClient(vm.path / "qmp.sock", timeout) as qmp:
        try:
            return qmp.execute(command, arguments)
        except QmpError as e:
            if e.error is not None:
                raise UserError(str(e.error.get("desc", e))) from None
            raise
