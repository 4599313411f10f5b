"""The events: one class each, from which follow what emit() accepts and what query-events and query-qmp-schema say.

A field ``node_name`` is the member ``node-name``; one that has a default may be left out. The docstring's first line is
the event's description.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

import msgspec

from motorcade.core.snapshot.plan import Status


class EventData(msgspec.Struct, forbid_unknown_fields=True, rename="kebab", frozen=True):
    """Base of an event's data."""


class Stop(EventData, frozen=True):
    """The vCPUs have stopped."""


class Resume(EventData, frozen=True):
    """The vCPUs run again."""


class Reset(EventData, frozen=True):
    """The machine was reset; ``guest``: by the guest itself."""

    guest: bool
    reason: str


class Powerdown(EventData, frozen=True):
    """The ACPI power button was pressed."""


class Shutdown(EventData, frozen=True):
    """The VM ends; ``guest``: it is the guest that wants it so."""

    guest: bool
    reason: str


class Migration(EventData, frozen=True):
    """A snapshot's status has changed."""

    status: Status


class DumpStatus(enum.StrEnum):
    """QEMU's."""

    NONE = "none"
    ACTIVE = "active"
    COMPLETED = "completed"
    FAILED = "failed"


class DeviceDeleted(EventData, frozen=True):
    """A device was taken away; what the guest had written to it is kept."""

    device: str
    path: str


class BalloonChanged(EventData, frozen=True):
    """The guest has given RAM back or taken it; ``actual``: bytes that it has. At most one a second."""

    actual: int


class DumpResult(msgspec.Struct, frozen=True):
    """Of query-dump, too. Bytes of RAM."""

    status: DumpStatus
    completed: int
    total: int


class DumpCompleted(EventData, frozen=True):
    """A dump is over; ``error``: why there is none."""

    result: DumpResult
    error: str | None = None


class SidecarExited(EventData, frozen=True):
    """A sidecar's process has ended."""

    id: str
    kind: str
    reason: str


class SidecarFailed(EventData, frozen=True):
    """A device has lost its sidecar for good; the guest goes on without it."""

    id: str
    kind: str
    reason: str


class SidecarRestarted(EventData, frozen=True):
    """Another process serves the device; ``reason``: what became of the last one."""

    id: str
    kind: str
    reason: str


EVENTS: Mapping[str, type[EventData]] = {
    # QEMU's (qapi/run-state.json, migration.json, dump.json)
    "STOP": Stop,
    "RESUME": Resume,
    "RESET": Reset,
    "POWERDOWN": Powerdown,
    "SHUTDOWN": Shutdown,
    "MIGRATION": Migration,
    "DEVICE_DELETED": DeviceDeleted,
    "DUMP_COMPLETED": DumpCompleted,
    "BALLOON_CHANGED": BalloonChanged,
    # ours
    "SIDECAR_EXITED": SidecarExited,
    "SIDECAR_RESTARTED": SidecarRestarted,
    "SIDECAR_FAILED": SidecarFailed,
}


def check(name: str, data: Mapping[str, object]) -> None:
    """ValueError where ``name`` is no event of ours or ``data`` are not what its class says: the caller's mistake."""
    kind = EVENTS.get(name)
    if kind is None:
        raise ValueError(f"{name} is not in EVENTS")
    try:
        msgspec.convert(data, kind)
    except msgspec.ValidationError as e:
        raise ValueError(f"event {name}: {e}") from None
