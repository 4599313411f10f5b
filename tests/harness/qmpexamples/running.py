"""A machine that is stopped, set going, reset and ended."""

from __future__ import annotations

from harness.qmpexamples.example import Example, Group


def _status(status: str) -> Example:
    running = status == "running"
    return Example("query-status", answer={"running": running, "singlestep": False, "status": status})


GROUP = Group(
    "running",
    examples=[
        Example("human-monitor-command", {"command-line": "stop"}, answer="", events=[("STOP", None)]),
        Example("human-monitor-command", {"command-line": "c"}, answer="", events=[("RESUME", None)]),
        Example("stop", events=[("STOP", None)]),
        _status("paused"),
        Example("stop"),
        Example("cont", events=[("RESUME", None)]),
        _status("running"),
        Example("cont"),
        Example("system_powerdown", events=[("POWERDOWN", None)]),
        Example("system_reset", events=[("RESET", {"guest": False, "reason": "host-qmp-system-reset"})]),
        _status("running"),
    ],
)
END = Group(
    "end",
    examples=[Example("quit", after=[("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})])],
)
