"""Which pages of guest memory have changed: KVM's dirty log and the sidecars' together, in the memfd's page order."""

from __future__ import annotations

import mmap
from typing import Any

from motorcade.core._native import ffi, lib
from motorcade.proto.memory import PAGE


def words(memory_size: int) -> int:
    """How many words of 64 bits a bitmap of the pages of ``memory_size`` bytes has."""
    return -(-memory_size // PAGE // 64)


class DirtyPages:
    """A bitmap that is this process's own: bit N % 64 of word N / 64 is page N of the memfd."""

    def __init__(self, memory_size: int) -> None:
        """No page is dirty. ``memory_size`` in bytes, whole pages."""
        self.pages = memory_size // PAGE
        self.words = words(memory_size)
        self.bits: Any = ffi.new("uint64_t[]", self.words)

    def add(self, page: int) -> None:
        """Makes a page dirty. IndexError where there is no such page."""
        if not 0 <= page < self.pages:
            raise IndexError(f"page {page} of {self.pages}")
        self.bits[page // 64] |= 1 << page % 64

    def merge(self, first: int, bits: Any) -> None:
        """Adds the pages of another bitmap (``uint64_t[]``) whose bit 0 is page ``first``, a multiple of 64."""
        count = len(bits)
        if first % 64 or not 0 <= first // 64 <= self.words - count:
            raise ValueError(f"{count} words from page {first} on do not fit into {self.words}")
        lib.mc_dirty_merge(bits, self.bits + first // 64, count)

    def clear(self) -> None:
        """No page is dirty any more."""
        ffi.buffer(self.bits)[:] = bytes(8 * self.words)

    def __len__(self) -> int:
        """How many pages are dirty."""
        return lib.mc_dirty_count(self.bits, self.words)

    def numbers(self) -> list[int]:
        """The dirty pages, ascending. For tests and messages: it takes its time."""
        found = []
        for index in range(self.words):
            word = int(self.bits[index])
            while word:
                low = word & -word
                found.append(64 * index + low.bit_length() - 1)
                word ^= low
        return found


class SharedLog:
    """The log in which this VM's processes note what they write into guest memory (descriptor ``dirty``)."""

    def __init__(self, fd: int, memory_size: int) -> None:
        """Maps it; ``fd`` stays the caller's. ValueError where it is too short, OSError of mmap(2)."""
        self._words = words(memory_size)
        # The descriptor is the supervisor's and sealed: nobody can take its pages away.
        self._map = mmap.mmap(fd, 8 * self._words)
        self._bits: Any = ffi.from_buffer("uint64_t[]", self._map)

    def take_into(self, dirty: DirtyPages) -> None:
        """Moves its bits into ``dirty``. Every page whose bit is moved must be copied afterwards, or stay in there."""
        if dirty.words != self._words:
            raise ValueError(f"a bitmap of {dirty.words} words for a log of {self._words}")
        lib.mc_dirty_take(self._bits, dirty.bits, self._words)

    def close(self) -> None:
        """Ends the mapping."""
        ffi.release(self._bits)
        self._map.close()
