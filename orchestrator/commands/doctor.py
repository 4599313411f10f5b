"""vmmctl doctor: what this host can do."""

from __future__ import annotations

import argparse
from typing import Any

from motorcade.orchestrator.commands.common import table

_EPILOG = """\
ok: works. note: works, with less. LACK: something does not work at all. The last line says where `accel: auto`
runs VMs. exit status: 0 if VMs can run here, in whatever way; 1 if not.
"""


def add_parser(commands: Any) -> None:
    """Adds ``doctor``."""
    p = commands.add_parser(
        "doctor",
        help="what this host can do",
        description="Look at what this host offers to VMs, and say what each lack costs.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--json", action="store_true", help="for programs")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """See the module."""
    from motorcade.orchestrator.doctor import report

    result = report()
    findings = {f["name"]: f for f in result["findings"]}
    usable = result["accel"] == "kvm" or findings["qemu"]["level"] == "ok" or findings["kvm"]["level"] == "note"
    if args.json:
        import json

        print(json.dumps(result, indent=1))
        return 0 if usable else 1
    host = result["host"]
    print(f"Linux {host['kernel']} {host['machine']}, {host['cpus']} CPUs\n")
    rows = [["", "WHAT", "FOUND"]]
    for f in result["findings"]:
        rows.append([{"ok": "ok", "note": "note", "lack": "LACK"}[f["level"]], f["name"], f["found"]])
        if f["cost"]:
            rows.append(["", "", f"  {f['cost']}"])
    table(rows)
    if result["accel"] == "kvm":
        print("\naccel: auto runs VMs directly on this host's KVM.")
    elif findings["qemu"]["level"] == "ok":
        print(f"\naccel: auto runs VMs in the box, because {findings['kvm']['found']}.")
    else:
        print("\naccel: auto would run VMs in the box, but QEMU is not installed (apt install qemu-system-x86).")
    return 0 if usable else 1
