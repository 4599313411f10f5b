"""What a sidecar kind implements, and what the kinds share in handing their queues to C.

A kind's C data path is entered once per activation, not once per request: ``Device.run`` is one C call on the data
thread, with the GIL released, that returns when ``Device.stop`` was called and nothing is in flight any more.
"""

from __future__ import annotations

import abc
import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from motorcade.proto import watch
from motorcade.proto.messages import DeviceState, QueueState, QueueStats
from motorcade.proto.messages import Queue as QueueConfig
from motorcade.sidecars.keep import Keep

if TYPE_CHECKING:
    from motorcade.proto.memory import GuestMemory
    from motorcade.proto.messages import Boot, Inject, StatsReport
    from motorcade.sidecars.sandbox.calls import Call

__all__ = [
    "BrokenQueue",
    "Device",
    "DeviceState",
    "QueueConfig",
    "QueueState",
    "QueueStats",
    "broken",
    "init_memory",
    "init_queue",
    "map_dirty",
    "map_isr",
    "queue_state",
    "watched",
]

# Feature bits that every kind offers for its own queues (virtio 1.2, section 6).
RING_INDIRECT_DESC = 1 << 28
RING_EVENT_IDX = 1 << 29
RING_FEATURES = RING_INDIRECT_DESC | RING_EVENT_IDX

MAX_QUEUE_SIZE = 1024  # MC_MAX_QUEUE_SIZE
DIRTY_PAGE = 4096  # MC_DIRTY_PAGE
BAD_AVAIL_IDX = 1  # MC_VQ_BAD_AVAIL_IDX


@dataclass(frozen=True, slots=True)
class BrokenQueue:
    """A queue that the guest broke: nothing touches it any more until a reset."""

    index: int
    reason: str


class Device(abc.ABC):
    """One backend. All methods but ``run`` are called on the main thread.

    ``__init__`` gets descriptors by label (docs/internals.md) and opens nothing by path. The device owns them, and the
    runtime never closes them; they are of the process's life and need not be closed.
    """

    ffi: ClassVar[Any]  # of the kind's C extension
    lib: ClassVar[Any]
    virtio_type: int  # virtio 1.2, section 5; 0: no virtio device: always on and never activated
    keeps_memory: ClassVar[bool] = False
    """``fds["memory"]`` stays open, for another program that maps guest memory by itself. Which the pager does not know
    of: a restored machine has all of its memory before the device runs (``Hello.whole_memory``)."""
    sandbox_role: str = "kit"  # which list of system calls is its (sandbox/roles.py)
    system_calls: ClassVar[Sequence[Call]] = ()  # what it needs beyond that
    late_imports: ClassVar[Sequence[str]] = ()  # modules that its own do not import: later there are no files
    config_kinds: bytes = b""  # whose each byte of ``config`` is (Hello.configKinds); missing ones are the sidecar's

    def __init__(self, boot: Boot, fds: Mapping[str, int], memory: GuestMemory) -> None:
        self.boot = boot
        self.fds = fds
        self.memory = memory
        # The dirty log, for init_memory(); None: nobody wants to know.
        self.dirty = map_dirty(fds["dirty"]) if "dirty" in fds else None
        # Counters and events, for whoever looks.
        self.watch = watch.map_or_make(fds.get("watch"))
        # What outlives this process, and was left by the one before it.
        self.keep = Keep(self.ffi, self.lib, fds)
        # Signalled by the C loop when the main loop should look at broken_queues() and config.
        self.event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def close_sandbox(self, link_fd: int) -> None:
        """All that the device needs is open; ``link_fd`` is the supervisor's socket. Errors: OSError."""
        from motorcade.sidecars import sandbox
        from motorcade.sidecars.sidecar import device_id

        more = tuple(self.system_calls)
        if "debug" in self.fds:
            from motorcade.sidecars import prompt

            more += prompt.SYSTEM_CALLS
        sandbox.close(self.ffi, self.lib, self.sandbox_role, device_id(self.boot), link_fd, more)

    @property
    def always_on(self) -> bool:
        """``run`` is entered once and left at the end only; ``activate`` and ``reset`` are called while it runs, and
        after ``reset`` has returned nothing touches guest memory or raises an interrupt."""
        return False

    @property
    def beat(self) -> Any:
        """A ``struct mc_beat *``, by which the data loop shows that it turns (native/inflight.h); None: it has none."""
        return None

    @property
    @abc.abstractmethod
    def features(self) -> int:
        """Feature bits offered, without the transport's (VIRTIO_F_VERSION_1 is the core's)."""

    @property
    @abc.abstractmethod
    def queue_sizes(self) -> list[int]:
        """The largest size of each queue."""

    @property
    @abc.abstractmethod
    def config(self) -> bytes:
        """Device configuration space as it is now. The runtime announces a change after any event."""

    @abc.abstractmethod
    def activate(self, features: int, queues: Sequence[QueueConfig]) -> None:
        """The driver is ready; ``run`` follows on the data thread, where it is not ``always_on``. ``features`` is a
        subset of those offered.

        A queue whose rings are not legal is no error: it is broken from the start (``broken_queues``). A device at rest
        (``quiesce``) takes nothing from its queues until it goes on; the same goes for ``reset``.
        """

    @abc.abstractmethod
    def run(self) -> None:
        """The C loop, on the data thread. After it returns nothing touches guest memory or raises an interrupt."""

    @abc.abstractmethod
    def stop(self) -> None:
        """Asks ``run`` to return, at once or, when it has not been entered yet, as soon as it is. One call, one return;
        ``run`` may be entered again after that. A loop that holds (``quiesce``) returns as well."""

    @abc.abstractmethod
    def reset(self) -> None:
        """Forgets the driver's settings. ``run`` has returned or was never called, where it is not ``always_on``."""

    # Snapshots (docs/internals.md). A device that is not always on comes to rest by stop(), and goes on by run().

    def quiesce(self) -> None:
        """Comes to rest. ``always_on``: on the main thread, at any time, before ``run`` was entered too. Returns within
        milliseconds, when the loop holds: no guest memory is touched, no interrupt raised, no input taken.

        Others: on the data thread, while ``run`` is not entered, and for as long as it takes. What a copy of the
        backend must have is in it afterwards. OSError: that cannot be, and the device goes on as before.
        """
        if self.always_on:
            raise NotImplementedError(f"{type(self).__name__} cannot be quiesced")

    def unrest(self) -> str:
        """Why the device cannot come to rest now, and nothing need be stopped to find that out; empty: it may try."""
        return ""

    def resume(self) -> None:  # noqa: B027 - a device that is not always on has nothing to do
        """Goes on after ``quiesce``, on the main thread; looks at every queue once, kick or none. Not ``always_on``:
        ``run`` follows, if the driver is ready."""

    def save(self) -> DeviceState:
        """At rest. Equal devices give equal bytes. ``queues`` are those that the driver set up (``queue_state``)."""
        raise NotImplementedError(f"{type(self).__name__} cannot be saved")

    def load(self, state: DeviceState) -> None:
        """At rest and not activated: takes over what ``save`` gave. ``activate`` follows if there were queues, with
        their positions. ValueError: no state of this kind, or of a version that it does not know; nothing changed."""
        raise NotImplementedError(f"{type(self).__name__} cannot be loaded")

    def inject(self, what: Inject) -> None:
        """Faults, for testing guests: from now on, while ``run`` may run. ValueError: not these, or none at all."""
        raise ValueError("this kind of device has no faults to inject")

    def broken_queues(self) -> list[BrokenQueue]:
        """The queues that are broken now. The runtime announces each once an activation."""
        return []

    def write_config(self, offset: int, data: bytes) -> None:  # noqa: B027 - most devices have nothing writable
        """The driver wrote to configuration space. What is not writable is ignored (virtio 1.2, section 2.5)."""

    def adopt_config(self, config: bytes) -> None:  # noqa: B027 - only for those with ``config_kinds``
        """Before ``activate``, where there are ``config_kinds``: configuration space as the core has kept it."""

    def command(self, name: str, arguments: Mapping[str, Any], answer: Callable[[object], None]) -> None:
        """The core asks for something that only this kind understands. ``answer`` takes what can be JSON, once, now or
        later, on the main thread; later than the asker waits, it is for nobody. ValueError: refused."""
        raise ValueError(f"there is no command {name} here")

    @abc.abstractmethod
    def stats(self) -> StatsReport:
        """Counters since the process started."""

    @abc.abstractmethod
    def close(self) -> None:
        """Flushes what the host must not lose and lets go of the backend. ``run`` has returned. May raise OSError."""

    # Set by the runtime: has the supervisor open again what the kind's ``open_at`` opens (sdk.Kind).
    ask_supervisor: Callable[[], None] | None = None

    def reopened(self, fds: Mapping[str, int], error: str) -> None:
        """What comes of ``ask_supervisor``: descriptors by label, which are this object's; or why there are none."""
        for fd in fds.values():
            os.close(fd)

    def fileno_events(self) -> Mapping[int, Callable[[], None]]:
        """Readable descriptors that the main loop polls for this kind, level-triggered, beside ``event_fd``.

        Asked once, before the loop."""
        return {}


def map_isr(fd: int) -> mmap.mmap:
    """Maps the page that holds ``struct mc_isr``, shared with the core. The caller owns the mapping."""
    return mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)


def map_dirty(fd: int) -> mmap.mmap:
    """Maps the dirty log, one bit a page of guest memory, shared with the core. The caller owns the mapping.

    ValueError: it is empty. Whether it is long enough is checked by ``init_memory``."""
    return mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)


# The C objects below are cffi's, of a different extension for each kind, so their static type is Any.


def init_memory(ffi: Any, mem: Any, memory: GuestMemory, dirty: mmap.mmap | None = None) -> None:
    """Fills a ``struct mc_mem *`` with this process's mappings of guest memory and dirty log, which must outlive it.

    ValueError: too many regions, or a dirty log that does not cover them."""
    if len(memory.regions) > len(mem.regions):
        raise ValueError(f"{len(memory.regions)} regions of guest RAM; at most {len(mem.regions)} are supported")
    mem.n = len(memory.regions)
    for i, region in enumerate(memory.regions):
        mem.regions[i].gpa = region.gpa
        mem.regions[i].size = region.size
        mem.regions[i].hva = ffi.cast("uint8_t *", memory.host_address(i))
        mem.regions[i].offset = region.offset
    mem.dirty = ffi.NULL
    if dirty is not None:
        pages = -(-max(r.offset + r.size for r in memory.regions) // DIRTY_PAGE)
        if len(dirty) < -(-pages // 64) * 8:
            raise ValueError(f"a dirty log of {len(dirty)} bytes is too short for {pages} pages")
        mem.dirty = ffi.cast("uint64_t *", ffi.from_buffer(dirty))


def watched(ffi: Any, mapping: mmap.mmap) -> Any:
    """``Device.watch`` as a ``struct mc_watch *``; the mapping must outlive it."""
    return ffi.cast("struct mc_watch *", ffi.from_buffer(mapping))


def init_queue(
    lib: Any, vq: Any, queue: QueueConfig, features: int, *, kick_fd: int, call_fd: int, keep: Keep | None = None
) -> None:
    """Starts a ``struct mc_vq *`` whose ``mem``, ``isr`` and ``watch`` are set, at the positions of ``queue``, or where
    the last process that served it has stopped (``keep``). Rings that are not legal leave ``vq.error`` set; a queue
    that was broken before stays so."""
    vq.kick_fd = kick_fd
    vq.call_fd = call_fd
    vq.index = queue.index
    vq.event_idx = bool(features & RING_EVENT_IDX)
    vq.indirect = bool(features & RING_INDIRECT_DESC)
    vq.last_avail = queue.last_avail
    vq.used_idx = queue.used_idx
    lib.mc_vq_init(vq, queue.size, queue.desc, queue.driver, queue.device)
    if queue.error:
        vq.error = queue.error
    if keep is not None:
        lib.mc_vq_keep(vq, keep.queue(queue.index), keep.again)


def queue_state(vq: Any) -> QueueState:
    """Where a ``struct mc_vq *`` stands. Its loop is at rest: what was taken was pushed, or given back.

    Of a queue that was recovered, what was in its last process's hands has been taken up by now; but for one whose
    guest has changed the avail ring behind our back, which is broken."""
    lost = not vq.error and vq.redo_at < vq.redo_n
    return QueueState(vq.index, vq.last_avail, vq.used_idx, BAD_AVAIL_IDX if lost else vq.error)


def broken(ffi: Any, lib: Any, vqs: Sequence[Any]) -> list[BrokenQueue]:
    """Those of these ``struct mc_vq *`` whose ``error`` is set."""
    return [BrokenQueue(vq.index, ffi.string(lib.mc_vq_strerror(vq.error)).decode()) for vq in vqs if vq.error]


def queue_stats(mapping: mmap.mmap, index: int) -> QueueStats:
    """The counters of a queue in ``Device.watch``. The data thread may be adding to them: each is exact, together they
    are not one moment's."""
    c = watch.counters(mapping, index)
    return QueueStats(
        index=index,
        requests=c.requests,
        bytes_in=c.bytes_in,
        bytes_out=c.bytes_out,
        errors=c.errors,
        kicks=c.kicks,
        interrupts=c.interrupts,
        suppressed=c.suppressed,
        taken=c.taken,
        in_flight=c.in_flight,
        latency_ns=c.latency_ns,
        latency=c.latency,
    )
