"""vmmctl sidecar: the device processes of a VM."""

from __future__ import annotations

import argparse
from typing import Any

from motorcade.orchestrator.commands import sidecar_new
from motorcade.orchestrator.commands.common import find_running, table


def add_parser(commands: Any) -> None:
    """Adds ``sidecar`` with its own commands."""
    p = commands.add_parser("sidecar", help="a VM's device processes", description="Look at a VM's device processes.")
    sub = p.add_subparsers(dest="sidecar_command", metavar="COMMAND", required=True)
    ls = sub.add_parser("ls", help="list them", description="List the sidecars of a VM: one process a device.")
    ls.add_argument("name", metavar="NAME")
    ls.add_argument("--json", action="store_true", help="for programs")
    ls.set_defaults(run=run_ls)
    sidecar_new.add_parser(sub)


def run_ls(args: argparse.Namespace) -> int:
    """One line a sidecar, from state.json and /proc."""
    vm = find_running(args.name)
    processes = {p.get("device"): p for p in vm.state.get("processes", []) if p.get("device")}
    sidecars = [
        {
            "device": d["id"],
            "kind": d.get("kind", ""),
            "pid": processes.get(d["id"], {}).get("pid"),
            "state": processes.get(d["id"], {}).get("state", "gone"),
            "backend": d.get("backend", ""),
        }
        for d in vm.state.get("devices", [])
    ]
    if args.json:
        import json

        print(json.dumps(sidecars, indent=1))
        return 0
    keys = ("device", "kind", "pid", "state", "backend")
    rows = [[key.upper() for key in keys]]
    rows += [["" if s[key] is None else str(s[key]) for key in keys] for s in sidecars]
    table(rows)
    return 0
