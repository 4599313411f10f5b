"""The backend's dirty log (VHOST_USER_SET_LOG_BASE), and the machine's (docs/internals.md)."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from motorcade.sidecars._vhost import ffi, lib

if TYPE_CHECKING:
    from motorcade.proto.memory import Region

LOG_PAGE = 4096  # VHOST_LOG_PAGE


class DirtyLog:
    """vhost's log has a bit a page by guest physical address, ours by place in the memfd. Where RAM has no hole the two
    are one, and the backend gets ours. Else it gets one of its own, which ``collect`` adds to ours when the rings have
    stopped: early enough, since a snapshot asks for the last time when all devices are at rest.

    A backend that logs nothing may have written anywhere: then ``collect`` says so.
    """

    def __init__(self, mem: Any, regions: Sequence[Region], shared: int | None, size: int) -> None:
        """``mem``: struct mc_mem *, with the dirty log. ``shared``: its descriptor, of ``size`` bytes, which stays the
        caller's; None: nobody wants to know."""
        self._mem = mem
        self.wanted = shared is not None
        self.given = False  # the backend has it
        self._own: mmap.mmap | None = None
        if shared is None:
            self.fd, self.size = -1, 0
        elif all(r.gpa == r.offset for r in regions):
            self.fd, self.size = shared, size
        else:
            pages = -(-max(r.gpa + r.size for r in regions) // LOG_PAGE)
            self.size = -(-pages // 64) * 8
            self.fd = os.memfd_create("vhost-log", os.MFD_CLOEXEC)
            os.ftruncate(self.fd, self.size)
            self._own = mmap.mmap(self.fd, self.size)

    def collect(self) -> None:
        """The rings have stopped."""
        if not self.wanted:
            return
        if not self.given:
            lib.mc_vhost_mark_all(self._mem)
        elif self._own is not None:
            words = ffi.cast("uint64_t *", ffi.from_buffer(self._own))
            lib.mc_vhost_take_log(self._mem, words, self.size // 8)
