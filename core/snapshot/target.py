"""Where a snapshot goes: descriptors that the supervisor opens, and one of a client's."""

from __future__ import annotations

import errno
import os
import select
from dataclasses import dataclass

from motorcade.core.life import LifeLink
from motorcade.core.snapshot.plan import Plan, SnapshotError
from motorcade.proto import messages


@dataclass
class Target:
    """Owns its descriptors until closed."""

    fds: dict[str, int]
    description: str

    @property
    def bases(self) -> tuple[int, ...]:
        """The memory files of the base and of what it builds on: descriptors "base.0" and on."""
        count = sum(label.startswith("base.") for label in self.fds) - ("base.state" in self.fds)
        return tuple(self.fds[f"base.{n}"] for n in range(count))

    def close(self) -> None:
        """Closes what is open of it."""
        for fd in self.fds.values():
            os.close(fd)
        self.fds.clear()


async def open_target(life: LifeLink, plan: Plan) -> Target:
    """Asks the supervisor. Takes ``plan.given``. Errors: SnapshotError; ConnectionError at the VM's end."""
    target = Target({"state": plan.given} if plan.given >= 0 else {}, "")
    try:
        answer, fds = await life.ask(messages.OpenTarget(plan.uri, plan.base, plan.what), messages.Target)
        if answer.error:
            raise SnapshotError(answer.error)
    except BaseException:
        target.close()
        raise
    for surplus in fds[len(answer.labels) :]:
        os.close(surplus)
    target.fds |= zip(answer.labels, fds, strict=False)
    target.description = answer.description
    return target


def write_all(fd: int, data: bytes) -> None:
    """All of it, and for good. May block. OSError."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:  # a client's descriptor, whose flags are the client's
            poll = select.poll()
            poll.register(fd, select.POLLOUT)
            poll.poll()
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.EROFS, errno.ENOTSUP):  # a pipe or socket has nothing to make permanent
            raise
