"""The core's side of the balloon: what is wanted of it, what it has, and who is told.

num_pages and actual (virtio 1.2, 5.5.4) are in the device's configuration space, of which the core has the one copy
that counts: the sidecar changes the one, the driver the other.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from motorcade.core.link import DEADLINE_MS, SidecarError, SidecarLink
from motorcade.core.loop import Loop
from motorcade.core.platform import Platform
from motorcade.core.task import Future
from motorcade.core.virtio import Device, Status
from motorcade.proto import messages

KIND = "balloon"
PAGE = 4096  # what the device counts in
EVENT_SECONDS = 1.0  # at most one BALLOON_CHANGED in so many, as in QEMU
FRESH_MS = 2000  # that a guest has to fill in its statistics; then the last ones have to do

Emit = Callable[[str, Mapping[str, object]], None]


class Statistics(msgspec.Struct, frozen=True, rename="kebab"):
    """What the guest last said of itself; ``last_update`` in seconds since the epoch, 0: never."""

    stats: dict[str, int]
    last_update: int


class Balloon:
    """Of one machine. On the main thread, but for ``_written``."""

    def __init__(self, device: Device, link: SidecarLink, size: int, loop: Loop, emit: Emit) -> None:
        """``size``: bytes of RAM. ``emit`` sends an event."""
        self._device, self._link, self.size, self._loop, self._emit = device, link, size, loop, emit
        self._told: int | None = None
        self._last = -EVENT_SECONDS
        self._due = False  # an event is on its way
        device.on_config_written = self._written

    @property
    def actual(self) -> int:
        """Bytes of RAM that the guest has, as its driver said."""
        return max(0, self.size - PAGE * self._word(4))

    @property
    def target(self) -> int:
        """Bytes of RAM that it is to have."""
        return max(0, self.size - PAGE * self._word(0))

    def _word(self, offset: int) -> int:
        return int.from_bytes(self._device.config[offset : offset + 4], "little")

    @property
    def driven(self) -> bool:
        """Whether the guest has a driver for it, which is up."""
        return bool(self._device.status & Status.DRIVER_OK)

    async def set_target(self, size: int) -> None:
        """Has the guest try to be left with ``size`` bytes. More than there are is all. Returns when the device wants
        it, not when the guest has done it. SidecarError."""
        await self._ask("target", {"pages": (self.size - min(size, self.size)) // PAGE}, DEADLINE_MS)

    async def statistics(self, *, fresh: bool) -> Statistics:
        """What the guest says of itself; ``fresh``: now, if it answers soon. SidecarError."""
        if fresh:
            with contextlib.suppress(SidecarError):
                return _statistics(self._link, await self._ask("statistics", {"fresh": True}, FRESH_MS))
        return _statistics(self._link, await self._ask("statistics", {}, DEADLINE_MS))

    def _ask(self, name: str, arguments: dict[str, Any], deadline_ms: int) -> Future[messages.Answer]:
        return self._link.ask(messages.Command(name, msgspec.json.encode(arguments).decode()), deadline_ms)

    # BALLOON_CHANGED.

    def _written(self) -> None:
        self._loop.call_soon(self._changed)

    def _changed(self) -> None:
        if self._due or self.actual == self._told:
            return
        self._due = True
        wait = self._last + EVENT_SECONDS - time.monotonic()
        if wait > 0:
            self._loop.call_later(wait, self._tell)
        else:
            self._tell()

    def _tell(self) -> None:
        self._due = False
        if self.actual != self._told:
            self._told, self._last = self.actual, time.monotonic()
            self._emit("BALLOON_CHANGED", {"actual": self._told})


def find(platform: Platform, loop: Loop, emit: Emit) -> Balloon | None:
    """The machine's balloon, where it has one."""
    for slot in platform.slots:
        if slot.kind == KIND and slot.device_id in platform.devices:
            device, link = platform.devices[slot.device_id], platform.links[slot.device_id]
            return Balloon(device, link, platform.memory.size, loop, emit)
    return None


def _statistics(link: SidecarLink, answer: messages.Answer) -> Statistics:
    """A sidecar's word, which may be anything."""
    try:
        assert isinstance(answer, messages.CommandResult)
        return msgspec.json.decode(answer.value, type=Statistics)
    except msgspec.DecodeError as e:
        raise SidecarError(f"{link.device_id}: statistics that are none: {e}") from None
