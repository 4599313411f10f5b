"""virtio-rng (virtio 1.2, section 5.4): one queue of buffers to be filled with random bytes of the host's kernel.

Nothing random is ever kept, so nothing random is in a template: clones cannot get the same bytes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from motorcade.sidecars import sdk

if TYPE_CHECKING:
    from motorcade.proto.memory import GuestMemory
    from motorcade.proto.messages import Boot

VIRTIO_ID_ENTROPY = 4
CHUNK = 64 << 10  # bytes for one request; the driver asks again (5.4.6.1: at least one byte)


class RngOptions(sdk.Options):
    """In machine.yaml."""

    rate: Annotated[int, Meta(ge=1, le=1 << 40, description="Bytes a second at most; default: no limit.")] | None = None


class RngDevice(sdk.Device):
    """The rate is a bucket that holds one second's bytes, and is full at the start."""

    virtio_type = VIRTIO_ID_ENTROPY
    sizes = (64,)
    Options = RngOptions
    options: RngOptions

    def __init__(self, boot: Boot, fds: Mapping[str, int], memory: GuestMemory) -> None:
        super().__init__(boot, fds, memory)
        self._left = float(self.options.rate or 0)
        self._filled = time.monotonic()

    def handle(self, request: sdk.Request) -> float | None:
        """Fills a buffer, up to CHUNK or one second's bytes of it, as soon as the rate allows that."""
        if not request.writable:
            raise sdk.BadRequest("a buffer that nothing can be written to")
        size = min(request.writable, CHUNK)
        rate = self.options.rate
        if rate is not None:
            size = min(size, rate)
            now = time.monotonic()
            self._left = min(rate, self._left + (now - self._filled) * rate)
            self._filled = now
            if self._left < size:
                return (size - self._left) / rate
            self._left -= size
        request.write(os.urandom(size))
        return None
