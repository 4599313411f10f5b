"""vmmctl sidecar sandbox: what a running process of a VM may do."""

from __future__ import annotations

import argparse
import itertools
from typing import Any

from motorcade.orchestrator.commands.sidecar_common import CORE, PAGER, add_target, find_device, process_of
from motorcade.orchestrator.errors import UserError


def add_parser(sub: Any) -> None:
    """Adds ``sandbox``."""
    p = sub.add_parser(
        "sandbox",
        help="what one may do, as the kernel has it",
        description="Show how a running sidecar is shut in: namespaces, capabilities, limits, cgroup and descriptors "
        "as the kernel says them now, and the system calls that its role's filter lets through, each with its reason. "
        "DEV may also be core or pager. (Landlock is on as well where the kernel has it, which it shows nobody.)",
    )
    add_target(p, core=True)
    p.add_argument("--json", action="store_true", help="for programs")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Both halves."""
    from motorcade.orchestrator import confinement

    vm = find_device(args.name, args.device, also=(CORE,))
    if vm.state.get("accel") == "box":
        raise UserError(f"{args.name} is in the box, and its processes with it: run this inside (vmmctl box --help)")
    if args.device == CORE:
        process: dict[str, Any] = next((p for p in vm.state.get("processes", []) if p.get("role") == CORE), {})
    else:
        process = process_of(vm, args.device)
    device: dict[str, Any] = next((d for d in vm.state.get("devices", []) if d["id"] == args.device), {})
    kind = device.get("kind") or (PAGER if args.device == PAGER else CORE)
    role, calls = confinement.allowed(kind, device.get("backend", ""))
    found = confinement.read(int(process["pid"]), int(vm.state["pid"]))
    if args.json:
        import json

        lines = [{"call": str(call), "why": call.why} for call in calls]
        print(json.dumps({"device": args.device, "role": role, **found, "calls": lines}, indent=1))
        return 0
    _show(found)
    print(f"\nsystem calls of role {role}; any other ends the process:")
    for why, group in itertools.groupby(calls, key=lambda call: call.why):
        print(f"  {why}")
        for line in _wrapped([str(call) for call in group]):
            print(f"      {line}")
    return 0


def _show(found: dict[str, Any]) -> None:
    own = [name for name, is_own in found["namespaces"].items() if is_own]
    shared = [name for name, is_own in found["namespaces"].items() if not is_own]
    caps = found["capabilities"]
    none = all(int(value, 16) == 0 for value in caps.values())
    rows = {
        "pid": f"{found['pid']}, {found['threads']} threads",
        "seccomp": f"{found['seccomp']['mode']} ({found['seccomp']['filters']})",
        "privileges": "no new ones" if found["no-new-privileges"] else "exec may bring new ones",
        "capabilities": "none" if none else ", ".join(f"{key} {value}" for key, value in caps.items()),
        "namespaces": f"own: {', '.join(own) or 'none'}; shared: {', '.join(shared) or 'none'}",
        "root": "empty" if not found["root"] else f"{len(found['root'])} entries: {' '.join(found['root'][:8])}",
        "limits": ", ".join(f"{key} {value}" for key, value in found["limits"].items()),
        "cgroup": ", ".join(":".join(part) for part in found["cgroup"]) or "none",
        "cgroup limits": ", ".join(f"{key} {value}" for key, value in found["cgroup-limits"].items()) or "none",
    }
    for name, value in rows.items():
        print(f"{name:15}{value}")
    print("descriptors")
    for fd, target in found["descriptors"].items():
        print(f"  {fd:>4}  {target}")


def _wrapped(words: list[str]) -> list[str]:
    """In lines of readable length; one that is long by itself has its own."""
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) > 90:
            lines.append("")
        lines[-1] += (", " if lines[-1] else "") + word
    return lines
