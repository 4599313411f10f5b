"""The C data path (native/pager.h) as an object."""

from __future__ import annotations

import dataclasses
import enum
import errno
import mmap
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from motorcade.sidecars._pager import ffi, lib

if TYPE_CHECKING:
    from motorcade.proto.messages import Mapping, StatsReport
    from motorcade.proto.template import Template

CHUNK: int = lib.MC_PAGER_CHUNK
COUNTERS = (
    "faults",  # that were answered
    "filled",  # chunks that came from the template
    "zeroed",  # chunks that are zero in it
    "ahead_chunks",  # of the working set, copied before anybody asked
    "ahead_ns",
    "populated",  # chunks copied since populate
    "woken",  # faults in chunks that were there already
    "stray",  # faults at addresses that the process had not told of
    "lost",  # processes that could not be served any more, though they had not ended
    "left",  # chunks of the template that are not there yet
    "emptied",  # faults in pages that the balloon had had
    "removals",  # holes that the balloon was about to punch
    "slowest_ns",  # a fault's time from being read to being answered
)


class Damage(Exception):
    """The template cannot be read, or its bytes are not what was saved. The text is for a person."""


class Notice(enum.Flag):
    """What the loop has to tell."""

    AHEAD_DONE = lib.MC_PAGER_AHEAD_DONE
    RECORDED = lib.MC_PAGER_RECORDED
    DAMAGED = lib.MC_PAGER_DAMAGED
    SOURCE_LOST = lib.MC_PAGER_SOURCE_LOST


class Pager:
    """``run`` on one thread; the rest on any. Does not own the descriptors that it is given; lives as long as the
    process.

    ``layers[N]`` is the file of the template's layer N + 1, in the first of which memory begins at ``start``; ``ahead``
    is a working set, ascending; ``record``: note one. Of a template without memory the first file is taken as it is.
    Errors: ValueError where guest memory and template do not fit each other; Damage for a file that is too short.
    """

    def __init__(
        self,
        template: Template,
        memory: int,
        layers: Sequence[int],
        *,
        start: int = 0,
        ahead: Sequence[int] = (),
        record: bool = False,
        discarded: int = -1,
    ) -> None:
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        self.event_fd = os.eventfd(0, flags)  # readable: see notices()
        self.populated_fd = os.eventfd(0, flags)  # readable: what populate() asked for is done
        if not template.has_memory:
            template = _of_file(template, layers[0])
        if len(layers) > lib.MC_PAGER_MAX_LAYERS or max(template.layers) > len(layers):
            raise ValueError(f"{len(layers)} memory files for a template that has {len(template.parents) + 1}")
        _check_sizes(template, layers, start)
        config = ffi.new("struct mc_pager_config *")
        config.memory_fd, config.event_fd, config.populated_fd = memory, self.event_fd, self.populated_fd
        config.size = template.memory_size
        self._layers, self._sums = ffi.from_buffer(template.layers), ffi.from_buffer(template.sums)
        config.layers = ffi.cast("uint8_t *", self._layers)
        config.sums = ffi.cast("uint8_t *", self._sums) if template.sums else ffi.NULL
        config.n_layers, config.start = len(layers), start
        for i, fd in enumerate(layers):
            config.layer_fds[i] = fd
        chunks = ffi.new("uint32_t[]", list(ahead))
        config.ahead, config.n_ahead = chunks, len(chunks)
        config.record = record
        config.discarded = ffi.NULL
        if discarded >= 0:
            self._discarded = mmap.mmap(discarded, 0, mmap.MAP_SHARED, mmap.PROT_READ)
            if len(self._discarded) * 8 < template.memory_size // 4096:
                raise ValueError(f"a bitmap of {len(self._discarded)} bytes is too short for guest memory")
            config.discarded = ffi.cast("uint64_t *", ffi.from_buffer(self._discarded))
        self._pager = lib.mc_pager_new(config)
        if self._pager == ffi.NULL:
            raise ValueError(f"the template and the machine's memory do not fit: {os.strerror(ffi.errno)}")
        self._slots = {"core": 0}

    def serve(self, process: str, uffd: int, mappings: Sequence[Mapping]) -> None:
        """Answers the faults of ``process`` from now on; one that was served under this name is gone. Owns ``uffd``.

        Errors: ValueError, and ``uffd`` is closed.
        """
        slot = self._slots.setdefault(process, len(self._slots))
        some = ffi.new("struct mc_pager_mapping[]", [(m.address, m.size, m.offset) for m in mappings])
        if error := lib.mc_pager_serve(self._pager, slot, uffd, some, len(some)):
            os.close(uffd)
            raise ValueError(f"{process} cannot be served: {os.strerror(-error)}")

    def run(self) -> None:
        """The loop; returns when ``stop`` was called or damage was found (a notice says so). Errors: OSError."""
        if error := lib.mc_pager_run(self._pager):
            raise OSError(-error, f"the pager's loop: {os.strerror(-error)}")

    def stop(self) -> None:
        """Asks ``run`` to return."""
        lib.mc_pager_stop(self._pager)

    def populate(self) -> None:
        """Fills what is left, while faults go first, then makes ``populated_fd`` readable."""
        lib.mc_pager_populate(self._pager)

    def copy_all(self) -> None:
        """Instead of ``run``: writes everything into guest memory. Raises Damage."""
        if lib.mc_pager_eager(self._pager):
            raise self.damage()

    def notices(self) -> Notice:
        """What is new since the last call."""
        return Notice(lib.mc_pager_notices(self._pager))

    def damage(self) -> Damage:
        """What was found."""
        d = ffi.new("struct mc_pager_damage *")
        lib.mc_pager_get_damage(self._pager, d)
        where = f"{_file(d.layer)} at {d.chunk * CHUNK:#x}"
        if d.failure == lib.MC_PAGER_READ_FAILED:
            return Damage(f"{where} cannot be read: {os.strerror(d.error)}")
        if d.failure == lib.MC_PAGER_SHORT:
            return Damage(f"{where} is truncated")
        if d.failure == lib.MC_PAGER_WRONG_SUM:
            return Damage(f"{where} is damaged: its checksum is wrong")
        return Damage(f"guest memory at {d.chunk * CHUNK:#x} cannot be filled: {os.strerror(d.error)}")

    def recorded(self) -> bytes:
        """``WorkingSet.chunks``, after the notice."""
        chunks = ffi.new("uint32_t[]", lib.MC_PAGER_MAX_RECORD)
        count = lib.mc_pager_recorded(self._pager, chunks)
        return bytes(ffi.buffer(chunks, 4 * count))

    @property
    def left(self) -> int:
        """How many chunks of the template are not there yet."""
        return int(self._stats().left)

    def stats(self) -> StatsReport:
        """The counters; fault-p50-ns and fault-p99-ns are upper bounds, at most a fifth too high."""
        from motorcade.proto.messages import Counter, StatsReport

        s = self._stats()
        detail = [Counter(name.replace("_", "-"), int(getattr(s, name))) for name in COUNTERS]
        histogram = list(s.histogram)
        detail += [Counter(f"fault-p{percent}-ns", percentile(histogram, percent)) for percent in (50, 99)]
        return StatsReport(queues=(), detail=tuple(detail))

    def _stats(self) -> Any:
        s = ffi.new("struct mc_pager_stats *")
        lib.mc_pager_get_stats(self._pager, s)
        return s


def percentile(histogram: Sequence[int], percent: int) -> int:
    """The upper bound, in nanoseconds, of the bucket in which that percentile lies; 0 where nothing was counted."""
    wanted = sum(histogram) * percent / 100
    seen = 0
    for bucket, count in enumerate(histogram):
        seen += count
        if count and seen >= wanted:
            return int(lib.mc_pager_bucket_ns(bucket))
    return 0


def _file(layer: int) -> str:
    return "the template's memory" if layer == 1 else f"the memory of the template's ancestor {layer - 1}"


def _of_file(template: Template, fd: int) -> Template:
    """``template`` with the memory that is in ``fd``: everything but its holes, unsummed."""
    size = os.fstat(fd).st_size
    if size != template.memory_size:
        raise Damage(f"the memory file has {size} bytes, the machine's memory {template.memory_size}")
    layers = bytearray(-(-size // CHUNK))
    at = 0
    while at < size:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as e:
            if e.errno == errno.ENXIO:  # nothing but a hole follows
                break
            raise
        end = os.lseek(fd, at, os.SEEK_HOLE)
        first, last = at // CHUNK, -(-end // CHUNK)
        layers[first:last] = b"\1" * (last - first)
        at = end
    return dataclasses.replace(template, layers=bytes(layers))


def _check_sizes(template: Template, layers: Sequence[int], start: int) -> None:
    """A file that was cut off is found before the machine runs, and not when it comes to what is missing."""
    for layer, fd in enumerate(layers, start=1):
        last = template.layers.rfind(layer)
        size = os.fstat(fd).st_size
        begin = start if layer == 1 else 0
        if last >= 0 and size < begin + min((last + 1) * CHUNK, template.memory_size):
            raise Damage(f"{_file(layer)} is truncated at {size} bytes")
