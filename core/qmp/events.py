"""The events, each with what its data hold. EVENTS is what query-events answers and emit() accepts."""

from __future__ import annotations

from collections.abc import Mapping

EVENTS: Mapping[str, frozenset[str]] = {
    # name: the members that its data always have (QEMU's qapi/run-state.json for those of QEMU)
    "STOP": frozenset(),
    "RESUME": frozenset(),
    "RESET": frozenset({"guest", "reason"}),
    "POWERDOWN": frozenset(),
    "SHUTDOWN": frozenset({"guest", "reason"}),
    "MIGRATION": frozenset({"status"}),
    "DUMP_COMPLETED": frozenset({"result"}),
    "SIDECAR_EXITED": frozenset({"id", "kind", "reason"}),
    "SIDECAR_FAILED": frozenset({"id", "kind", "reason"}),
}


def check(name: str, data: Mapping[str, object]) -> None:
    """ValueError where ``name`` is no event of ours or ``data`` lack a member: a mistake in the caller."""
    members = EVENTS.get(name)
    if members is None:
        raise ValueError(f"{name} is not in EVENTS")
    if missing := members - data.keys():
        raise ValueError(f"event {name} lacks {', '.join(sorted(missing))}")
