"""How a VM's processes and queues stand, for ``watch.sock`` and the metrics: from what the supervisor has at hand."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from motorcade.orchestrator import procinfo
from motorcade.proto import watch

if TYPE_CHECKING:
    from motorcade.orchestrator.supervisor import Supervisor

_PSS_SECONDS = 5.0  # to count shared pages is a walk through all of a process's


class VmLook:
    """Of one supervisor's VM."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._pss: dict[int, tuple[float, int | None]] = {}

    def rings(self) -> dict[str, int]:
        """The descriptors that things are recorded through, by device; the supervisor's."""
        resources = self._supervisor.resources
        return {"core": resources.core["watch"], **{d.id: d.watch for d in resources.devices}}

    def status(self) -> dict[str, Any]:
        """All of it, as JSON has it. Times in seconds, sizes in bytes, latencies in ns."""
        s = self._supervisor
        return {
            "name": s.machine.name,
            "status": s.status,
            "started": s.started,
            "memory": int(s.machine.memory),
            "cpus": s.machine.cpus,
            "processes": self._processes(),
            "queues": self._queues(),
        }

    def _processes(self) -> list[dict[str, Any]]:
        ours = {"role": "supervisor", "device": None, "pid": os.getpid(), "state": "running"}
        found = []
        for process in [ours, *self._supervisor.processes.describe()]:
            up = not str(process["state"]).startswith(("exited", "killed"))
            cost = procinfo.cost(process["pid"], pss=False) if up else None
            entry = {
                "role": process["role"],
                "device": process["device"],
                "pid": process["pid"],
                "state": process["state"],
                "restarts": process.get("restarts", 0),
                "up": int(up),
            }
            if cost is not None:
                entry |= {"uptime": cost.uptime, "cpu": cost.cpu, "rss": cost.rss}
                entry["pss"] = self._pss_of(process["pid"])
            found.append(entry)
        return found

    def _pss_of(self, pid: int) -> int | None:
        now = time.monotonic()
        when, value = self._pss.get(pid, (-_PSS_SECONDS, None))
        if now - when >= _PSS_SECONDS:
            cost = procinfo.cost(pid)
            value = None if cost is None else cost.pss
            self._pss[pid] = (now, value)
        return value

    def _queues(self) -> list[dict[str, Any]]:
        found = []
        for device in self._supervisor.resources.devices:
            for index in range(min(device.queues, watch.MAX_QUEUES)):
                data = os.pread(device.watch, watch.QUEUE_SIZE, watch.QUEUES_AT + index * watch.QUEUE_SIZE)
                counted = watch.counters_of(data)
                found.append(
                    {
                        "device": device.id,
                        "index": index,
                        "requests": counted.requests,
                        "bytes_in": counted.bytes_in,
                        "bytes_out": counted.bytes_out,
                        "errors": counted.errors,
                        "kicks": counted.kicks,
                        "kicks_suppressed": counted.kicks_suppressed,
                        "interrupts": counted.interrupts,
                        "suppressed": counted.suppressed,
                        "in_flight": counted.in_flight,
                        "latency_ns": counted.latency_ns,
                        "latency": list(counted.latency),
                    }
                )
        return found
