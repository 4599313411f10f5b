"""The front-end's work on the data thread: one backend after the other, the rings' start and stop, what it says.

``run`` is its story. Between two calls of it nothing touches guest memory, and ``at`` says where the rings are.
"""

from __future__ import annotations

import logging
import os
import select
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from motorcade.sidecars._vhost import lib
from motorcade.sidecars.vhostuser.backend import STOP, Backend, Inflight, Ring
from motorcade.sidecars.vhostuser.dirtylog import DirtyLog
from motorcade.sidecars.vhostuser.protocol import BackendError, Refused

if TYPE_CHECKING:
    from motorcade.proto.memory import Region
    from motorcade.sidecars.vhostuser.options import VhostUserOptions

log = logging.getLogger("motorcade.sidecar")

BACK_OFF, BACK_OFF_MAX = 0.02, 2.0  # seconds between two looks for a backend that went away
STEADY = 10.0  # seconds after which a backend's end is a new story
MOST_ENDS = 5  # of one story
OPENING = 15.0  # seconds for the supervisor's answer
CONFIG_PERIOD = 0.1  # seconds: changes of configuration space reach the guest no more often
_DRAIN_MS = 1


class Stopped(Exception):
    """``stop`` was called."""


@dataclass
class Memory:
    """Guest memory for another process: ``fd`` stays its owner's."""

    fd: int
    regions: Sequence[Region]
    log: DirtyLog


@dataclass
class Setting:
    """What the driver has set up, and where its rings are while they stand still: (last avail, used index)."""

    features: int = 0
    rings: dict[int, Ring] = field(default_factory=dict)
    at: dict[int, tuple[int, int]] = field(default_factory=dict)


class FrontEnd:
    """Of one device. The owner calls one method at a time, but for ``stop``, ``wake``, ``opened`` and ``write_config``,
    which any thread may call while ``run`` runs."""

    def __init__(
        self,
        options: VhostUserOptions,
        loop: Any,
        memory: Memory,
        kicks: Mapping[int, int],
        reopen: Callable[[], None],
        announce: Callable[[], None],
    ) -> None:
        """``loop``: struct mc_vhost *. ``kicks``: eventfds by queue. ``reopen`` has the supervisor call ``opened`` (by
        way of the main thread); ``announce``: ``config`` or ``failed`` may be another."""
        self.options, self.shape = options, options.shape
        self._loop, self._memory, self._kicks, self._reopen, self._announce = loop, memory, kicks, reopen, announce
        self.backend: Backend | None = None
        self.config = b""
        self.features, self._offered = 0, False  # what the device offers: the first backend's
        self.setting = Setting()
        self.failed = ""  # why there will be no backend until the driver resets the device
        self.reconnects = 0
        self.stale = False  # the backend may have another configuration space
        self._asked = 0.0  # when it was last asked for
        self._inflight: Inflight | None = None
        self._running: list[int] = []  # rings that the backend has been given
        self._orphans: list[int] = []  # rings of a backend that went away with them
        self._resume = False  # the next one is to go on from the inflight region
        self._inherited = False  # the rings are those of a front-end before this one
        self._ends, self._began = 0, 0.0
        self._written: deque[tuple[int, bytes]] = deque()
        self._opened: SimpleQueue[tuple[Mapping[str, int], str]] = SimpleQueue()

    @property
    def whose(self) -> str:
        """For messages."""
        return self.options.whose

    @property
    def known(self) -> bool:
        """``setting.at`` is where the rings are, while they stand still."""
        return not self._orphans and not self._resume

    # Any thread.

    def stop(self) -> None:
        """``run`` has the backend leave the rings, and returns."""
        lib.mc_vhost_stop(self._loop)

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver wrote there; the backend is told in ``run``."""
        self._written.append((offset, data))
        lib.mc_vhost_wake(self._loop)

    def opened(self, fds: Mapping[str, int], error: str) -> None:
        """The supervisor's answer. Takes the descriptors."""
        self._opened.put((fds, error))
        lib.mc_vhost_wake(self._loop)

    # While no run() is entered.

    def begin(self, setting: Setting, *, again: bool = False) -> None:
        """The driver is ready. ``again``: since long; a front-end before this one has set its rings going."""
        self.setting, self.failed, self._ends = setting, "", 0
        self._orphans, self._resume, self._inherited = [], False, again
        if again:
            self._orphan(setting.rings)

    def forget(self) -> None:
        """The driver is gone."""
        self.begin(Setting())
        self._written.clear()
        self._drop_inflight()

    def connect(self, fd: int) -> None:
        """Negotiates with the backend at the other end of ``fd``, which is taken. Errors: BackendError."""
        shape = self.shape
        backend = Backend(fd, queues=shape.queues, config_size=shape.config_size)
        if not self._offered:
            self.features, self._offered = backend.features & ~shape.masked, True
        self.backend, self.stale = backend, False
        self._set_config(shape.config(backend.config, self.options))

    def disconnect(self) -> None:
        """Lets go of the backend, if there is one."""
        if self.backend is not None:
            for which in (0, 1):
                lib.mc_vhost_watch(self._loop, which, -1)
            self.backend.close()
            self.backend = None

    # The data thread.

    def run(self) -> None:
        """Until ``stop``, whatever becomes of the backend."""
        if self._inherited:
            self._inherited = False
            lib.mc_vhost_interrupt_all(self._loop)  # who was here before us may not have had the time
        try:
            while True:
                try:
                    if self.failed:
                        self._pause(None)
                    if self.backend is None:
                        self._look_for_it()
                        continue
                    self._start_rings()
                    self._pass_on()
                except BackendError as e:
                    self._lost(e)
        except Stopped:
            pass

    def _pass_on(self) -> None:
        """While the guest runs. Errors: Stopped; BackendError."""
        while True:
            due = self._look_at_config()
            event = lib.mc_vhost_next(self._loop, -1 if due is None else max(1, int(due * 1000)))
            if event == lib.MC_VHOST_STOPPED:
                try:
                    self._stop_rings()
                except BackendError as e:  # now: the next run() begins with another one
                    self._lost(e)
                raise Stopped
            if event == lib.MC_VHOST_CONNECTION:
                self._hear()
            elif event == lib.MC_VHOST_BROKEN:
                self._announce()

    def _hear(self) -> None:
        backend = self._present
        if select.select([backend.connection], [], [], 0)[0]:
            backend.connection.refuse_words()
        if backend.requests is not None:
            self.stale = backend.config_changed() or self.stale
            if backend.requests is None:
                lib.mc_vhost_watch(self._loop, 1, -1)

    @property
    def _present(self) -> Backend:
        assert self.backend is not None
        return self.backend

    def _pause(self, seconds: float | None) -> None:
        """Waits, or until something wakes us. Errors: Stopped."""
        if lib.mc_vhost_next(self._loop, -1 if seconds is None else int(seconds * 1000) + 1) == lib.MC_VHOST_STOPPED:
            raise Stopped

    # Configuration space.

    def _look_at_config(self) -> float | None:
        """Tells the backend what the driver wrote, and the driver what the backend changed. Seconds until this has to
        be called again; None: when there is news."""
        backend = self._present
        while self._written:
            offset, data = self._written.popleft()
            try:
                backend.set_config(offset, data)
            except Refused as e:
                log.warning("%s %s of %d bytes at %d", self.whose, e, len(data), offset)
            self.stale = True
        if not self.stale:
            return None
        now = time.monotonic()
        if (wait := self._asked + CONFIG_PERIOD - now) > 0:
            return wait
        self.stale, self._asked = False, now
        self._set_config(self.shape.config(backend.get_config(), self.options))
        return None

    def _set_config(self, config: bytes) -> None:
        if config != self.config:
            self.config = config
            self._announce()

    # The rings.

    def _start_rings(self) -> None:
        """Gives them to the backend. Errors: BackendError."""
        backend, setting, memory = self._present, self.setting, self._memory
        lib.mc_vhost_watch(self._loop, 0, backend.connection.fileno())
        if backend.requests is not None:
            lib.mc_vhost_watch(self._loop, 1, backend.requests.fileno())
        self._began = time.monotonic()
        if not setting.rings:
            return
        if self._orphans and (reason := self._recover()):
            self._fail(f"{self.whose} went away; it {reason}")
            return
        if missing := setting.features & ~backend.features:
            raise BackendError(f"is another one now: it lacks feature bits {missing:#x}, which the driver uses")
        logs = memory.log.wanted and backend.can_log
        backend.set_up(setting.features, memory.fd, memory.regions, log=logs)
        memory.log.given = logs
        if logs:
            backend.set_log(memory.log.fd, memory.log.size)
        self._set_inflight(backend)
        for index, ring in setting.rings.items():
            last_avail, used_idx = setting.at[index]
            lib.mc_vhost_begin(self._loop, index, last_avail, used_idx)
            self._running.append(index)
            fds = {"call": lib.mc_vhost_call_fd(self._loop, index), "error": lib.mc_vhost_error_fd(self._loop, index)}
            backend.start(ring, last_avail, kick=self._kicks[index], log=logs, **fds)
        self._resume = False
        for index in setting.rings:
            os.eventfd_write(self._kicks[index], 1)  # one that was sent meanwhile may have been somebody else's
        log.info("the rings %s are with %s%s", self._running, self.whose, ", which logs what it writes" if logs else "")

    def _set_inflight(self, backend: Backend) -> None:
        """A region for what is in hand: the dead one's, if that is to be gone on from."""
        queues, size = self.shape.queues, self.options.queue_size
        if not self._resume:
            self._drop_inflight()
            self._inflight = backend.get_inflight(queues, size)
        if self._inflight is not None:
            backend.set_inflight(self._inflight, queues, size)

    def _drop_inflight(self) -> None:
        if self._inflight is not None:
            self._inflight.close()
            self._inflight = None

    def _stop_rings(self) -> None:
        """Takes them back: on return nothing touches guest memory, and nothing is in flight. Errors: BackendError."""
        backend = self._present
        bases = {}
        for index in self._running:
            base = bases[index] = backend.stop(index, call=lib.mc_vhost_call_fd(self._loop, index))
            size = self.setting.rings[index].size
            taken, ahead = base - self._used(index), lib.mc_vhost_avail_idx(self._loop, index) - base
            if taken & 0xFFFF > size or ahead & 0xFFFF > size:
                raise BackendError(f"says that queue {index} is at {base}, where it cannot be")
        self._drain(bases)
        lib.mc_vhost_flush(self._loop)
        self._running = []
        self.setting.at |= {index: (base, base) for index, base in bases.items()}
        self._memory.log.collect()

    def _drain(self, bases: Mapping[int, int]) -> None:
        """Some answer GET_VRING_BASE when they take no more, with requests still in flight (qemu-storage-daemon does),
        and have let go of the call eventfd: nothing tells us of these but the used index."""
        until = time.monotonic() + STOP
        while any(self._used(index) != base for index, base in bases.items()):
            if time.monotonic() > until:
                raise BackendError(f"has stopped, but not all of its requests came back within {STOP:g} s")
            if lib.mc_vhost_next(self._loop, _DRAIN_MS) == lib.MC_VHOST_CONNECTION:
                self._hear()

    def _used(self, index: int) -> int:
        return int(lib.mc_vhost_used_idx(self._loop, index))

    # A backend's end, and the next one.

    def _lost(self, why: BackendError) -> None:
        """It is gone, or of no use any more."""
        log.warning("%s %s", self.whose, why)
        self.disconnect()
        if time.monotonic() - self._began > STEADY:
            self._ends = 0
        self._ends += 1
        if self._running:
            lib.mc_vhost_flush(self._loop)
            running, self._running = self._running, []
            self._orphan(running, str(why))
            self._memory.log.collect()
        if self._ends > MOST_ENDS and not self.failed:
            self._fail(f"{self.whose} {why}; it ended {self._ends} times in a row")

    def _orphan(self, rings: Iterable[int], why: str = "has another front-end now") -> None:
        """Their backend is gone, or about to: it may still be answering what it has in hand. Where nothing is, they
        stand still."""
        if self.shape.name == "fs":
            self._fail(f"{self.whose} {why}; it took what it knew of open files with it")
        self._orphans = sorted({*rings, *self._orphans})
        if all(lib.mc_vhost_avail_idx(self._loop, i) == self._used(i) for i in self._orphans):
            self.setting.at |= {i: (self._used(i), self._used(i)) for i in self._orphans}
            self._orphans = []

    def _recover(self) -> str:
        """Puts the rings where another backend, which is there by now, can go on: one that serves us serves nobody
        else, its own process of before included. Why that cannot be, or nothing."""
        lib.mc_vhost_flush(self._loop)
        stateful = not self.shape.stateless and self._inflight is None
        outstanding = 0
        for index in self._orphans:
            if self._inflight is None:
                found = lib.mc_vhost_recover(self._loop, index)
                if found < 0:
                    return f"had requests in hand, and which (queue {index}) is not known"
                outstanding += found
            self.setting.at[index] = self._used(index), self._used(index)
        if stateful and outstanding:
            return f"had {outstanding} requests in hand, and machine.yaml does not say that it is stateless"
        self._memory.log.collect()
        self._orphans, self._resume = [], self._inflight is not None
        return ""

    def _fail(self, reason: str) -> None:
        self.failed = reason
        log.error("the device stops: %s", reason)
        self._announce()

    def _look_for_it(self) -> None:
        """Until the backend is back, or it has been waited for long enough. Errors: Stopped."""
        until = time.monotonic() + self.options.reconnect
        wait = BACK_OFF
        while True:
            fds, error = self._open_again()
            if fds:
                try:
                    self.connect(fds["backend"])
                except BackendError as e:
                    error = f"{self.whose} {e}"
                else:
                    self.reconnects += 1
                    log.warning("%s is back", self.whose)
                    return
            if time.monotonic() + wait > until:
                self._fail(f"no backend within {self.options.reconnect:g} s: {error}")
                return
            log.debug("no backend yet: %s", error)
            due = time.monotonic() + wait
            while (left := due - time.monotonic()) > 0:
                self._pause(left)
            wait = min(2 * wait, BACK_OFF_MAX)

    def _open_again(self) -> tuple[Mapping[str, int], str]:
        """The supervisor's answer; one to an earlier question is as good. Errors: Stopped."""
        asked = False
        until = time.monotonic() + OPENING
        while True:
            try:
                return self._opened.get_nowait()
            except Empty:
                pass
            if not asked:
                self._reopen()
                asked = True
            left = until - time.monotonic()
            if left <= 0:
                return {}, f"the supervisor did not answer within {OPENING:g} s"
            self._pause(left)
