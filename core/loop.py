"""The core's main loop: file descriptors, deadlines, and calls handed over from vCPU threads.

Two levels. The *control* level (sidecar messages, the supervisor, calls from vCPU threads) is served even while a
command of the *outer* level (QMP) waits for something, by ``run_until``. A QMP command is therefore never
entered while another one is half done, and a vCPU that waits for a sidecar's answer gets it while the main
thread waits for that vCPU to park.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import os
import selectors
import time
from collections import deque
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)


class Loop:
    """Readiness callbacks on one thread. ``call_soon`` is the only method that other threads may call."""

    def __init__(self) -> None:
        self._control = selectors.EpollSelector()
        self._outer = selectors.EpollSelector()
        self._calls: deque[Callable[[], None]] = deque()
        self._deadline_sources: list[tuple[Callable[[], float | None], Callable[[float], None]]] = []
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timer_ids = itertools.count()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.add_control(self._wake, self._run_calls)
        # An epoll descriptor is readable when it has something to report: the control level as one outer event.
        self._outer.register(self._control.fileno(), selectors.EVENT_READ, lambda _events: self._step(0))
        self._stopped = False
        self.add_deadlines(lambda: self._timers[0][0] if self._timers else None, self._run_timers)

    def add_control(self, fd: int, callback: Callable[[], None]) -> None:
        """Calls ``callback`` when ``fd`` is readable, in nested waits too. ``fd`` stays the caller's."""
        self._control.register(fd, selectors.EVENT_READ, lambda _events: callback())

    def remove_control(self, fd: int) -> None:
        """Undoes add_control; do it before closing ``fd``."""
        self._control.unregister(fd)

    @property
    def outer(self) -> selectors.EpollSelector:
        """The outer level; each registration's data is a callable that takes the event mask."""
        return self._outer

    def add_deadlines(self, next_deadline: Callable[[], float | None], expire: Callable[[float], None]) -> None:
        """Has ``expire(now)`` called once ``next_deadline()``, in time.monotonic() seconds, has passed."""
        self._deadline_sources.append((next_deadline, expire))

    def call_later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Runs ``callback`` after ``seconds``, at the control level. There is no taking it back: it finds out itself
        whether it is still wanted."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._timer_ids), callback))

    def _run_timers(self, now: float) -> None:
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2]()

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Runs ``callback`` on the loop's thread, at the control level. From any thread."""
        self._calls.append(callback)
        os.eventfd_write(self._wake, 1)

    def _run_calls(self) -> None:
        # A nested run_until may have run the calls that this wake-up was about.
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        while self._calls:
            self._calls.popleft()()

    def _timeout(self, until: float | None) -> float | None:
        times = [t for source, _ in self._deadline_sources if (t := source()) is not None]
        if until is not None:
            times.append(until)
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _expire(self) -> None:
        now = time.monotonic()
        for source, expire in self._deadline_sources:
            if (due := source()) is not None and due <= now:
                expire(now)

    @staticmethod
    def _dispatch(events: list[tuple[selectors.SelectorKey, int]]) -> None:
        for key, mask in events:
            callback: Callable[[int], Any] = key.data
            callback(mask)

    def _step(self, timeout: float | None) -> None:
        self._dispatch(self._control.select(timeout))
        self._expire()

    def run_until(self, done: Callable[[], bool], timeout: float) -> bool:
        """Serves the control level until ``done()``; False when ``timeout`` seconds pass first."""
        until = time.monotonic() + timeout
        while not done():
            if time.monotonic() >= until:
                return False
            self._step(self._timeout(until))
        return True

    def run(self) -> None:
        """Serves both levels until ``stop``."""
        while not self._stopped:
            self._dispatch(self._outer.select(self._timeout(None)))
            self._expire()

    def stop(self) -> None:
        """Makes ``run`` return after the callbacks of this round."""
        self._stopped = True

    def close(self) -> None:
        """Releases the loop's own descriptors."""
        self._outer.close()
        self._control.close()
        os.close(self._wake)
