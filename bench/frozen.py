"""What the benches of templates share: the guest that is frozen, and what is seen of it from outside.

The guest (tests/guests/serve.c) fills most of its RAM, 60% of each MiB with data, and then beats: every BEAT ticks of
the TSC it writes a '.' to its 16550 and looks whether a question came in. A clock that jumps ends a beat, so a restored
guest's first instructions write a byte, the same under every VMM. BEAT is some 40 us: what a guest whose clock did not
jump can be late.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
PAGE = 4096
PERCENT = 60
BEAT = 100_000  # TSC ticks
START = 4 * MIB  # the guest's image lies below
TAIL = 4 * MIB  # some firmware keeps tables at the end of RAM
DISK = 16 * MIB
DEADLINE = 60.0  # seconds


def pages(memory: int) -> int:
    """Of a guest with ``memory`` bytes of RAM, those that ``ram=`` works on."""
    return (memory - START - TAIL) // PAGE


def cmdline(memory: int, beat: int = BEAT, dirty: int = 0) -> str:
    """``dirty``: pages written at each beat."""
    return f"ram={START}:{pages(memory)}:{PERCENT} serve={beat}:{dirty}"


def host_tsc_hz() -> float:
    """The rate of this host's TSC, by its own counter: that of a guest that beats at a rate in milliseconds."""
    match = re.search(r"^cpu MHz\s*: ([0-9.]+)$", Path("/proc/cpuinfo").read_text(), re.M)
    if match is None:
        raise SystemExit("/proc/cpuinfo has no CPU frequency")
    return float(match[1]) * 1e6


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A directory on tmpfs, removed at the end: templates as they are in the page cache, without a disk's noise."""
    folder = Path(tempfile.mkdtemp(prefix="mc-bench-", dir="/dev/shm"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@dataclass(frozen=True)
class Way:
    """A way to restore a template; each call makes a machine and ends it again. All in seconds since the request."""

    to_paused: Callable[[], float]
    """Until the machine is restored and could run, which it does not."""
    to_answer: Callable[[], tuple[float, float]]
    """Until its first byte, and until its answer to a question that is typed then."""

    POINTS = ("restored, paused", "first instruction", "answer on console")

    def measure(self) -> dict[str, float]:
        """Milliseconds by end point, of two machines."""
        seconds = (self.to_paused(), *self.to_answer())
        return {point: s * 1000 for point, s in zip(self.POINTS, seconds, strict=True)}


class Console:
    """A guest's console: a stream socket or a pty's end, owned, where the guest's bytes come out."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.seen = b""

    @classmethod
    def connect(cls, path: str) -> Console:
        """To a console socket."""
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(path)
            return cls(s.detach())

    def ask(self, question: bytes) -> None:
        """Types it."""
        os.write(self.fd, question)

    def read(self, deadline: float = DEADLINE) -> bytes:
        """What came, at least a byte; SystemExit where nothing does."""
        if not select.select([self.fd], [], [], deadline)[0]:
            raise SystemExit(f"the guest is silent; it said {self.seen[-200:]!r}")
        data = os.read(self.fd, 1 << 16)
        if not data:
            raise SystemExit(f"the console was closed; the guest said {self.seen[-200:]!r}")
        return data

    def until(self, pattern: bytes, deadline: float = DEADLINE) -> re.Match[bytes]:
        """Reads until ``pattern`` matches, and forgets everything up to its end."""
        end = time.monotonic() + deadline
        while not (match := re.search(pattern, self.seen)):
            self.seen += self.read(max(0.0, end - time.monotonic()))
        self.seen = self.seen[match.end() :]
        return match

    def drain(self, silence: float = 0.3) -> int:
        """Reads what is there, until nothing comes for ``silence`` seconds; its number of bytes."""
        count = 0
        while select.select([self.fd], [], [], silence)[0]:
            count += len(self.read())
        return count

    def first_and_answer(self, started: float, old: int = 0) -> tuple[float, float]:
        """Seconds since ``started`` (time.monotonic()) until the first byte, and until the answer to '?'.

        ``old``: bytes that are shown before, which the guest wrote before it was frozen.
        """
        data = self.read()
        while len(data) <= old:
            data += self.read()
        first = time.monotonic()
        self.seen = data[old:]
        if not self.seen.startswith(b"."):
            raise SystemExit(f"the guest began with {self.seen!r}")
        self.ask(b"?")
        self.until(rb"pong [0-9a-f]+\n")
        return first - started, time.monotonic() - started

    def settle(self, *, asleep: bool) -> None:
        """Brings the guest to what it will be frozen in: beating, or asleep between questions."""
        if asleep:
            self.ask(b"z")
        self.until(rb"dozing\n" if asleep else rb"\.{10}")

    def tsc_hz(self) -> float:
        """The rate of the guest's TSC."""
        seen = []
        for pause in (0.2, 0.0):
            self.ask(b"?")
            ticks = int(self.until(rb"pong ([0-9a-f]+)\n")[1], 16)
            seen.append((ticks, time.monotonic()))
            time.sleep(pause)
        (start, since), (end, until) = seen
        return (end - start) / (until - since)

    def touch(self, how: bytes, count: int) -> list[int]:
        """TSC ticks of each of ``count`` first touches; ``how``: b"r" or b"w". SystemExit where data is wrong."""
        self.ask(b"%s%d." % (how, count))
        match = self.until(rb"touched ([0-9a-f]+) bad ([0-9a-f]+)((?: [0-9a-f]+)*)\n")
        if int(match[1], 16) != count or int(match[2], 16):
            raise SystemExit(f"{count} touches asked for: {match[0][:100]!r}")
        return [int(ticks, 16) for ticks in match[3].split()]

    def check(self) -> None:
        """The guest looks at all of its data; SystemExit where any is wrong."""
        self.ask(b"c")
        match = self.until(rb"bad ([0-9a-f]+)\n", deadline=300)
        if int(match[1], 16):
            raise SystemExit(f"{int(match[1], 16)} words of the guest's memory are wrong")

    def close(self) -> None:
        """Leaves it."""
        os.close(self.fd)
