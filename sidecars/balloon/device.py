"""virtio-balloon (virtio 1.2, section 5.5). Its queues are answered in C (native/balloon.h); here is what is slow.

How large the balloon is to be and is (num_pages and actual), the core keeps: a sidecar that takes this one's place, or
goes on in a clone, learns them when it is activated. So there is nothing to save. Free page hinting, which serves
migration to another host only, is not offered.

In its sandbox it needs one system call more than others do on their data thread: madvise(2), with MADV_REMOVE.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from motorcade.proto.messages import CONFIG_DRIVER, CONFIG_STATE
from motorcade.sidecars import sdk
from motorcade.sidecars._queue import ffi, lib
from motorcade.sidecars.device import map_dirty

if TYPE_CHECKING:
    from motorcade.proto.memory import GuestMemory
    from motorcade.proto.messages import Boot
    from motorcade.sidecars.device import QueueConfig

VIRTIO_ID_BALLOON = 5
F_STATS_VQ = 1 << 1  # 5.5.3
F_DEFLATE_ON_OOM = 1 << 2
F_PAGE_POISON = 1 << 4
F_REPORTING = 1 << 5

# struct virtio_balloon_config (5.5.4): num_pages, actual, free_page_hint_cmd_id, poison_val; le32 each.
CONFIG_SIZE = 16
NUM_PAGES, ACTUAL, POISON = slice(0, 4), slice(4, 8), slice(12, 16)
_KINDS = bytes([CONFIG_STATE] * 4 + [CONFIG_DRIVER] * 4 + [0] * 4 + [CONFIG_DRIVER] * 4)

# By tag (5.5.6.4), as QEMU's guest-stats have them.
STATISTICS = (
    "stat-swap-in",
    "stat-swap-out",
    "stat-major-faults",
    "stat-minor-faults",
    "stat-free-memory",
    "stat-total-memory",
    "stat-available-memory",
    "stat-disk-caches",
    "stat-htlb-pgalloc",
    "stat-htlb-pgfail",
)
COUNTERS = ("inflated", "deflated", "reported", "discarded", "outside", "kept", "failed", "statistics")


class BalloonOptions(sdk.Options):
    """In machine.yaml."""

    deflate_on_oom: bool = False
    free_page_reporting: bool = False
    stats_interval: Annotated[int, Meta(ge=0, le=86400)] = 0


class BalloonDevice(sdk.Device):
    """Queues: inflate, deflate, statistics, and two places in which a driver may look for that of reporting."""

    virtio_type = VIRTIO_ID_BALLOON
    sizes = (128, 128, 16, 128, 128)
    config_kinds = _KINDS
    Options = BalloonOptions
    options: BalloonOptions

    def __init__(self, boot: Boot, fds: Mapping[str, int], memory: GuestMemory) -> None:
        self._space = bytearray(CONFIG_SIZE)
        self._waiting: list[Callable[[object], None]] = []  # for statistics that were asked for
        self._updated = 0  # seconds since the epoch: when the last came
        self._news = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # Shared with the pager, where memory fills itself.
        self._discarded = map_dirty(fds["discarded"]) if "discarded" in fds else None
        super().__init__(boot, fds, memory)
        self._offered = F_STATS_VQ
        if self.options.deflate_on_oom:
            self._offered |= F_DEFLATE_ON_OOM
        if self.options.free_page_reporting:
            # Linux reports nothing where it clears or poisons free pages and cannot say so.
            self._offered |= F_REPORTING | F_PAGE_POISON
        self._timer = -1
        if self.options.stats_interval:
            self._timer = lib.mc_balloon_timer(self.options.stats_interval)
            if self._timer < 0:
                raise OSError(-self._timer, f"timerfd: {os.strerror(-self._timer)}")

    def native(self) -> tuple[int, int]:
        """See sdk.Device."""
        bits = ffi.NULL
        if self._discarded is not None:
            if len(self._discarded) * 8 * 4096 < max(r.offset + r.size for r in self.memory.regions):
                raise ValueError(f"a bitmap of {len(self._discarded)} bytes is too short for guest memory")
            bits = ffi.cast("uint64_t *", ffi.from_buffer(self._discarded))
        self._balloon = lib.mc_balloon_new(self._mem, bits, self.memory.page_size, self._news)
        if self._balloon == ffi.NULL:
            raise OSError(ffi.errno, f"the balloon: {os.strerror(ffi.errno)}")
        handler = ffi.cast("uintptr_t", ffi.addressof(lib, "mc_balloon_handle"))
        return int(handler), int(ffi.cast("uintptr_t", self._balloon))

    def handle(self, request: sdk.Request) -> float | None:
        """Requests are answered in C."""
        raise NotImplementedError

    @property
    def features(self) -> int:
        """By the options."""
        return super().features | self._offered

    @property
    def config(self) -> bytes:
        """struct virtio_balloon_config."""
        return bytes(self._space)

    def adopt_config(self, config: bytes) -> None:
        """What the core has kept."""
        self._space[:] = config

    def activate(self, features: int, queues: Sequence[QueueConfig]) -> None:
        """Before any request: which queue is what."""
        lib.mc_balloon_start(self._balloon, bool(features & F_STATS_VQ), bool(features & F_REPORTING))
        super().activate(features, queues)
        self._use_poison()

    def _use_poison(self) -> None:
        value = int.from_bytes(self._space[POISON], "little") if self.accepted & F_PAGE_POISON else 0
        lib.mc_balloon_poison(self._balloon, value)

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver says how large the balloon is, or what it fills free pages with."""
        for at, byte in enumerate(data, offset):
            if _KINDS[at] == CONFIG_DRIVER:
                self._space[at] = byte
        self._use_poison()

    def reset(self) -> None:
        """The guest has all its pages again."""
        super().reset()
        lib.mc_balloon_reset(self._balloon)
        self._space[ACTUAL] = self._space[POISON] = bytes(4)
        self._updated = 0
        self._answer()

    # Commands.

    def command(self, name: str, arguments: Mapping[str, Any], answer: Callable[[object], None]) -> None:
        """``target`` ``{"pages"}``: how many pages of 4096 bytes the balloon is to have. ``statistics``
        ``{"fresh"}``: those of the guest, the last ones or, where that is so, new ones when they come."""
        if name == "target":
            pages = arguments.get("pages")
            if type(pages) is not int or not 0 <= pages < 1 << 32:
                raise ValueError(f"a balloon of {pages!r} pages")
            self._space[NUM_PAGES] = pages.to_bytes(4, "little")
            answer({})
        elif name == "statistics":
            if arguments.get("fresh") and self.accepted & F_STATS_VQ:
                self._waiting.append(answer)
                self._ask()
            else:
                answer(self._statistics())
        else:
            super().command(name, arguments, answer)

    def _ask(self) -> None:
        lib.mc_balloon_ask(self._balloon)
        self.wake()

    def _statistics(self) -> dict[str, Any]:
        values = ffi.new("uint64_t[]", lib.MC_BALLOON_TAGS)
        present = lib.mc_balloon_statistics(self._balloon, values)
        stats = {name: values[tag] for tag, name in enumerate(STATISTICS) if present >> tag & 1}
        return {"stats": stats, "last-update": self._updated}

    def _answer(self) -> None:
        waiting, self._waiting = self._waiting, []
        for answer in waiting:
            answer(self._statistics())

    def fileno_events(self) -> Mapping[int, Callable[[], None]]:
        """Statistics that have come; the interval at which they are asked for."""
        events = {self._news: self._on_news}
        if self._timer >= 0:
            events[self._timer] = self._on_timer
        return events

    def _on_news(self) -> None:
        os.eventfd_read(self._news)
        self._updated = int(time.time())
        self._answer()

    def _on_timer(self) -> None:
        os.read(self._timer, 8)
        self._ask()

    def counters(self) -> Sequence[sdk.Counter]:
        """See struct mc_balloon_counters."""
        counted = ffi.new("struct mc_balloon_counters *")
        lib.mc_balloon_count(self._balloon, counted)
        return [sdk.Counter(name, int(getattr(counted, name))) for name in COUNTERS]
