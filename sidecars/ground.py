"""What a process stands on before it knows its device or machine: guest memory, and no privilege.

Made at its Boot, or ahead, by a process that waits (orchestrator/pool.py), of the memory that its VM will have.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from motorcade.sidecars import sandbox

if TYPE_CHECKING:
    from motorcade.proto.memory import GuestMemory, Region
    from motorcade.proto.messages import Boot, LazyReady, Ready


class WrongGround(ValueError):
    """A process that was prepared got the Boot of a VM with other memory."""


@dataclass(frozen=True)
class Ground:
    """``ready`` is what will say that the process is set up, ``descriptors`` what goes with it.

    A userfaultfd among those stays open here, too, for the process's life: without any, pages that were never filled
    would read as zeros.
    """

    memory: GuestMemory
    ready: Ready | LazyReady
    descriptors: list[int]
    lazy: bool
    memfd: os.stat_result

    def check(self, boot: Boot, memory_fd: int) -> None:
        """WrongGround unless it is made of the memory that ``boot`` speaks of."""
        same = os.path.samestat(self.memfd, os.fstat(memory_fd))
        if not same or self.memory.regions != boot.regions or self.lazy != boot.lazy:
            raise WrongGround("this process was prepared for a VM with other memory")


def make(
    ffi: Any, lib: Any, role: str, fds: Mapping[str, int], regions: Sequence[Region], *, lazy: bool
) -> Ground:
    """Maps ``fds["memory"]``, registers it where it fills itself (``lazy``; before anything can touch it, and while
    the process may), and gives up all privileges. Call it while the process has one thread: each other would keep
    them.

    ``ffi`` and ``lib`` are the caller's C extension, ``role`` is one of sandbox/roles.py, and loaded; ``fds`` stay the
    caller's. Errors: OSError, LazyMemoryError.
    """
    from motorcade.proto.memory import GuestMemory
    from motorcade.proto.messages import LazyReady, Ready

    memory = GuestMemory(fds["memory"], regions, lazy=lazy)
    ready: Ready | LazyReady = Ready()
    descriptors = []
    if lazy:
        from motorcade.sidecars import lazymem

        userfaultfd, mappings = lazymem.register(ffi, lib, memory, fds)
        ready, descriptors = LazyReady(mappings), [userfaultfd]
    sandbox.enter(ffi, lib, role)
    return Ground(memory, ready, descriptors, lazy, os.fstat(fds["memory"]))
