"""What machines weigh on their host: proportional set sizes, with the guest's own memory told apart."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+ *(.*)$")


@dataclass(frozen=True)
class Weight:
    """Bytes. ``pss``: without the guest's memory; ``guest``: the guest's memory, as mapped."""

    pss: int = 0
    guest: int = 0

    def __add__(self, other: Weight) -> Weight:
        return Weight(self.pss + other.pss, self.guest + other.guest)


def weigh(pids: Iterable[int], guest: str) -> Weight:
    """The PSS of these processes. Mappings of a file whose name contains ``guest`` are the guest's memory.

    A page that several processes map counts once in all, each process having its share; so the weights of a whole
    family, zygote included, add up to what it takes. What the kernel holds for them is not in it.
    """
    return sum((_of(pid, guest) for pid in pids), Weight())


def _of(pid: int, guest: str) -> Weight:
    pss = guests = 0
    is_guest = False
    with Path(f"/proc/{pid}/smaps").open() as lines:
        for line in lines:
            if line.startswith("Pss: "):
                size = int(line.split()[1]) << 10
                pss, guests = (pss, guests + size) if is_guest else (pss + size, guests)
            elif mapping := _MAPPING.match(line):
                is_guest = guest in mapping[1]
    return Weight(pss, guests)


def available() -> int:
    """MemAvailable of this host, in bytes: falls by what processes and kernel take together."""
    text = Path("/proc/meminfo").read_text()
    match = re.search(r"^MemAvailable: +(\d+) kB", text, re.M)
    assert match is not None
    return int(match[1]) << 10
