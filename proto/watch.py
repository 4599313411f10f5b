"""The memfd through which a process can be watched, without a word said to it (sidecars/native/watch.h).

Counters of each queue, and a ring of events that are recorded while somebody wants them. The supervisor makes one a
sidecar, and one for the core, whose ring holds control messages instead (proto/tap.py). What is read here was written
by a process that may be hostile: each value is copied once, and no more is believed of it than that it is a number.
"""

from __future__ import annotations

import enum
import mmap
import os
import struct
from dataclasses import dataclass

VERSION = 1
MAX_QUEUES = 64
QUEUES_AT, QUEUE_SIZE = 512, 512
RING_AT = 36864
EVENTS = 32768  # in a sidecar's ring
EVENT_SIZE = 32
SIZE = RING_AT + EVENTS * EVENT_SIZE
BUCKETS = 40  # bucket n counts 2**n to 2**(n+1) - 1 ns; the last takes what is longer
NO_QUEUE = 255

_ON_AT, _NEXT_AT = 4, 64
_QUEUE = struct.Struct("<51Q")
_EVENT = struct.Struct("<QQqIHBB")
_U64 = (1 << 64) - 1


class Kind(enum.IntEnum):
    """Of an event; the value is its bit in the word that says what is recorded."""

    TAKE = 0
    PUSH = 1
    KICK = 2
    INTERRUPT = 3
    SUBMIT = 4
    COMPLETE = 5
    ERROR = 6


ALL_KINDS = (1 << len(Kind)) - 1


@dataclass(frozen=True, slots=True)
class QueueCounters:
    """Of one queue since its device was made; times in nanoseconds."""

    requests: int
    bytes_in: int
    bytes_out: int
    errors: int
    kicks: int
    interrupts: int
    suppressed: int
    taken: int
    in_flight: int
    last_avail: int
    latency_ns: int
    latency: tuple[int, ...]

    @property
    def kicks_suppressed(self) -> int:
        """Chains that came without a notification of their own."""
        return max(0, self.taken - self.kicks)


@dataclass(frozen=True, slots=True)
class Event:
    """One of a sidecar's ring. ``arg`` and ``length`` mean what watch.h says of the kind."""

    number: int
    ns: int
    kind: int
    queue: int
    head: int
    length: int
    arg: int


def make(name: str) -> int:
    """A memfd for one process (``name``, for people), to be closed by the caller. Nobody can resize it. Errors:
    OSError."""
    import fcntl

    fd = os.memfd_create(f"motorcade-watch-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, SIZE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        os.pwrite(fd, VERSION.to_bytes(4, "little"), 0)
    except OSError:
        os.close(fd)
        raise
    return fd


def map_or_make(fd: int | None) -> mmap.mmap:
    """For the process that is watched: the mapping, which the caller owns. Without a descriptor, or with one of another
    version's layout, memory that nobody looks at."""
    if fd is not None and os.fstat(fd).st_size == SIZE:
        mapping = mmap.mmap(fd, SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        if int.from_bytes(mapping[:4], "little") == VERSION:
            return mapping
        mapping.close()
    return mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def counters(mapping: mmap.mmap, index: int) -> QueueCounters:
    """Of queue ``index``, below MAX_QUEUES. Each number is exact; together they are not one moment's."""
    if not 0 <= index < MAX_QUEUES:
        raise IndexError(index)
    return counters_of(mapping[QUEUES_AT + index * QUEUE_SIZE : QUEUES_AT + (index + 1) * QUEUE_SIZE])


def counters_of(data: bytes) -> QueueCounters:
    """From the QUEUE_SIZE bytes of a queue."""
    values = _QUEUE.unpack_from(data)
    (requests, bytes_in, bytes_out, errors, kicks, interrupts, suppressed, taken, in_flight, last, took) = values[:11]
    return QueueCounters(
        requests, bytes_in, bytes_out, errors, kicks, interrupts, suppressed, taken, in_flight, last, took, values[11:]
    )


class Switch:
    """The word of a mapping that says which events are recorded. Two have a half of it each: the supervisor for its
    clients, and the core for QMP."""

    def __init__(self, mapping: mmap.mmap, *, qmp: bool) -> None:
        """The mapping stays the caller's, and open."""
        # An aligned store of two bytes is one store: the other half is never written.
        self._half = memoryview(mapping)[_ON_AT : _ON_AT + 4].cast("H")
        self._index = 1 if qmp else 0

    @property
    def kinds(self) -> int:
        """Bits of Kind, of this half."""
        return self._half[self._index]

    @kinds.setter
    def kinds(self, bits: int) -> None:
        self._half[self._index] = bits & 0xFFFF

    def release(self) -> None:
        """Lets go of the mapping."""
        self._half.release()


class Ring:
    """A reader of a ring, from the moment it is made. Any number of them; the writer knows of none."""

    def __init__(self, mapping: mmap.mmap, slots: int = EVENTS, slot_size: int = EVENT_SIZE) -> None:
        """The mapping stays the caller's, and open."""
        self._mapping, self._slots, self._size = mapping, slots, slot_size
        self.position = self._next()
        self.lost = 0  # slots that were overwritten before they were read, in all
        self._unfinished = -1

    def _next(self) -> int:
        return int.from_bytes(self._mapping[_NEXT_AT : _NEXT_AT + 8], "little")

    def read(self, limit: int) -> tuple[int, bytes]:
        """The next slots in order, at most ``limit``: the number of the first, and their bytes. None: empty bytes.

        Slots lost on the way show as a number that jumps, and in ``lost``."""
        end = self._next()
        ahead = (end - self.position) & _U64
        if ahead >= 1 << 63:  # it has gone backwards: a writer that lies, or somebody emptied the ring
            self.position, ahead = end, 0
        if ahead > self._slots:
            self._skip(ahead - self._slots)
            ahead = self._slots
        count = min(ahead, limit)
        if not count:
            return self.position, b""
        at = self.position % self._slots
        part = min(count, self._slots - at)
        base = RING_AT + at * self._size
        data = self._mapping[base : base + part * self._size]
        if part < count:
            data += self._mapping[RING_AT : RING_AT + (count - part) * self._size]
        # What was being overwritten while it was copied is worth nothing.
        over = ((self._next() - self.position) & _U64) - self._slots
        if over > 0:
            over = min(over, count)
            self._skip(over)
            data, count = data[over * self._size :], count - over
        # The last ones may be half written: left for the next time, once.
        first, whole = self.position, count
        while whole and count - whole < 16 and self._seq(data, whole - 1) != first + whole:
            whole -= 1
        if whole < count and first + whole != self._unfinished:
            self._unfinished = first + whole
            data, count = data[: whole * self._size], whole
        self.position = (first + count) & _U64
        return first, data

    def _skip(self, n: int) -> None:
        self.lost += n
        self.position = (self.position + n) & _U64

    def _seq(self, data: bytes, i: int) -> int:
        return int.from_bytes(data[i * self._size : i * self._size + 8], "little")


def events(first: int, data: bytes) -> tuple[list[Event], int]:
    """What Ring.read gave, or a copy of it that came another way; and how many slots in it hold no event."""
    found, torn = [], 0
    for i, (seq, ns, arg, length, head, queue, kind) in enumerate(
        _EVENT.iter_unpack(data[: len(data) // EVENT_SIZE * EVENT_SIZE])
    ):
        if seq != (first + i + 1) & _U64:
            torn += 1
        else:
            found.append(Event(first + i, ns, kind, queue, head, length, arg))
    return found, torn
