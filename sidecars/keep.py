"""What outlives a sidecar: the memory (descriptor ``inflight``) in which it leaves to its successor what that must
know.

Laid out in native/inflight.h: a header page, a region a queue, and room for the kind. Where there is no such descriptor
the memory is this process's own, and nobody will read it.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from typing import Any


class Keep:
    """A device's. Owns the mapping; the descriptor stays the caller's."""

    def __init__(self, ffi: Any, lib: Any, fds: Mapping[str, int]) -> None:
        """``fds``: a device's descriptors by label; it has a region for each of its ``kick.N``.

        ValueError: the memory is too small, or was left by a program of another version.
        """
        self._lib = lib
        queues = sum(label.startswith("kick.") for label in fds)
        start = lib.MC_KEEP_QUEUES + queues * lib.MC_KEEP_QUEUE
        fd = fds.get("inflight")
        self.map = mmap.mmap(-1, start) if fd is None else mmap.mmap(fd, 0)
        if len(self.map) < start:
            raise ValueError(f"{len(self.map)} bytes are kept for a device of {queues} queues, which needs {start}")
        at = ffi.from_buffer(self.map)
        self.native = ffi.cast("struct mc_keep *", at)
        self.kind = ffi.cast("uint8_t *", at) + start
        """Room for the kind, ``kind_size`` bytes; zero when nobody has served the device before."""
        self.kind_size = len(self.map) - start
        if self.native.version == 0:
            self.native.queues = queues
            self.native.version = lib.MC_KEEP_VERSION
        if self.native.version != lib.MC_KEEP_VERSION or self.native.queues != queues:
            raise ValueError(
                f"what the last process left is of version {self.native.version} for {self.native.queues} queues; this "
                f"program knows version {lib.MC_KEEP_VERSION}, and the device has {queues}"
            )
        self.again = False
        """Whether the activation under way is that of a predecessor, to be gone on with."""

    def begin(self, activation: int) -> None:
        """An activation is under way."""
        self.again = bool(self._lib.mc_keep_activate(self.native, activation))

    def commit(self, activation: int) -> None:
        """Its queues are set up, and a successor can go on from them."""
        self._lib.mc_keep_activated(self.native, activation)

    def queue(self, index: int) -> Any:
        """The in-flight region of a queue, a ``struct mc_inflight *``."""
        return self._lib.mc_keep_queue(self.native, index)
