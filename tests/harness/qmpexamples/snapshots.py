"""Templates, states of devices, dumps, and a machine that waits for one."""

from __future__ import annotations

from typing import Any

from harness.qmpexamples.example import Example, Group, Place, Shape

_COMPLETED = {
    "status": "completed",
    "ram": {"total": int, "transferred": int, "remaining": 0},
    "total-time": int,
    "setup-time": int,
    "downtime": int,
}


def _capabilities(**on: bool) -> Shape:
    names = ("events", "x-ignore-shared", "x-motorcade-live")
    return [{"capability": name, "state": on.get(name.replace("-", "_"), False)} for name in names]


def _set(name: str, state: bool) -> Example:
    return Example("migrate-set-capabilities", {"capabilities": [{"capability": name, "state": state}]})


def _file(name: str, argument: str, scheme: str = "", **more: object) -> Any:
    return lambda at: {argument: f"{scheme}{at.folder / name}", **more}


def _new(name: str) -> Any:
    def path(at: Place) -> Any:
        return at.folder / name

    return path


GROUP = Group(
    "snapshots",
    examples=[
        Example("query-migrate", answer={"status": "none"}),
        _set("events", True),
        Example("query-migrate-capabilities", answer=_capabilities(events=True)),
        _set("events", False),
        Example("query-migrate-capabilities", answer=_capabilities()),
        Example(
            "migrate",
            _file("template", "uri", "file:"),
            events=[("MIGRATION", {"status": "setup"})],
            after=[("MIGRATION", {"status": "active"}), ("MIGRATION", {"status": "completed"})],
        ),
        Example("query-migrate", answer=_COMPLETED),
        Example("migrate_cancel"),
        Example("migrate", {"uri": "carrier-pigeon:coop"}, error="GenericError", desc="is no place for a snapshot"),
        Example("save-devices-state", _file("devices", "filename")),
        Example("xen-save-devices-state", _file("xen-devices", "filename", live=True)),
        Example("save-devices-state", {"filename": "fd:none"}, error="GenericError", desc="'none' not found"),
        Example("getfd", {"fdname": "here"}, fd=_new("given")),
        Example("save-devices-state", {"filename": "fd:here"}),
        Example("getfd", {"fdname": "here"}, fd=_new("given")),
        Example("closefd", {"fdname": "here"}),
        Example("closefd", {"fdname": "here"}, error="GenericError", desc="File descriptor named 'here' not found"),
        Example(
            "dump-guest-memory",
            _file("vmcore", "protocol", "file:", paging=False),
            events=[("DUMP_COMPLETED", {"result": {"status": "completed", "completed": int, "total": int}})],
        ),
        # Last: a guest whose memory has gone on since its devices were saved may well crash.
        Example("stop", events=[("STOP", None)]),
        Example("load-devices-state", _file("devices", "filename")),
        Example("xen-load-devices-state", _file("xen-devices", "filename")),
        Example("cont", events=[("RESUME", None)]),
    ],
)
INCOMING = Group(
    "incoming",
    start={"defer": True},
    examples=[
        Example("query-status", answer={"running": False, "singlestep": False, "status": "inmigrate"}),
        Example("migrate-incoming", _file("template", "uri", "file:")),
    ],
)
