"""What vmmctl top shows: two looks at a VM compared, and lines of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from motorcade.orchestrator.commands.sidecar_ls import memory
from motorcade.orchestrator.commands.sidecar_stats import nanoseconds, percentile

_TAKEN = ("role", "device", "pid", "state", "restarts", "uptime", "rss", "pss")
SORTS = {"cpu": "cpu", "memory": "pss", "requests": "requests", "name": "role"}


def compare(now: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each VM of ``now`` with its processes: ``cpu`` in per cent of one processor, ``requests``, ``bytes_in`` and
    ``bytes_out`` a second, ``p99`` in ns (an upper bound) or None, sizes in bytes."""
    past = {vm["name"]: vm for vm in before}
    return [_compare_vm(vm, past.get(vm["name"], {})) for vm in now]


def _compare_vm(vm: dict[str, Any], past: dict[str, Any]) -> dict[str, Any]:
    if "error" in vm:
        return {"name": vm["name"], "error": vm["error"], "processes": []}
    seconds = max(vm["at"] - past.get("at", vm["at"]), 1e-9)
    processes = {p["pid"]: p for p in past.get("processes", [])}
    queues = {(q["device"], q["index"]): q for q in past.get("queues", [])}
    shown = []
    for process in vm["processes"]:
        old = processes.get(process["pid"], {})
        cpu = process.get("cpu")
        entry = {key: process.get(key) for key in _TAKEN}
        entry["cpu"] = None if cpu is None or "cpu" not in old else round(100 * (cpu - old["cpu"]) / seconds, 1)
        mine = [q for q in vm["queues"] if q["device"] == process["device"]]
        for key in ("requests", "bytes_in", "bytes_out"):
            news = sum(q[key] - queues.get((q["device"], q["index"]), q)[key] for q in mine)
            entry[key] = round(news / seconds, 1) if mine else None
        entry["in_flight"] = sum(q["in_flight"] for q in mine) if mine else None
        entry["errors"] = sum(q["errors"] for q in mine) if mine else None
        latency = [0] * 64
        for q in mine:
            old_latency = queues.get((q["device"], q["index"]), q)["latency"]
            for n, (a, b) in enumerate(zip(q["latency"], old_latency, strict=False)):
                latency[n] += a - b
        bucket = percentile(latency, 0.99)
        entry["p99"] = None if bucket is None else 2 << bucket
        shown.append(entry)
    return {"name": vm["name"], "status": vm["status"], "cpus": vm["cpus"], "memory": vm["memory"], "processes": shown}


_HEAD = ["  PROCESS", "PID", "STATE", "CPU%", "PSS", "REQ/S", "FROM GUEST/S", "TO GUEST/S", "IN FLIGHT", "P99",
         "ERRORS", "RESTARTS"]  # fmt: skip


def lines(vms: Sequence[dict[str, Any]], sort: str, columns: int) -> list[str]:
    """For a screen so many columns wide."""
    rows: list[list[str] | str] = [_HEAD]
    for vm in vms:
        rows.append(_title(vm))
        rows += [_row(p) for p in sorted(vm["processes"], key=_key(sort))]
    if not vms:
        rows.append("no VM runs")
    cells = [row for row in rows if isinstance(row, list)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(_HEAD))]
    text = []
    for row in rows:
        if isinstance(row, str):
            text.append(row)
        else:
            left = [row[i].ljust(widths[i]) if i in (0, 2) else row[i].rjust(widths[i]) for i in range(len(row))]
            text.append("  ".join(left).rstrip())
    return [line[:columns] for line in text]


def _key(sort: str) -> Any:
    name = SORTS[sort]
    if name == "role":
        return lambda p: p["role"]
    return lambda p: (-(p[name] or 0), p["role"])


def _title(vm: dict[str, Any]) -> str:
    if "error" in vm:
        return f"{vm['name']}: {vm['error']}"
    total = sum(p["cpu"] or 0 for p in vm["processes"])
    pss = sum(p["pss"] or 0 for p in vm["processes"])
    what = f"{vm['name']}: {vm['status']}, {vm['cpus']} vCPU, {memory(vm['memory'])} RAM"
    return f"{what}; {total:.0f}% CPU, {memory(pss)} PSS"


def _row(p: dict[str, Any]) -> list[str]:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.0f}"

    return [
        "  " + p["role"],
        str(p["pid"]),
        p["state"],
        "" if p["cpu"] is None else f"{p['cpu']:.1f}",
        memory(p["pss"]),
        number(p["requests"]),
        "" if p["bytes_in"] is None else memory(int(p["bytes_in"])),
        "" if p["bytes_out"] is None else memory(int(p["bytes_out"])),
        number(p["in_flight"]),
        "" if p["p99"] is None else f"<{nanoseconds(p['p99'])}",
        number(p["errors"]),
        str(p["restarts"] or ""),
    ]
