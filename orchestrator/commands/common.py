"""What the commands share: finding the VM that a person names, and telling times and sizes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TextIO

from motorcade.orchestrator.errors import EXIT_NOT_FOUND, UserError

if TYPE_CHECKING:
    from motorcade.orchestrator import rundir


def find(name: str) -> rundir.Vm:
    """The VM of that name, living or ended. Errors: UserError, with the names that there are."""
    import difflib

    from motorcade.orchestrator import rundir

    if vm := rundir.find(name):
        return vm
    names = [vm.name for vm in rundir.vms(ended=True)]
    close = difflib.get_close_matches(name, names, 1)
    hint = f"; did you mean {close[0]}?" if close else f" (there are: {', '.join(names)})" if names else ""
    raise UserError(f"no VM is called {name}{hint}", EXIT_NOT_FOUND)


def find_running(name: str) -> rundir.Vm:
    """The VM of that name, which runs. Errors: UserError."""
    vm = find(name)
    if not vm.alive:
        raise UserError(f"{name} does not run ({how_it_ended(vm)})", EXIT_NOT_FOUND)
    return vm


def how_it_ended(vm: rundir.Vm) -> str:
    """Such as ``guest-shutdown, exit status 0, 5 min ago``."""
    ended = vm.state.get("ended")
    if not isinstance(ended, dict):
        return "its supervisor was killed"
    text = f"{ended.get('reason', 'ended')}, exit status {ended.get('status', 1)}"
    if isinstance(when := ended.get("time"), int | float):
        text += f", {ago(when)} ago"
    return text


def ago(when: float) -> str:
    """How long since ``when`` (seconds since the epoch), in two letters' worth of precision."""
    import time

    seconds = max(0, int(time.time() - when))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def size(n: int) -> str:
    """Bytes as 512M or 2G where that is exact."""
    for unit, shift in (("T", 40), ("G", 30), ("M", 20), ("K", 10)):
        if n and n % (1 << shift) == 0:
            return f"{n >> shift}{unit}"
    return str(n)


def table(rows: list[list[str]], *, indent: str = "", file: TextIO | None = None) -> None:
    """Rows in aligned columns; the first is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(indent + line.rstrip(), file=file or sys.stdout)


def tell(text: str) -> None:
    """A word to the person at the terminal, apart from the output."""
    print(f"vmmctl: {text}", file=sys.stderr, flush=True)
