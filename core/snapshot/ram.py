"""Guest RAM into a template's ``memory`` file, in rounds that run on a thread of their own (native/ramwriter.h).

A stopped snapshot is one round of everything; a live one goes on with what has changed, and ends with a stash:

    writer = RamWriter(memfd, memory.size, fd, base)       fd: "memory" of the target, O_RDWR, empty
    vm.start_dirty_log(); writer.start_all()               all of RAM, while the guest runs
    ... writer.fileno() becomes readable ...
    writer.finish()                                        RamError, RamCancelled, or it went well
    vm.take_dirty(dirty); log.take_into(dirty)             the bits first, the copies after them
    writer.start_dirty(dirty); ... finish(); again         while that gets less
    -- the vCPUs are parked and the sidecars quiet --
    vm.take_dirty(dirty); log.take_into(dirty); writer.stash(dirty)
    -- the machine runs again --
    writer.start_stash(); ... finish()
    writer.start_sync(); ... finish()                      fsync
    Template(..., layers=writer.layers, sums=writer.sums, parents=...)

One round at a time. ``dirty`` is copied when a round starts, and may be cleared and filled again at once. Memory that
is filled on demand (a lazily restored machine) must be filled first (the pager's ``populate``): a hole in the memfd is
a zero page here.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from motorcade.core._native import ffi, lib
from motorcade.core.snapshot.dirty import DirtyPages
from motorcade.proto.memory import PAGE
from motorcade.proto.template import CHUNK, Template, chunk_count

assert lib.MC_RAM_CHUNK == CHUNK


class RamError(Exception):
    """RAM could not be written; ``str()`` says what failed and why. The file is of no use."""


class RamCancelled(RamError):
    """``cancel`` was called before the round was over."""


@dataclass(frozen=True)
class Base:
    """A template to differ from. The descriptors stay the caller's, and open as long as the writer."""

    fds: tuple[int, ...]
    """Its ``memory`` file, then its parents' in order (the target's descriptors "base.0" and on)."""
    layers: bytes = field(repr=False)
    sums: bytes = field(repr=False)

    @classmethod
    def of(cls, template: Template, fds: tuple[int, ...]) -> Base:
        """From its state. ValueError where ``fds`` are not as many files as it has, or it has no memory."""
        if not template.has_memory:
            raise ValueError("the base has no memory of its own")
        if len(fds) != 1 + len(template.parents):
            raise ValueError(f"{len(fds)} memory files for a base with {len(template.parents)} parents")
        return cls(fds, template.layers, template.sums)


@dataclass(frozen=True)
class Progress:
    """Of the present round, or the last: bytes of RAM. ``written``: bytes given to the file in all rounds."""

    total: int
    done: int
    written: int


_PLACES = {
    lib.MC_RAM_GUEST: "reading guest memory",
    lib.MC_RAM_TARGET: "writing the template's memory",
    lib.MC_RAM_BASE: "reading the base template's memory",
    lib.MC_RAM_STASH: "setting memory aside",
}


class RamWriter:
    """Writes one template's ``memory``. ``memfd`` and ``fd`` stay the caller's, and open until ``close``."""

    def __init__(self, memfd: int, size: int, fd: int, base: Base | None = None, *, start: int = 0) -> None:
        """``size``: bytes of RAM. ``start``: where it begins in ``fd``, a whole page. Makes ``fd`` end with it.

        Errors: ValueError for a base of another size, OSError of ftruncate(2) and eventfd(2).
        """
        chunks = chunk_count(size)
        if base is not None and len(base.layers) != chunks:
            raise ValueError(f"the base's memory has {len(base.layers)} chunks, this machine's has {chunks}")
        os.ftruncate(fd, start + size)
        self._fd = fd
        self._layers: Any = ffi.new("uint8_t[]", chunks)
        self._sums: Any = ffi.new("uint32_t[]", chunks)
        self._ram: Any = ffi.new("struct mc_ram *")
        self._ram.memfd, self._ram.fd, self._ram.start, self._ram.size = memfd, fd, start, size
        self._ram.layers, self._ram.sums = self._layers, self._sums
        # The structure holds addresses only; these hold what is there.
        self._keep: list[Any] = []
        if base is not None:
            self._keep = [
                ffi.new("int[]", base.fds),
                ffi.from_buffer("uint8_t[]", base.layers),
                ffi.from_buffer("uint32_t[]", base.sums),
            ]
            self._ram.bases, self._ram.base_layers, self._ram.base_sums = self._keep
            self._ram.base_count = len(base.fds)
        self._thread: threading.Thread | None = None
        self._result: Exception | None = None
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._check(lib.mc_ram_init(self._ram))
        except BaseException:
            os.close(self._event)
            raise

    def fileno(self) -> int:
        """An eventfd that is readable from a round's end until ``finish``."""
        return self._event

    def start_all(self) -> None:
        """A round of all of RAM. RuntimeError where one runs already (so all that follow)."""
        self._start(lambda: lib.mc_ram_write_all(self._ram))

    def start_dirty(self, dirty: DirtyPages) -> None:
        """A round of these pages."""
        bits = ffi.new("uint64_t[]", dirty.words)
        ffi.memmove(bits, dirty.bits, 8 * dirty.words)
        self._start(lambda: lib.mc_ram_write_dirty(self._ram, bits))

    def stash(self, dirty: DirtyPages) -> int:
        """Copies these pages aside, now, and gives their bytes. Nothing may write guest memory meanwhile. RamError."""
        self._idle()
        self._check(lib.mc_ram_stash(self._ram, dirty.bits))
        return int(self._ram.stash_count) * PAGE

    def start_stash(self) -> None:
        """A round that writes what was set aside; the guest may run."""
        self._start(lambda: lib.mc_ram_write_stash(self._ram))

    def start_sync(self) -> None:
        """A round that makes the file permanent (fsync(2))."""
        self._start(self._sync)

    def finish(self) -> None:
        """The round's end: waits for it. RamError where it failed, RamCancelled where ``cancel`` came first."""
        if self._thread is None:
            raise RuntimeError("no round was started")
        self._thread.join()
        self._thread = None
        os.eventfd_read(self._event)
        error, self._result = self._result, None
        if error is not None:
            raise error

    def cancel(self) -> None:
        """Has the round end soon, and every later one; from any thread."""
        # An aligned store of a word, which the round reads atomically and which orders nothing.
        self._ram.cancel = 1

    @property
    def progress(self) -> Progress:
        """How far it is; at any time."""
        return Progress(self._ram.total, self._ram.done, self._ram.written)

    @property
    def layers(self) -> bytes:
        """Of what has been written so far; for Template."""
        self._idle()
        return bytes(ffi.buffer(self._layers))

    @property
    def sums(self) -> bytes:
        """As ``layers``."""
        self._idle()
        return bytes(ffi.buffer(self._sums))

    def close(self) -> None:
        """Cancels a round that runs and frees everything. Once."""
        self.cancel()
        if self._thread is not None:
            self._thread.join()
        lib.mc_ram_deinit(self._ram)
        os.close(self._event)

    def _idle(self) -> None:
        if self._thread is not None:
            raise RuntimeError("a round is not finished")

    def _start(self, round_: Callable[[], int]) -> None:
        self._idle()
        self._thread = threading.Thread(target=self._run, args=(round_,), name="ram")
        self._thread.start()

    def _run(self, round_: Callable[[], int]) -> None:
        try:
            self._check(round_())
        except Exception as e:  # finish() raises it where it is wanted
            self._result = e
        finally:
            os.eventfd_write(self._event, 1)

    def _sync(self) -> int:
        self._ram.place = lib.MC_RAM_TARGET
        try:
            os.fsync(self._fd)
        except OSError as e:
            return -(e.errno or errno.EIO)
        return 0

    def _check(self, result: int) -> None:
        if result == -errno.ECANCELED:
            raise RamCancelled("writing the template's memory was cancelled")
        if result < 0:
            why = "the file is too short" if result == -errno.ENODATA else os.strerror(-result)
            raise RamError(f"{_PLACES[self._ram.place]}: {why}")


def verify(template: Template, fds: tuple[int, ...], first: int, end: int, *, start: int = 0) -> int | None:
    """The first chunk of ``first`` up to ``end`` whose bytes in ``fds`` (as Base.fds) are not its sum's, or None.

    ``start``: where RAM begins in the first of them.

    Errors: ValueError as Base.of, OSError of pread(2).
    """
    base = Base.of(template, fds)
    end = min(end, len(base.layers))
    files = ffi.new("int[]", base.fds)
    layers, sums = ffi.from_buffer("uint8_t[]", base.layers), ffi.from_buffer("uint32_t[]", base.sums)
    found = lib.mc_ram_verify(files, len(fds), start, template.memory_size, layers, sums, first, end)
    if found < 0:
        raise OSError(-found, os.strerror(-found))
    return None if found >= end else int(found)
