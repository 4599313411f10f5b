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

from motorcade.proto.messages import Queue as QueueConfig
from motorcade.proto.messages import QueueStats

if TYPE_CHECKING:
    from motorcade.proto.memory import GuestMemory
    from motorcade.proto.messages import Boot, StatsReport

__all__ = ["BrokenQueue", "Device", "QueueConfig", "QueueStats", "broken", "init_memory", "init_queue", "map_isr"]

# Feature bits that every kind offers for its own queues (virtio 1.2, section 6).
RING_INDIRECT_DESC = 1 << 28
RING_EVENT_IDX = 1 << 29
RING_FEATURES = RING_INDIRECT_DESC | RING_EVENT_IDX

MAX_QUEUE_SIZE = 1024  # MC_MAX_QUEUE_SIZE


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

    def __init__(self, boot: Boot, fds: Mapping[str, int], memory: GuestMemory) -> None:
        self.boot = boot
        self.fds = fds
        self.memory = memory
        # Signalled by the C loop when the main loop should look at broken_queues() and config.
        self.event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    @property
    def always_on(self) -> bool:
        """``run`` is entered once and left at the end only; ``activate`` and ``reset`` are called while it runs, and
        after ``reset`` has returned nothing touches guest memory or raises an interrupt."""
        return False

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

        A queue whose rings are not legal is no error: it is broken from the start (``broken_queues``).
        """

    @abc.abstractmethod
    def run(self) -> None:
        """The C loop, on the data thread. After it returns nothing touches guest memory or raises an interrupt."""

    @abc.abstractmethod
    def stop(self) -> None:
        """Asks ``run`` to return, at once or, when it has not been entered yet, as soon as it is."""

    @abc.abstractmethod
    def reset(self) -> None:
        """Forgets the driver's settings. ``run`` has returned or was never called, where it is not ``always_on``."""

    def broken_queues(self) -> list[BrokenQueue]:
        """The queues that are broken now. The runtime announces each once an activation."""
        return []

    def write_config(self, offset: int, data: bytes) -> None:  # noqa: B027 - most devices have nothing writable
        """The driver wrote to configuration space. What is not writable is ignored (virtio 1.2, section 2.5)."""

    @abc.abstractmethod
    def stats(self) -> StatsReport:
        """Counters since the process started."""

    @abc.abstractmethod
    def close(self) -> None:
        """Flushes what the host must not lose and lets go of the backend. ``run`` has returned. May raise OSError."""

    def fileno_events(self) -> Mapping[int, Callable[[], None]]:
        """Readable descriptors that the main loop polls for this kind, level-triggered, beside ``event_fd``.

        Asked once, before the loop."""
        return {}


def map_isr(fd: int) -> mmap.mmap:
    """Maps the page that holds ``struct mc_isr``, shared with the core. The caller owns the mapping."""
    return mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)


# The C objects below are cffi's, of a different extension for each kind, so their static type is Any.


def init_memory(ffi: Any, mem: Any, memory: GuestMemory) -> None:
    """Fills a ``struct mc_mem *`` with this process's mapping, which must outlive it."""
    if len(memory.regions) > len(mem.regions):
        raise ValueError(f"{len(memory.regions)} regions of guest RAM; at most {len(mem.regions)} are supported")
    mem.n = len(memory.regions)
    for i, region in enumerate(memory.regions):
        mem.regions[i].gpa = region.gpa
        mem.regions[i].size = region.size
        mem.regions[i].hva = ffi.cast("uint8_t *", memory.host_address(i))


def init_queue(lib: Any, vq: Any, queue: QueueConfig, features: int, *, kick_fd: int, call_fd: int) -> None:
    """Starts a ``struct mc_vq *`` whose ``mem`` and ``isr`` are set, from empty rings. Rings that are not legal leave
    ``vq.error`` set."""
    vq.kick_fd = kick_fd
    vq.call_fd = call_fd
    vq.index = queue.index
    vq.event_idx = bool(features & RING_EVENT_IDX)
    vq.indirect = bool(features & RING_INDIRECT_DESC)
    vq.last_avail = 0
    vq.used_idx = 0
    lib.mc_vq_init(vq, queue.size, queue.desc, queue.driver, queue.device)


def broken(ffi: Any, lib: Any, vqs: Sequence[Any]) -> list[BrokenQueue]:
    """Those of these ``struct mc_vq *`` whose ``error`` is set."""
    return [BrokenQueue(vq.index, ffi.string(lib.mc_vq_strerror(vq.error)).decode()) for vq in vqs if vq.error]


def queue_stats(vq: Any, index: int) -> QueueStats:
    """The counters of a ``struct mc_vq *``. The data thread may be adding to them: each is exact, together they are not
    one moment's."""
    s = vq.stats
    return QueueStats(
        index=index,
        requests=s.requests,
        bytes_in=s.bytes_in,
        bytes_out=s.bytes_out,
        errors=s.errors,
        kicks=s.kicks,
        interrupts=s.interrupts,
        suppressed=s.suppressed,
    )
