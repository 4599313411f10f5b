"""Limits by cgroups (version 2) for a VM and its processes, where machine.yaml asks for them.

A VM's cgroup is a directory of PARENT, which is $MOTORCADE_CGROUP (a delegated one, for users without root), else
``motorcade`` below the root of the hierarchy. In it is one cgroup a process, since the kernel wants processes in leaves
only. The supervisor itself stays outside: what ends a VM that is out of memory must not end the one who says so.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import time
from pathlib import Path
from typing import TYPE_CHECKING

from motorcade.orchestrator.errors import UserError

if TYPE_CHECKING:
    from motorcade.orchestrator.machine import Bounds, Limits

log = logging.getLogger("motorcade.supervisor")

ROOT = Path("/sys/fs/cgroup")
KILL_SECONDS = 5.0
PERIOD = 100_000  # microseconds, of cpu.max
_FILES = {"cpu": "cpu.max", "memory": "memory.max", "pids": "pids.max"}  # by controller


def parent() -> Path:
    """Where VMs have their cgroups."""
    chosen = os.environ.get("MOTORCADE_CGROUP")
    return Path(chosen) if chosen else ROOT / "motorcade"


def missing(where: Path | None = None) -> str:
    """Why no limits can be set here; empty where they can. Makes nothing."""
    where = where or parent()
    above = where if where.is_dir() else where.parent
    if not (above / "cgroup.controllers").exists():
        hint = " (this host has version 1)" if (ROOT / "memory").is_dir() or (ROOT / "unified").is_dir() else ""
        return f"no cgroup v2 hierarchy at {above}{hint}"
    controllers = set((above / "cgroup.controllers").read_text().split())
    if lacking := sorted(_FILES.keys() - controllers):
        return f"{above} has no controller {', '.join(lacking)}"
    if not os.access(above, os.W_OK) or not os.access(above / "cgroup.subtree_control", os.W_OK):
        return f"not permitted to make cgroups in {above}; MOTORCADE_CGROUP may name one that was delegated to you"
    return ""


class Cgroup:
    """One VM's. ``close`` removes it; processes in it must have ended by then."""

    def __init__(self, name: str, limits: Limits) -> None:
        """Makes it. Errors: UserError that says what is missing."""
        self.limits = limits
        above = parent()
        if why := missing(above):
            raise UserError(f"limits: {why}")
        try:
            if above == ROOT / "motorcade":
                _enable(ROOT)
                above.mkdir(exist_ok=True)
            _enable(above)
            _remove_leftovers(above)
            self.path = above / name
            self.path.mkdir(exist_ok=True)
            _enable(self.path)
            _bound(self.path, limits)
        except OSError as e:
            raise UserError(f"limits: {e.filename or above}: {e.strerror}") from None

    def add(self, role: str, pid: int, *, sidecar: bool) -> None:
        """Puts a process into a cgroup of its own, made when missing. Errors: UserError."""
        path = self.path / role
        try:
            path.mkdir(exist_ok=True)
            if sidecar and self.limits.sidecar is not None:
                _bound(path, self.limits.sidecar)
            (path / "cgroup.procs").write_text(str(pid))
        except ProcessLookupError:
            pass  # it has ended
        except OSError as e:
            raise UserError(f"limits: {e.filename or path}: {e.strerror}") from None

    def close(self) -> None:
        """Ends what is left in it, a sidecar's children perhaps, and removes it. What the kernel does not end within
        seconds stays, for the next VM to remove."""
        try:
            (self.path / "cgroup.kill").write_text("1")
        except OSError as e:
            log.warning("%s: %s", self.path, e)  # before Linux 5.14
        with open(self.path / "cgroup.events") as events:
            poll = select.poll()
            poll.register(events, select.POLLPRI)
            end = time.monotonic() + KILL_SECONDS
            while "populated 1" in events.read() and (left := end - time.monotonic()) > 0:
                poll.poll(left * 1000)
                events.seek(0)
        _remove(self.path)


def _enable(path: Path) -> None:
    """Has the children of ``path`` have the controllers."""
    on = set((path / "cgroup.subtree_control").read_text().split())
    for controller in sorted(_FILES.keys() - on):
        (path / "cgroup.subtree_control").write_text(f"+{controller}")


def _bound(path: Path, bounds: Bounds) -> None:
    if bounds.cpu is not None:
        (path / _FILES["cpu"]).write_text(f"{max(1000, int(bounds.cpu * PERIOD))} {PERIOD}")
    if bounds.memory is not None:
        (path / _FILES["memory"]).write_text(str(int(bounds.memory)))
    if bounds.pids is not None:
        (path / _FILES["pids"]).write_text(str(bounds.pids))


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        for child in path.iterdir():
            if child.is_dir():
                child.rmdir()
        path.rmdir()


def _remove_leftovers(above: Path) -> None:
    """Of VMs whose supervisor was killed."""
    for path in above.iterdir():
        with contextlib.suppress(OSError):
            if path.is_dir() and "populated 0" in (path / "cgroup.events").read_text():
                _remove(path)
