"""vmmctl sidecar: the device processes of a VM."""

from __future__ import annotations

import argparse
from typing import Any

from motorcade.orchestrator.commands import (
    sidecar_act,
    sidecar_debug,
    sidecar_ls,
    sidecar_new,
    sidecar_restart,
    sidecar_sandbox,
    sidecar_stats,
    sidecar_trace,
)

_EPILOG = """\
examples:
  vmmctl sidecar ls web                   one line a device: what it does, what it costs, what waits for it
  vmmctl sidecar stats web root --watch 1  requests, bytes, latencies, again every second
  vmmctl sidecar log web root -f          what it says
  vmmctl sidecar trace web root           what it does, as it happens
  vmmctl sidecar sandbox web root         what it may do, as the kernel has it
  vmmctl sidecar pause web root           it comes to rest; the guest waits
  vmmctl sidecar resume web root          and goes on
  vmmctl sidecar inject web root --fail 1  its next request fails
  vmmctl sidecar debug web root           a Python prompt inside it; --gdb, --py-spy
  vmmctl sidecar restart web root         another process takes its place
docs/looking-in.md says what the numbers mean.
"""


def add_parser(commands: Any) -> None:
    """Adds ``sidecar`` with its own commands."""
    p = commands.add_parser(
        "sidecar",
        help="a VM's device processes",
        description="Look at a VM's device processes, and interfere with them. DEV is a device's id in machine.yaml.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub = p.add_subparsers(dest="sidecar_command", metavar="COMMAND", required=True)
    for module in (
        sidecar_ls,
        sidecar_stats,
        sidecar_trace,
        sidecar_act,
        sidecar_restart,
        sidecar_debug,
        sidecar_sandbox,
        sidecar_new,
    ):
        module.add_parser(sub)
