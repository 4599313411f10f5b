"""What a prepared supervisor has opened before it knows its VM: the RAM that its waiting processes have mapped, and its
core has made a VM of."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Ahead:
    """Owns its descriptors."""

    memory: int
    lazy: bool  # it is registered to fill itself
    userfaultfd: int | None  # /dev/userfaultfd, where lazy

    def close(self) -> None:
        """Lets go of them."""
        for fd in (self.memory, self.userfaultfd):
            if fd is not None:
                os.close(fd)


_kept: list[Ahead] = []  # of this process; at most one


def keep(ahead: Ahead) -> None:
    """For the VM to come, if it has such RAM. Takes the descriptors over."""
    _kept.append(ahead)


def take(size: int, *, lazy: bool) -> Ahead | None:
    """What is there, the caller's from then on, if it is of ``size`` bytes and to fill itself, or not; otherwise
    what waits for it is of no use either, and is ended."""
    if not _kept:
        return None
    ahead = _kept.pop()
    if os.fstat(ahead.memory).st_size == size and ahead.lazy == lazy:
        return ahead
    from motorcade.orchestrator import spawn

    ahead.close()
    spawn.dismiss()
    return None
