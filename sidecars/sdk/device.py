"""What a device of the kit is: everything that the kinds share but their backends, over native/queue.h.

The process around it (memory, sandbox, control connection, snapshots) is runtime.py's and sidecar.py's.
"""

from __future__ import annotations

import logging
import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from motorcade.sidecars import _queue, device
from motorcade.sidecars.device import BrokenQueue, DeviceState, QueueConfig
from motorcade.sidecars.sdk.kind import Kind
from motorcade.sidecars.sdk.request import UNTIL_WOKEN, BadRequest, Request

if TYPE_CHECKING:
    from motorcade.proto.memory import GuestMemory
    from motorcade.proto.messages import Boot, Counter, StatsReport

log = logging.getLogger("motorcade.sidecar")
lib, ffi = _queue.lib, _queue.ffi

_NANO = 1_000_000_000
_LONGEST = (1 << 63) // _NANO  # seconds


class Device(Kind):
    """Subclass it. Class attributes say what it is; ``handle`` answers its requests; the rest is optional.

    ``handle`` is called on the data thread, everything else on the main thread, possibly while ``handle`` runs.
    """

    ffi, lib = ffi, lib

    virtio_type: int  # virtio 1.2, section 5
    sizes: ClassVar[tuple[int, ...]]  # the largest size of each queue: powers of two up to 1024, at most 16 queues
    offers: ClassVar[int] = 0  # feature bits of the device type; those of the rings are the kit's

    def __init__(self, boot: Boot, fds: Mapping[str, int], memory: GuestMemory) -> None:
        """ValueError: options that are none. Override it to prepare the backend; ``self.options`` is there after
        ``super().__init__``."""
        super().__init__(boot, fds, memory)
        self.accepted = 0  # feature bits that the driver accepted
        self._mem = ffi.new("struct mc_mem *")
        device.init_memory(ffi, self._mem, memory, self.dirty)
        self._isr = device.map_isr(fds["isr"])
        address, opaque = self.native() or (0, 0)
        self._native = bool(address)
        self._queues = lib.mc_queues_new(
            len(self.sizes), self.event_fd, ffi.cast("mc_queues_handler", address), ffi.cast("void *", opaque)
        )
        if self._queues == ffi.NULL:
            raise OSError(ffi.errno, f"{self.id}: {os.strerror(ffi.errno)}")

    # What a kind says and does.

    @abstractmethod
    def handle(self, request: Request) -> float | None:
        """Answers one request. None: done, the driver gets it back. A number: not yet; it is given back as if never
        taken, and comes again, with all that the driver then says, after so many seconds, or after ``wake`` at the
        latest (UNTIL_WOKEN: not before); the requests behind it wait. BadRequest: the queue is broken.

        Any other exception ends the process. Do not wait in here: nothing can be stopped meanwhile.
        """

    def native(self) -> tuple[int, int] | None:
        """The address of a C function that answers instead of ``handle`` (mc_queues_handler of native/queue.h), and its
        first argument. No Python runs per request then. Both must outlive the device."""
        return None

    @property
    def config(self) -> bytes:
        """Device configuration space as it is now; call ``changed`` when it is another."""
        return b""

    def save_state(self) -> bytes:
        """At rest: what neither guest memory nor the core knows. Equal devices give equal bytes."""
        return b""

    def load_state(self, version: int, data: bytes) -> None:
        """At rest, before any driver: takes over what ``save_state`` of ``version``, at most ours, gave. ValueError:
        it is none, and nothing was changed."""
        if data:
            raise ValueError(f"{len(data)} bytes of state for a device that keeps none")

    def counters(self) -> Sequence[Counter]:
        """What only this kind counts."""
        return ()

    def close(self) -> None:
        """Flushes what the host must not lose."""

    # What it may call, on any thread.

    def wake(self) -> None:
        """There is something new: requests that were put off are tried again."""
        lib.mc_queues_wake(self._queues)

    def changed(self) -> None:
        """Configuration space may be another: the driver is told if it is."""
        os.eventfd_write(self.event_fd, 1)

    # What the runtime calls.

    @classmethod
    def count_queues(cls, options: Any) -> int:
        """``sizes``, whatever the options."""
        return len(cls.sizes)

    @property
    def beat(self) -> Any:
        """Of the loop that ``run`` waits in; a ``handle`` that does not return shows as silence."""
        return lib.mc_queues_beat(self._queues)

    @property
    def features(self) -> int:
        """The type's and the rings'."""
        return self.offers | device.RING_FEATURES

    @property
    def queue_sizes(self) -> list[int]:
        """Of each queue."""
        return list(self.sizes)

    def activate(self, features: int, queues: Sequence[QueueConfig]) -> None:
        """``run`` looks at each of these queues once."""
        self.accepted = features
        for queue in queues:
            vq = ffi.new("struct mc_vq *")
            vq.mem = self._mem
            vq.isr = ffi.cast("struct mc_isr *", ffi.from_buffer(self._isr))
            vq.watch = device.watched(ffi, self.watch)
            kick, call = self.fds[f"kick.{queue.index}"], self.fds["call.0"]
            device.init_queue(lib, vq, queue, features, kick_fd=kick, call_fd=call, keep=self.keep)
            if error := lib.mc_queues_attach(self._queues, queue.index, vq):
                raise OSError(error, f"queue {queue.index}: {os.strerror(error)}")

    def run(self) -> None:
        """Waits in C; one call of ``handle`` a request."""
        queues = self._queues
        while (index := lib.mc_queues_next(queues)) != lib.MC_QUEUES_STOPPED:
            try:
                wait = self.handle(Request(queues, index))
            except BadRequest as e:
                log.warning("queue %d: a request that cannot be: %s", index, e)
                lib.mc_queues_refuse(queues)
                continue
            if wait is None:
                lib.mc_queues_done(queues)
            else:
                endless = wait == UNTIL_WOKEN or wait > _LONGEST
                lib.mc_queues_later(queues, (1 << 64) - 1 if endless else max(0, int(wait * _NANO)))

    def stop(self) -> None:
        """``run`` returns after the request in hand."""
        lib.mc_queues_stop(self._queues)

    def reset(self) -> None:
        """The driver is gone."""
        self.accepted = 0
        lib.mc_queues_detach(self._queues)

    def save(self) -> DeviceState:
        """The kind's own, and where its queues are. Nothing is in flight."""
        vqs = (lib.mc_queues_at(self._queues, i) for i in range(len(self.sizes)))
        positions = tuple(device.queue_state(vq) for vq in vqs if vq.size or vq.error)
        return DeviceState(self.version, self.save_state(), positions)

    def load(self, state: DeviceState) -> None:
        """Newer versions are refused here."""
        if not 0 < state.version <= self.version:
            raise ValueError(f"a state of version {state.version}; this sidecar knows {self.version}")
        self.load_state(state.version, state.data)

    def broken_queues(self) -> list[BrokenQueue]:
        """Those that the driver broke."""
        return device.broken(ffi, lib, [lib.mc_queues_at(self._queues, i) for i in range(len(self.sizes))])

    def stats(self) -> StatsReport:
        """Of every queue, and ``counters``."""
        from motorcade.proto.messages import StatsReport

        queues = (device.queue_stats(self.watch, i) for i in range(len(self.sizes)))
        return StatsReport(tuple(queues), tuple(self.counters()))
