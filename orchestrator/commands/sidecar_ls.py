"""vmmctl sidecar ls, vmmctl sidecar log: which device processes a VM has, and what each has to say."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from motorcade.orchestrator.commands.common import find, find_running, table, tell
from motorcade.orchestrator.errors import EXIT_NOT_FOUND, UserError

if TYPE_CHECKING:
    from motorcade.orchestrator import rundir


def add_parser(sub: Any) -> None:
    """Adds ``ls`` and ``log``."""
    ls = sub.add_parser(
        "ls",
        help="list them",
        description="List the sidecars of a VM: one process a device. CPU is what it has used in all. IN FLIGHT are "
        "requests that it has taken and not answered, WAITING those that it has not taken yet; one number a queue.",
    )
    ls.add_argument("name", metavar="NAME")
    ls.add_argument("--json", action="store_true", help="for programs")
    ls.set_defaults(run=run_ls)
    log = sub.add_parser(
        "log", help="what one has to say", description="Show a sidecar's log, also after its VM has ended."
    )
    log.add_argument("name", metavar="NAME")
    log.add_argument("device", metavar="DEV")
    log.add_argument("-f", "--follow", action="store_true", help="go on until the VM ends")
    log.set_defaults(run=run_log)


def run_ls(args: argparse.Namespace) -> int:
    """One line a sidecar."""
    vm = find_running(args.name)
    sidecars = describe(vm)
    if args.json:
        import json

        print(json.dumps(sidecars, indent=1))
        return 0
    rows = [["DEVICE", "KIND", "PID", "STATE", "RESTARTS", "UP", "CPU", "PSS", "IN FLIGHT", "WAITING", "BACKEND"]]
    for s in sidecars:
        queues = s["queues"]
        rows.append(
            [
                s["device"],
                s["kind"],
                text(s["pid"]),
                s["state"],
                text(s["restarts"]),
                duration(s["uptime"]),
                "" if s["cpu"] is None else f"{s['cpu']:.2f} s",
                memory(s["pss"]),
                " ".join(str(q["in-flight"]) for q in queues),
                " ".join(str(q["waiting"]) for q in queues),
                s["backend"],
            ]
        )
    table(rows)
    return 0


def describe(vm: rundir.Vm) -> list[dict[str, Any]]:
    """What state.json, the kernel and the core know of each. A core that does not answer leaves its part out."""
    from motorcade.orchestrator import procinfo
    from motorcade.orchestrator.commands.sidecar_common import PAGER, ask

    costs = _costs(vm)
    try:
        known = {s["id"]: s for s in ask(vm, "x-motorcade-sidecars", timeout=5.0)}
    except UserError as e:
        tell(f"the core does not say how its queues are: {e}")
        known = {}
    devices = list(vm.state.get("devices", []))
    processes = {p.get("device"): p for p in vm.state.get("processes", []) if p.get("device")}
    if PAGER in processes:
        devices.append({"id": PAGER, "kind": PAGER, "backend": ""})
    found = []
    for device in devices:
        process, core = processes.get(device["id"], {}), known.get(device["id"], {})
        pid, start = process.get("pid"), process.get("start")
        used: dict[str, Any] = costs.get(device["id"], {})
        if not used and isinstance(pid, int) and start is not None and (cost := procinfo.cost(pid, start)):
            used = {"uptime": cost.uptime, "cpu": cost.cpu, "pss": cost.pss}
        state = process.get("state", "gone")
        trouble = device.get("trouble", "").partition(":")[0]  # failed, or restarting
        found.append(
            {
                "device": device["id"],
                "kind": device.get("kind", ""),
                "pid": pid,
                "state": "paused" if core.get("state") == "paused" else trouble or state,
                "restarts": process.get("restarts", 0),
                "uptime": used.get("uptime"),
                "cpu": used.get("cpu"),
                "pss": used.get("pss"),
                "queues": core.get("queues", []),
                "backend": device.get("backend", ""),
            }
        )
    return found


def _costs(vm: rundir.Vm) -> dict[str, dict[str, Any]]:
    """As the supervisor sees them, which is where the processes are: those of a VM in the box are the box's."""
    from motorcade.orchestrator import traceclient

    try:
        status = traceclient.status(vm.path / "watch.sock")
    except UserError as e:
        tell(f"the supervisor does not say what its processes cost: {e}")
        return {}
    return {p["device"]: p for p in status["processes"] if p.get("device")}


def run_log(args: argparse.Namespace) -> int:
    """That of KIND-DEV."""
    from motorcade.orchestrator.commands import logs

    vm = find(args.name)
    kinds = {d["id"]: d.get("kind", "") for d in vm.state.get("devices", [])}
    if args.device in ("core", "supervisor", "pager"):
        role = args.device
    elif args.device in kinds:
        role = f"{kinds[args.device]}-{args.device}"
    else:
        raise UserError(
            f"{args.name} has no device {args.device} (there are: {', '.join(kinds) or 'none'})", EXIT_NOT_FOUND
        )
    return logs.run(argparse.Namespace(name=args.name, role=role, follow=args.follow))


def text(value: object) -> str:
    """For a cell."""
    return "" if value is None else str(value)


def duration(seconds: float | None) -> str:
    """Such as 12 s, 3 min, 5 h, 2 d."""
    if seconds is None:
        return ""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{int(seconds // length)} {unit}"
    return f"{int(seconds)} s"


def memory(n: int | None) -> str:
    """Bytes as 512 B, 34.5K, 1.2M or 3.4G."""
    if n is None:
        return ""
    size = float(n)
    for unit in ("", "K", "M", "G"):
        if size < 1000 or unit == "G":
            break
        size /= 1024
    return f"{size:.0f} B" if not unit else f"{size:.1f}{unit}"
