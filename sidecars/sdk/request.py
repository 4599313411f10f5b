"""One request of the driver's: a chain of buffers to be read, then of buffers to be written (virtio 1.2, 2.6)."""

from __future__ import annotations

import math
from typing import Any

from motorcade.sidecars._queue import ffi, lib

UNTIL_WOKEN = math.inf
"""What ``Device.handle`` returns to get the request again after ``Device.wake``."""


class BadRequest(Exception):
    """Raised by ``Device.handle``: no driver may send this. The queue stops, and the driver sees NEEDS_RESET."""


class Request:
    """Valid until ``Device.handle`` returns. What is in guest memory may change at any time: read it once, check that
    copy, and use that copy."""

    __slots__ = ("_at", "_queues", "queue", "readable", "writable")

    def __init__(self, queues: Any, queue: int) -> None:
        self._queues, self._at = queues, 0
        self.queue = queue  # its index
        self.readable: int = lib.mc_queues_readable(queues)  # bytes that ``read`` has left
        self.writable: int = lib.mc_queues_writable(queues)  # bytes that ``write`` has room for; up to 4 GiB

    def read(self, size: int) -> bytes:
        """The next ``size`` bytes from the driver, or fewer where there are no more. Bound ``size`` yourself: a driver
        may well send 4 GiB."""
        size = min(size, self.readable)
        buffer = ffi.new("char[]", size) if size else b""
        got = lib.mc_queues_read(self._queues, self._at, buffer, size)
        self._at += got
        self.readable -= got
        return bytes(ffi.buffer(buffer, got)) if size else b""

    def write(self, data: bytes) -> int:
        """Appends ``data`` for the driver; the number of bytes that there was room for."""
        done: int = lib.mc_queues_write(self._queues, data, len(data))
        self.writable -= done
        return done
