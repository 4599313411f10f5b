"""What a process costs, as the kernel says (proc(5)): for sidecar ls, top and the metrics."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from motorcade.orchestrator.rundir import process_start

_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one process at one moment: seconds, and bytes. ``pss`` is its share of the memory that it shares with others;
    None where it was not asked for, or may not be read."""

    uptime: float
    cpu: float
    rss: int
    pss: int | None


def cost(pid: int, start: int | None = None, *, pss: bool = True) -> Cost | None:
    """None when the process is gone, or, with ``start`` (rundir.process_start), is another of the same pid.

    ``pss`` takes the kernel a walk through the process's page tables: milliseconds, for one with gigabytes."""
    if start is not None and process_start(pid) != start:
        return None
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    if fields[0] in (b"Z", b"X"):
        return None
    ticks, began, pages = int(fields[11]) + int(fields[12]), int(fields[19]), int(fields[21])
    uptime = max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began / _TICK)
    return Cost(uptime, ticks / _TICK, pages * _PAGE, _pss(pid) if pss else None)


def _pss(pid: int) -> int | None:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_bytes()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) << 10
    return None
