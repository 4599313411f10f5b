"""Templates that say that they were made at another time."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

from motorcade.proto import template as templates

_CLOCK = struct.Struct("<QQI")  # core/clock.py


def move(template: Path, nanoseconds: int) -> None:
    """Makes it so much younger, by its own account."""
    with (template / "state").open("r+b") as state:
        found = templates.read(state.fileno())
        components = []
        for part in found.components:
            if part.name == "clock":
                kvmclock, utc, khz = _CLOCK.unpack(part.data)
                part = dataclasses.replace(part, data=_CLOCK.pack(kvmclock, utc + nanoseconds, khz))
            components.append(part)
        data = templates.encode(dataclasses.replace(found, components=type(found.components)(components)))
        state.seek(0)
        state.write(data)
        state.truncate()


def made(template: Path) -> int:
    """When, in nanoseconds since the epoch."""
    with (template / "state").open("rb") as state:
        found = templates.read(state.fileno())
    (clock,) = (part.data for part in found.components if part.name == "clock")
    utc: int = _CLOCK.unpack(clock)[1]
    return utc
