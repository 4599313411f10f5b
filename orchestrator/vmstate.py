"""state.json: what others know of a VM. Its keys are listed in docs/vmmctl.md."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from motorcade.orchestrator.resources import Device
from motorcade.orchestrator.rundir import process_start

if TYPE_CHECKING:
    from motorcade.orchestrator.supervisor import Supervisor


def vm_state(supervisor: Supervisor) -> dict[str, Any]:
    """How ``supervisor``'s VM stands now."""
    machine, devices, ended = supervisor.machine, supervisor.resources.devices, supervisor.ended
    state: dict[str, Any] = {
        "name": machine.name,
        "uuid": machine.uuid,
        "status": supervisor.status,
        "pid": os.getpid(),
        "start": process_start(os.getpid()),
        "started": supervisor.started,
        "config": supervisor.config,
        "accel": supervisor.accel,
        "machine": {"cpus": machine.cpus, "memory": int(machine.memory), "kernel": machine.kernel.image},
        "processes": supervisor.processes.describe(),
        "devices": [device_state(d, supervisor.processes.revival.status(d.id)) for d in devices],
        "console": supervisor.console(),
        "qmp": [f"unix:{supervisor.run_dir.path / 'qmp.sock'}", *machine.qmp],
        "locks": [*(lock for d in devices for lock in d.locks), *supervisor.hotplug.locks()],
    }
    if ended is not None and supervisor.status in {"ended", "failed"}:
        how = {"status": ended.status, "reason": ended.reason, "detail": ended.detail, "time": time.time()}
        state["ended"] = how
    return state


def device_state(device: Device, trouble: str) -> dict[str, Any]:
    """One device for state.json. ``trouble``: why it is not simply served, or empty."""
    state = {"id": device.id, "kind": device.kind, "slot": device.slot, "backend": device.backend}
    return {**state, "trouble": trouble} if trouble else state
