"""vmmctl ps, vmmctl status: which VMs there are, and all about one."""

from __future__ import annotations

import argparse
from typing import Any

from motorcade.orchestrator.commands.common import ago, find, how_it_ended, size, table

_EPILOG = """\
STATUS: starting; incoming, waits for QMP's migrate-incoming; running, stopped CPUs or not (vmmctl qmp NAME query-status
tells); stopping; killed, a VM whose supervisor was killed: `vmmctl down NAME` removes what is left. With -a: ended, and
failed, which never ran. Each user sees the VMs in the own run directory ($MOTORCADE_RUN_DIR).
"""


def add_parser(commands: Any) -> None:
    """Adds ``ps`` and ``status``."""
    ps = commands.add_parser(
        "ps",
        help="list VMs",
        description="List this user's VMs.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ps.add_argument("-a", "--all", action="store_true", help="those that have ended, too")
    ps.add_argument("--json", action="store_true", help="for programs")
    ps.set_defaults(run=run_ps)
    status = commands.add_parser(
        "status", help="all about one VM", description="Show a VM's state, processes, devices and sockets."
    )
    status.add_argument("name", metavar="NAME", help="a VM, as vmmctl ps shows it, also one that has ended")
    status.add_argument("--json", action="store_true", help="for programs")
    status.set_defaults(run=run_status)


def run_ps(args: argparse.Namespace) -> int:
    """Living VMs and killed ones that were not cleaned up yet; with --all the last end of each name."""
    from motorcade.orchestrator import rundir

    vms = list(rundir.vms(ended=args.all))
    if args.json:
        import json

        print(json.dumps([describe(vm) for vm in vms], indent=1))
        return 0
    rows = [["NAME", "STATUS", "PID", "CPUS", "MEMORY", "ACCEL", "UP"]]
    for vm in vms:
        state, machine = vm.state, vm.state.get("machine", {})
        started = state.get("started")
        rows.append(
            [
                vm.name,
                vm.status,
                str(state.get("pid", "")) if vm.alive else "",
                str(machine.get("cpus", "")),
                size(machine["memory"]) if "memory" in machine else "",
                str(state.get("accel", "")),
                (ago(started) if vm.alive and started else how_it_ended(vm)),
            ]
        )
    table(rows)
    return 0


def describe(vm: Any) -> dict[str, Any]:
    """state.json with what only an onlooker can add."""
    return {**vm.state, "name": vm.name, "alive": vm.alive, "status": vm.status, "run_dir": str(vm.path)}


def run_status(args: argparse.Namespace) -> int:
    """Everything that state.json knows; 0 even for a VM that has ended badly."""
    vm = find(args.name)
    if args.json:
        import json

        print(json.dumps(describe(vm), indent=1))
        return 0
    state = vm.state
    machine = state.get("machine", {})
    print(f"{vm.name}: {vm.status}" + (f" for {ago(state['started'])}" if vm.alive and "started" in state else ""))
    if not vm.alive:
        print(f"  ended      {how_it_ended(vm)}")
        for line in str(state.get("ended", {}).get("detail", "")).splitlines():
            print(f"             {line}")
    facts = {
        "uuid": state.get("uuid"),
        "config": state.get("config"),
        "accel": state.get("accel"),
        "cpus": machine.get("cpus"),
        "memory": size(machine["memory"]) if "memory" in machine else None,
        "kernel": machine.get("kernel"),
        "directory": str(vm.path),
        "qmp": " ".join(state.get("qmp", [])) or None,
    }
    for key, value in facts.items():
        if value is not None:
            print(f"  {key:<10} {value}")
    if processes := state.get("processes"):
        rows = [["ROLE", "PID", "STATE"]]
        rows += [[p.get("role", "?"), str(p.get("pid", "")), p.get("state", "")] for p in processes]
        print()
        table(rows, indent="  ")
    if devices := state.get("devices"):
        rows = [["DEVICE", "KIND", "BACKEND"]]
        rows += [
            [d.get("id", "?"), d.get("kind", ""), " ".join(filter(None, [d.get("backend", ""), d.get("trouble", "")]))]
            for d in devices
        ]
        print()
        table(rows, indent="  ")
    return 0
