"""vhost-user: a device whose backend is another program's, such as virtiofsd or qemu-storage-daemon.

That program maps guest memory, waits for the guest's kicks itself, and walks the rings. What is here is the front-end:
it sets the rings up and stops them, and passes the interrupts on (native/vhost.h), which is all that happens for a
request. Everything that waits for the backend is done on the data thread (frontend.py); while that is idle the main
thread takes what the backend says by itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import select
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from motorcade.sidecars import _vhost, device, sdk
from motorcade.sidecars.device import BrokenQueue, DeviceState, QueueConfig, QueueState
from motorcade.sidecars.sandbox.calls import allow
from motorcade.sidecars.vhostuser import opening
from motorcade.sidecars.vhostuser.options import VhostUserOptions

if TYPE_CHECKING:
    from motorcade.proto.memory import GuestMemory
    from motorcade.proto.messages import Boot, StatsReport

log = logging.getLogger("motorcade.sidecar")
lib, ffi = _vhost.lib, _vhost.ffi

_LATE = ("backend", "dirtylog", "frontend", "protocol")
NO_QUEUE = 0xFFFF  # in NeedsReset: the device as a whole


class VhostUserDevice(sdk.Kind):
    """See the module."""

    ffi, lib = ffi, lib
    system_calls = allow("the channel for what a backend asks, at each connection", "socketpair")
    late_imports = tuple(f"motorcade.sidecars.vhostuser.{name}" for name in _LATE)
    keeps_memory = True
    connects = True
    Options = VhostUserOptions
    options: VhostUserOptions

    def __init__(self, boot: Boot, fds: Mapping[str, int], memory: GuestMemory) -> None:
        """OSError: the backend is none, or not this device's."""
        from motorcade.sidecars.vhostuser.dirtylog import DirtyLog
        from motorcade.sidecars.vhostuser.frontend import FrontEnd, Memory
        from motorcade.sidecars.vhostuser.protocol import BackendError

        super().__init__(boot, fds, memory)
        shape = self.options.shape
        self.virtio_type, self._queues = shape.virtio_type, range(shape.queues)
        self._mem = ffi.new("struct mc_mem *")
        device.init_memory(ffi, self._mem, memory, self.dirty)
        self._isr = device.map_isr(fds["isr"])
        self._loop = lib.mc_vhost_new(shape.queues)
        if self._loop == ffi.NULL:
            raise OSError(ffi.errno, f"{self.id}: {os.strerror(ffi.errno)}")
        dirty = DirtyLog(self._mem, memory.regions, fds.get("dirty"), 0 if self.dirty is None else len(self.dirty))
        self._front = FrontEnd(
            self.options,
            self._loop,
            Memory(fds["memory"], memory.regions, dirty),
            {i: fds[f"kick.{i}"] for i in self._queues},
            self.reopen,
            lambda: os.eventfd_write(self.event_fd, 1),
        )
        try:
            self._front.connect(fds["backend"])
        except BackendError as e:
            raise OSError(errno.EPROTO, f"{self.options.whose} {e}") from None
        self._busy = threading.Lock()  # held by who uses the backend
        self._idle = select.epoll()  # what the backend says while the data thread is idle
        self._idle_fds: list[int] = []
        self._listen()

    # In the supervisor.

    @classmethod
    def open_at(cls, options: Any, place: sdk.Place, *, again: bool = False) -> Mapping[str, int]:
        """Connects, and starts the program where that is asked for."""
        return {"backend": opening.open_backend(options, place, again=again)}

    @classmethod
    def count_queues(cls, options: Any) -> int:
        """By type."""
        assert isinstance(options, VhostUserOptions)
        return options.shape.queues

    # What it is.

    @property
    def features(self) -> int:
        """The backend's, of those that this front-end passes on."""
        return self._front.features

    @property
    def queue_sizes(self) -> list[int]:
        """All alike."""
        return [self.options.queue_size] * len(self._queues)

    @property
    def config(self) -> bytes:
        """As the backend last said it."""
        return self._front.config

    # The main thread.

    def activate(self, features: int, queues: Sequence[QueueConfig]) -> None:
        """The backend hears of it in ``run``."""
        from motorcade.sidecars.vhostuser.backend import Ring
        from motorcade.sidecars.vhostuser.frontend import Setting

        setting = Setting(features)
        again = self.keep.again
        for queue in queues:
            vq = ffi.new("struct mc_vq *")
            vq.mem = self._mem
            vq.isr = ffi.cast("struct mc_isr *", ffi.from_buffer(self._isr))
            vq.watch = device.watched(ffi, self.watch)
            kick, call = self.fds[f"kick.{queue.index}"], self.fds["call.0"]
            device.init_queue(lib, vq, queue, features, kick_fd=kick, call_fd=call)
            if error := lib.mc_vhost_attach(self._loop, queue.index, vq, self.keep.queue(queue.index), again):
                raise OSError(error, f"queue {queue.index}: {os.strerror(error)}")
            if not vq.error:
                setting.rings[queue.index] = Ring(queue.index, queue.size, queue.desc, queue.driver, queue.device)
            setting.at[queue.index] = queue.last_avail, queue.used_idx
        # Where another process has served them, the account that it left says what its backend had.
        self._front.begin(setting, again=again)

    def run(self) -> None:
        """See frontend.py."""
        with self._busy:
            self._listen(on=False)
            try:
                self._front.run()
            finally:
                self._listen()

    def stop(self) -> None:
        """``run`` has the backend leave the rings, and returns."""
        self._front.stop()

    def reset(self) -> None:
        """The driver is gone, and with it what was wrong."""
        lib.mc_vhost_detach(self._loop)
        self._front.forget()

    def unrest(self) -> str:
        """A backend with a state of its own cannot be frozen."""
        front = self._front
        if not front.setting.rings or (front.shape.stateless and front.known and not front.failed):
            return ""
        if front.failed:
            return f"{front.failed}; a reset by its driver brings it back"
        if not front.known:
            return f"{front.whose} is away, with requests in hand"
        if front.shape.name == "fs":
            how = "have the guest unmount it and unbind its driver (umount, modprobe -r virtiofs)"
        else:
            how = "say 'stateless: true' in machine.yaml if it has none"
        return f"{front.whose} has a state of its own, which cannot be saved: {how}"

    def quiesce(self) -> None:
        """The rings stand still, and where they do is known; or OSError."""
        if not self._front.known:
            raise OSError(errno.ENOTCONN, f"{self._front.whose} is away, with requests in hand")
        if self._front.failed:
            raise OSError(errno.ENOTCONN, self._front.failed)

    def save(self) -> DeviceState:
        """The rings' positions; all else is the backend's own."""
        at = sorted(self._front.setting.at.items())
        queues = (QueueState(i, last, used, lib.mc_vhost_at(self._loop, i).error) for i, (last, used) in at)
        return DeviceState(self.version, b"", tuple(queues))

    def load(self, state: DeviceState) -> None:
        """Positions come with the activation."""
        if not 0 < state.version <= self.version:
            raise ValueError(f"a state of version {state.version}; this sidecar knows {self.version}")
        if state.data:
            raise ValueError(f"{len(state.data)} bytes of state for a device that keeps none")

    def write_config(self, offset: int, data: bytes) -> None:
        """For the backend to judge."""
        self._front.write_config(offset, data)

    def broken_queues(self) -> list[BrokenQueue]:
        """Those that the driver broke, and the device if it has no backend any more."""
        found = device.broken(ffi, lib, [lib.mc_vhost_at(self._loop, i) for i in self._queues])
        rings = self._front.setting.rings
        found = [BrokenQueue(q.index, f"{self._front.whose} gave it up") if q.index in rings else q for q in found]
        return [*found, BrokenQueue(NO_QUEUE, self._front.failed)] if self._front.failed else found

    def stats(self) -> StatsReport:
        """Requests are counted by what the used rings say."""
        from motorcade.proto.messages import StatsReport

        queues = []
        for i in self._queues:
            counted = device.queue_stats(self.watch, i)
            more = lib.mc_vhost_uncounted(self._loop, i)
            queues.append(dataclasses.replace(counted, requests=counted.requests + more))
        return StatsReport(tuple(queues), (sdk.Counter("reconnects", self._front.reconnects),))

    def reopened(self, fds: Mapping[str, int], error: str) -> None:
        """The supervisor's answer, for the data thread."""
        self._front.opened(fds, error)

    def fileno_events(self) -> Mapping[int, Callable[[], None]]:
        """The backend's words while the data thread is idle."""
        return {self._idle.fileno(): self._on_idle}

    def close(self) -> None:
        """The backend has nothing in hand."""
        self._listen(on=False)
        self._front.disconnect()

    def _listen(self, *, on: bool = True) -> None:
        """Has the main thread hear what the backend says, or not."""
        for fd in self._idle_fds:
            with contextlib.suppress(OSError):  # closing it has done that
                self._idle.unregister(fd)
        backend = self._front.backend if on else None
        sources = [] if backend is None else [backend.connection, backend.requests]
        self._idle_fds = [source.fileno() for source in sources if source is not None]
        for fd in self._idle_fds:
            self._idle.register(fd, select.EPOLLIN)

    def _on_idle(self) -> None:
        """It is gone, or announces something. Nothing that would have to wait for it."""
        from motorcade.sidecars.vhostuser.protocol import BackendError

        if not self._busy.acquire(blocking=False):
            return  # the data thread is about to hear it
        try:
            backend = self._front.backend
            if backend is None:
                return
            try:
                if any(fd == backend.connection.fileno() for fd, _ in self._idle.poll(0)):
                    backend.connection.refuse_words()
                self._front.stale = backend.config_changed() or self._front.stale
            except BackendError as e:
                log.warning("%s %s", self._front.whose, e)
                self._listen(on=False)
                self._front.disconnect()
            if backend.requests is None:
                self._listen()
        finally:
            self._busy.release()
