"""Guest address decoding: which device answers an MMIO or port access that left the C exit loop."""

from __future__ import annotations

import bisect
import logging
from typing import Protocol

log = logging.getLogger(__name__)


class BusDevice(Protocol):
    """A device behind a range of addresses. Called on a vCPU's thread, from any vCPU; it does its own locking."""

    def read(self, offset: int, size: int) -> int:
        """The value of a read of ``size`` (1, 2, 4 or 8) bytes at ``offset`` into the device's range."""

    def write(self, offset: int, size: int, value: int) -> None:
        """Takes a write of ``size`` bytes."""


class Bus:
    """An address space (MMIO or ports) of non-overlapping device ranges. They may change while vCPUs look things up:
    what is looked up in is replaced as a whole."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._map: tuple[list[int], list[tuple[int, int, BusDevice]]] = ([], [])  # bases; base, size, device

    def add(self, base: int, size: int, device: BusDevice) -> None:
        """Gives ``device`` the addresses ``base`` to ``base + size``; ValueError where they are taken."""
        bases, ranges = self._map
        at = bisect.bisect(bases, base)
        before_ok = at == 0 or ranges[at - 1][0] + ranges[at - 1][1] <= base
        if not before_ok or (at < len(bases) and base + size > bases[at]):
            raise ValueError(f"{self._name} range {base:#x}+{size:#x} overlaps another")
        self._map = ([*bases[:at], base, *bases[at:]], [*ranges[:at], (base, size, device), *ranges[at:]])

    def remove(self, base: int) -> None:
        """Nobody answers any more where ``add`` put a device. KeyError. A vCPU may be in its last call to it."""
        ranges = [r for r in self._map[1] if r[0] != base]
        if len(ranges) == len(self._map[1]):
            raise KeyError(base)
        self._map = ([r[0] for r in ranges], ranges)

    def _find(self, address: int, size: int) -> tuple[int, BusDevice] | None:
        bases, ranges = self._map
        at = bisect.bisect(bases, address) - 1
        if at < 0:
            return None
        base, length, device = ranges[at]
        if address + size > base + length:
            return None
        return address - base, device

    def read(self, address: int, size: int) -> int:
        """What a guest's read gives; all ones where nobody answers, as on a real bus."""
        found = self._find(address, size)
        if found is None:
            log.debug("%s read of nothing at %#x", self._name, address)
            return (1 << (8 * size)) - 1
        offset, device = found
        return device.read(offset, size) & ((1 << (8 * size)) - 1)

    def write(self, address: int, size: int, value: int) -> None:
        """Hands on a guest's write; dropped where nobody answers."""
        found = self._find(address, size)
        if found is None:
            log.debug("%s write to nothing at %#x", self._name, address)
            return
        offset, device = found
        device.write(offset, size, value)
