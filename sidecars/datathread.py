"""The thread of a sidecar that touches guest memory and the backend: in ``Device.run``, ``Device.quiesce``, or idle.

The main thread says what it does and is told, through a descriptor that it polls, when that is done. What may only
happen when it is idle (a reset, the end) waits in a list, in the order in which it was asked for.
"""

from __future__ import annotations

import enum
import os
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from motorcade.sidecars.device import Device


class State(enum.Enum):
    """What the thread does."""

    IDLE = "idle"
    ACTIVE = "active"  # in Device.run
    STOPPING = "stopping"  # asked to return from it
    SETTLING = "settling"  # in Device.quiesce


class DataThread:
    """Starts the thread. All methods are called on the main thread; none waits."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.state = State.IDLE
        self._crash: BaseException | None = None
        self._unsettled: OSError | None = None
        self._jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._done_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._when_idle: deque[Callable[[], None]] = deque()
        self._settled: Callable[[OSError | None], None] | None = None
        threading.Thread(target=self._work, name="data", daemon=True).start()

    def fileno(self) -> int:
        """Readable when ``on_done`` is to be called. Owned by this object."""
        return self._done_fd

    def _work(self) -> None:
        """The thread. Not joined: it is idle when the process ends in good order, and else must not delay that."""
        while self._crash is None:
            job = self._jobs.get()
            try:
                job()
            except BaseException as e:  # handed to the main thread, which ends the process with it
                self._crash = e
            os.eventfd_write(self._done_fd, 1)

    def start(self) -> None:
        """Lets the idle thread into ``Device.run``."""
        self.state = State.ACTIVE
        self._jobs.put(self.device.run)

    def settle(self, then: Callable[[OSError | None], None]) -> None:
        """Lets the idle thread into ``Device.quiesce``. ``then`` gets what that raised, before all else."""

        def job() -> None:
            try:
                self.device.quiesce()
            except OSError as e:
                self._unsettled = e

        self.state = State.SETTLING
        self._settled = then
        self._jobs.put(job)

    def when_idle(self, then: Callable[[], None]) -> None:
        """Calls ``then`` when nothing touches guest memory any more: at once, or when the thread has returned."""
        self._when_idle.append(then)
        self._advance()

    def _advance(self) -> None:
        while self._when_idle:
            if self.state is State.IDLE:
                self._when_idle.popleft()()
            elif self.state is State.ACTIVE:
                self.state = State.STOPPING
                self.device.stop()
            else:
                return

    def on_done(self) -> None:
        """The thread has returned from what it did. What that raised is raised here, and ends the process."""
        os.eventfd_read(self._done_fd)
        if self._crash is not None:
            raise self._crash
        if self.state is State.ACTIVE:
            raise RuntimeError("the data loop returned, though nobody asked it to")
        self.state = State.IDLE
        if self._settled is not None:
            then, self._settled = self._settled, None
            error, self._unsettled = self._unsettled, None
            then(error)
        self._advance()
