"""Looking into a device's process, and stopping it: docs/looking-in.md."""

from __future__ import annotations

from typing import Any

from harness.qmpexamples.example import Each, Example, Group

_PEEK = "rootfs"  # of inspecting.GROUP
_TAKE = {"name": "sidecar_take"}
_QUEUE = {
    "index": int,
    "requests": int,
    "bytes-in": int,
    "bytes-out": int,
    "errors": int,
    "kicks": int,
    "kicks-suppressed": int,
    "interrupts": int,
    "suppressed": int,
    "taken": int,
    "in-flight": int,
    "latency-ns": int,
    "latency": Each(int),
}


def _state(state: str) -> Example:
    def found(answer: Any) -> bool:
        return any(s["id"] == _PEEK and s["state"] == state for s in answer)

    return Example("x-motorcade-sidecars", answer=found)


GROUP = Group(
    "looking in",
    examples=[
        _state("present"),
        Example("x-motorcade-sidecar-stats", {"id": _PEEK}, answer={"id": _PEEK, "queues": [_QUEUE], "detail": dict}),
        Example("x-motorcade-sidecar-stats", {"id": "nobody"}, error="DeviceNotFound", desc="nobody"),
        Example("x-motorcade-sidecar-pause", {"id": _PEEK}),
        _state("paused"),
        Example("x-motorcade-sidecar-pause", {"id": _PEEK}),
        Example("x-motorcade-sidecar-resume", {"id": _PEEK}),
        _state("present"),
        Example("x-motorcade-sidecar-pause", {"id": "nobody"}, error="DeviceNotFound", desc="nobody"),
        Example("x-motorcade-sidecar-inject", {"id": _PEEK, "count": 1, "status": "ioerr", "operation": "discard"}),
        Example("x-motorcade-sidecar-inject", {"id": _PEEK, "count": 0}),
        Example(
            "x-motorcade-sidecar-inject", {"id": _PEEK, "count": 1}, error="GenericError", desc="nothing would happen"
        ),
        Example(
            "x-motorcade-sidecar-inject",
            {"id": _PEEK, "count": 1, "status": "drop"},
            error="GenericError",
            desc="a disk does not answer drop",
        ),
        Example("trace-event-set-state", {"name": "sidecar_t*", "enable": True}),
        Example("trace-event-get-state", {"name": "sidecar_take"}, answer=[_TAKE | {"state": "enabled"}]),
        Example("trace-set-state", {"name": "*", "enable": False}),
        Example("trace-get-state", {"name": "sidecar_take"}, answer=[_TAKE | {"state": "disabled"}]),
        Example("trace-event-get-state", {"name": "none"}, error="GenericError", desc="unknown event"),
    ],
)
