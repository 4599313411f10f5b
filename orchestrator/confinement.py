"""How a process of a VM is shut in: what the kernel says of it, and what its role's list lets through."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motorcade.orchestrator.errors import UserError

if TYPE_CHECKING:
    from motorcade.sidecars.sandbox.calls import Call

NAMESPACES = ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup")
LIMITS = {
    "Max open files": "files",
    "Max processes": "threads",
    "Max core file size": "core",
    "Max file size": "file-size",
    "Max locked memory": "locked-memory",
    "Max msgqueue size": "message-queues",
}
_SECCOMP = {"0": "off", "1": "strict", "2": "filter"}


def read(pid: int, outside: int) -> dict[str, Any]:
    """What the kernel says of process ``pid``; ``outside`` is one that is not shut in, to compare its namespaces with.
    Errors: UserError where it has ended or may not be looked at."""
    process = Path(f"/proc/{pid}")
    try:
        status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines() if ":\t" in line)
        return {
            "pid": pid,
            "seccomp": {"mode": _SECCOMP.get(status["Seccomp"], status["Seccomp"]),
                        "filters": int(status.get("Seccomp_filters", "0"))},
            "no-new-privileges": status["NoNewPrivs"] == "1",
            "capabilities": {key: status[name] for key, name in
                             (("effective", "CapEff"), ("permitted", "CapPrm"), ("bounding", "CapBnd"))},
            "namespaces": {name: _own(process, outside, name) for name in NAMESPACES},
            "root": sorted(entry.name for entry in (process / "root").iterdir()),
            "limits": _limits((process / "limits").read_text()),
            "cgroup": [line.split(":", 2)[1:] for line in (process / "cgroup").read_text().splitlines()],
            "cgroup-limits": _cgroup_limits((process / "cgroup").read_text()),
            "threads": int(status["Threads"]),
            "descriptors": _descriptors(process),
        }  # fmt: skip
    except FileNotFoundError:
        raise UserError(f"process {pid} has ended") from None
    except PermissionError as e:
        raise UserError(f"process {pid}: {e.strerror} (only who started the VM may look at it)") from None


def _own(process: Path, outside: int, name: str) -> bool:
    return (process / "ns" / name).readlink() != Path(f"/proc/{outside}/ns/{name}").readlink()


def _limits(text: str) -> dict[str, str]:
    """The hard ones; columns are fixed (fs/proc/base.c)."""
    rows = {line[:26].strip(): line[47:68].strip() for line in text.splitlines()[1:]}
    return {key: rows[name] for name, key in LIMITS.items() if name in rows}


def _cgroup_limits(text: str) -> dict[str, str]:
    """Of the process's own cgroup (version 2)."""
    path = next((line[3:] for line in text.splitlines() if line.startswith("0::")), None)
    found = {}
    for name in ("cpu.max", "memory.max", "pids.max"):
        with contextlib.suppress(OSError):
            found[name] = Path(f"/sys/fs/cgroup{path}/{name}").read_text().strip()
    return found


def _descriptors(process: Path) -> dict[int, str]:
    found = {}
    for entry in sorted((process / "fd").iterdir(), key=lambda e: int(e.name)):
        with contextlib.suppress(FileNotFoundError):
            found[int(entry.name)] = os.fsdecode(entry.readlink())
    return found


def allowed(kind: str, backend: str) -> tuple[str, tuple[Call, ...]]:
    """The role of a device's sidecar, of the pager or of the core, and its list. Errors: UserError."""
    from motorcade.sidecars.sandbox.roles import ROLES

    if kind == "net" and backend.startswith("link"):
        return "net-link", ROLES["net-link"]
    if kind in ROLES:
        return kind, ROLES[kind]
    from motorcade.sidecars import kinds

    try:
        return "kit", (*ROLES["kit"], *kinds.find(kind).system_calls)
    except kinds.UnknownKind as e:
        raise UserError(str(e)) from None
