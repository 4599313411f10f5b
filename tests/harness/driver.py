"""A virtio driver in Python: guest memory and split virtqueues (virtio 1.2, section 2.7) as a guest's driver sees them.

It plays the guest to a real sidecar process, with real eventfds, and can be as hostile as a guest: every ring word and
descriptor can be written raw. It is slow, and for correctness only; bench/native has the fast one.
"""

from __future__ import annotations

import mmap
import os
import select
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from motorcade.proto.memory import GuestMemory, Region, layout
from motorcade.sidecars.device import QueueConfig

DESC_F_NEXT, DESC_F_WRITE, DESC_F_INDIRECT = 1, 2, 4
AVAIL_F_NO_INTERRUPT = 1
USED_F_NO_NOTIFY = 1
DESC = struct.Struct("<QIHH")

_lock = threading.Lock()


def fence() -> None:
    """Full memory barrier: taking a lock is a locked instruction, and a driver must order its store before its load."""
    with _lock:
        pass


class LostInterrupt(AssertionError):
    """The used ring moved on, but the interrupt that the driver had asked for never came."""


class Memory:
    """Guest RAM: a sealed memfd, mapped, with an allocator of power-of-two sizes, and its dirty log. Owns both fds."""

    def __init__(
        self, size: int = 16 << 20, regions: Sequence[Region] | None = None, *, huge_pages: bool = False
    ) -> None:
        """``huge_pages``: the memfd is made of those, which have to be there."""
        self.regions = list(regions) if regions else layout(size)
        kind = os.MFD_HUGETLB if huge_pages else 0
        self.fd = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | kind)
        os.ftruncate(self.fd, max(r.offset + r.size for r in self.regions))
        self.map = GuestMemory(self.fd, self.regions)
        self.dirty_fd = os.memfd_create("dirty", os.MFD_CLOEXEC)
        os.ftruncate(self.dirty_fd, -(-os.fstat(self.fd).st_size // (4096 * 64)) * 8)
        self._dirty = mmap.mmap(self.dirty_fd, 0)
        self._free: dict[int, list[int]] = {}
        self._next = self.regions[0].gpa + 0x1000  # 0 is never a buffer: a forgotten address shows
        self._end = self.regions[0].gpa + self.regions[0].size

    def alloc(self, size: int, align: int = 16) -> int:
        """The gpa of at least ``size`` zeroed or stale bytes."""
        size = 1 << max(size - 1, align - 1, 15).bit_length()
        if free := self._free.get(size):
            return free.pop()
        at = -(-self._next // min(size, 4096)) * min(size, 4096)
        if at + size > self._end:
            raise MemoryError(f"the simulated guest has no {size} bytes left")
        self._next = at + size
        return at

    def free(self, gpa: int, size: int) -> None:
        """Gives back what ``alloc(size)`` returned."""
        self._free.setdefault(1 << max(size - 1, 15).bit_length(), []).append(gpa)

    def take_dirty(self) -> set[int]:
        """The pages of the memfd that the dirty log names, which is empty then. Only while nothing writes: this is no
        atomic exchange."""
        bits = int.from_bytes(self._dirty[:], "little")
        self._dirty[:] = bytes(len(self._dirty))
        found = set()
        while bits:
            lowest = bits & -bits
            found.add(lowest.bit_length() - 1)
            bits ^= lowest
        return found

    def pages(self) -> list[bytes]:
        """All of guest memory, by pages of the memfd."""
        size = os.fstat(self.fd).st_size
        return [os.pread(self.fd, 4096, at) for at in range(0, size, 4096)]

    def close(self) -> None:
        """Closes the memfds; the mappings go with the object."""
        os.close(self.fd)
        os.close(self.dirty_fd)


@dataclass
class Request:
    """A chain that the driver made available. ``done`` once it is in the used ring."""

    head: int
    descriptors: list[int]
    out: list[tuple[int, int]]  # (gpa, size) of the device-readable buffers
    into: list[tuple[int, int]]  # ... of the device-writable ones
    owned: list[tuple[int, int]] = field(default_factory=list)  # what goes back to the allocator at completion
    done: bool = False
    written: int = 0  # used.len
    data: list[bytes] = field(default_factory=list)  # what the writable buffers held at completion

    @property
    def status(self) -> int:
        """The last writable byte: the status of a block request."""
        return self.data[-1][-1]


class Queue:
    """The driver's end of one virtqueue. Does not own ``kick_fd`` and ``call_fd``."""

    def __init__(
        self,
        memory: Memory,
        index: int,
        size: int,
        kick_fd: int,
        call_fd: int,
        *,
        event_idx: bool = True,
        indirect: bool = False,
    ) -> None:
        self.memory, self.index, self.size = memory, index, size
        self.kick_fd, self.call_fd = kick_fd, call_fd
        self.event_idx, self.indirect = event_idx, indirect
        self.desc = memory.alloc(16 * size, 4096)
        self.driver = memory.alloc(6 + 2 * size, 4096)
        self.device = memory.alloc(6 + 8 * size, 4096)
        self._desc = memory.map.view(self.desc, 16 * size)
        self._avail = memory.map.view(self.driver, 6 + 2 * size).cast("H")
        self._used = memory.map.view(self.device, 6 + 8 * size)
        self._used16 = self._used.cast("H")
        self.restart()

    def restart(self) -> None:
        """Forgets everything in flight and zeroes the rings, as a driver does after a reset."""
        self._desc[:] = bytes(len(self._desc))
        self._avail[:] = memoryview(bytes(len(self._avail) * 2)).cast("H")
        self._used[:] = bytes(len(self._used))
        self._free = list(range(self.size))
        self._published = 0  # avail.idx as the device sees it
        self._next_avail = 0
        self._last_used = 0
        self.in_flight: dict[int, Request] = {}
        self.completed: list[Request] = []  # reaped by a wait for another one

    @property
    def config(self) -> QueueConfig:
        """What the driver would write to the transport's queue registers."""
        return QueueConfig(index=self.index, size=self.size, desc=self.desc, driver=self.driver, device=self.device)

    # Raw access, for hostile drivers and for tests of the rings themselves.

    def write_desc(self, i: int, addr: int, length: int, flags: int, nxt: int = 0) -> None:
        """Writes one descriptor as it is."""
        DESC.pack_into(self._desc, 16 * i, addr & (1 << 64) - 1, length, flags, nxt)

    def put_avail(self, head: int) -> None:
        """Writes the next avail entry without publishing it."""
        self._avail[2 + self._next_avail % self.size] = head
        self._next_avail = (self._next_avail + 1) & 0xFFFF

    def set_avail_idx(self, idx: int) -> None:
        """Publishes this index, whatever is behind it."""
        self._avail[1] = idx & 0xFFFF

    def set_used_event(self, idx: int) -> None:
        """EVENT_IDX: asks for an interrupt when the used entry ``idx`` is filled in."""
        self._avail[2 + self.size] = idx & 0xFFFF

    def set_no_interrupt(self, on: bool) -> None:
        """Without EVENT_IDX: the avail ring's NO_INTERRUPT flag."""
        self._avail[0] = AVAIL_F_NO_INTERRUPT if on else 0

    @property
    def used_idx(self) -> int:
        """used.idx as the device published it."""
        return self._used16[1]

    @property
    def used_flags(self) -> int:
        """used.flags."""
        return self._used16[0]

    @property
    def avail_event(self) -> int:
        """EVENT_IDX: the avail index at which the device wants a kick."""
        return self._used16[2 + 4 * self.size]

    # The honest driver.

    def submit(
        self, out: Sequence[bytes] = (), into: Sequence[int] = (), *, indirect: bool | None = None, publish: bool = True
    ) -> Request:
        """Makes a chain available: buffers with these bytes to be read, buffers of these sizes to be written."""
        memory = self.memory
        outs = [(memory.alloc(len(b)), len(b)) for b in out]
        ins = [(memory.alloc(n), n) for n in into]
        for (gpa, _), data in zip(outs, out, strict=True):
            memory.map.write(gpa, data)
        for gpa, n in ins:
            memory.map.write(gpa, b"\xa5" * n)  # so that a buffer that was never written shows
        request = self.submit_at(outs, ins, indirect=indirect, publish=publish)
        request.owned += outs + ins
        return request

    def submit_at(
        self,
        out: Sequence[tuple[int, int]],
        into: Sequence[tuple[int, int]],
        *,
        indirect: bool | None = None,
        publish: bool = True,
    ) -> Request:
        """Like ``submit``, of buffers of the caller's in guest memory, as (gpa, size)."""
        parts = [(gpa, n, 0) for gpa, n in out] + [(gpa, n, DESC_F_WRITE) for gpa, n in into]
        table = None
        if self.indirect if indirect is None else indirect:
            entries = b"".join(
                DESC.pack(gpa, n, flags | (DESC_F_NEXT if i + 1 < len(parts) else 0), i + 1)
                for i, (gpa, n, flags) in enumerate(parts)
            )
            table = (self.memory.alloc(len(entries)), len(entries))
            self.memory.map.write(table[0], entries)
            parts = [(*table, DESC_F_INDIRECT)]
        if len(parts) > len(self._free):
            raise BufferError(f"queue {self.index} has {len(self._free)} free descriptors, {len(parts)} are needed")
        ids = [self._free.pop() for _ in parts]
        for k, (gpa, n, flags) in enumerate(parts):
            more = k + 1 < len(parts)
            self.write_desc(ids[k], gpa, n, flags | (DESC_F_NEXT if more else 0), ids[k + 1] if more else 0)
        request = Request(ids[0], ids, list(out), list(into), [table] if table else [])
        self.in_flight[request.head] = request
        self.put_avail(request.head)
        if publish:
            self.publish()
        return request

    def publish(self) -> None:
        """Lets the device see what was submitted. x86 keeps these stores in order."""
        self.set_avail_idx(self._next_avail)

    def kick(self, *, force: bool = False) -> bool:
        """Notifies the device if it wants that. True: a notification was sent."""
        old, new = self._published, self._avail[1]
        self._published = new
        fence()
        if self.event_idx:
            wanted = (new - self.avail_event - 1) & 0xFFFF < (new - old) & 0xFFFF
        else:
            wanted = not self.used_flags & USED_F_NO_NOTIFY
        if force or wanted:
            os.eventfd_write(self.kick_fd, 1)
        return force or wanted

    def reap(self) -> list[Request]:
        """Takes what is in the used ring. A head that is not in flight is the device's fault."""
        found = []
        while self._last_used != self.used_idx:
            head, written = struct.unpack_from("<II", self._used, 4 + 8 * (self._last_used % self.size))
            self._last_used = (self._last_used + 1) & 0xFFFF
            assert head in self.in_flight, f"queue {self.index}: used head {head} was not in flight"
            request = self.in_flight.pop(head)
            assert written <= sum(n for _, n in request.into), f"used.len {written} is more than was writable"
            request.done, request.written = True, written
            request.data = [self.memory.map.read(gpa, n) for gpa, n in request.into]
            for gpa, n in request.owned:
                self.memory.free(gpa, n)
            self._free += request.descriptors
            found.append(request)
        return found

    def wait_interrupt(self, timeout: float) -> bool:
        """Waits for the device's interrupt and consumes it."""
        if not select.select([self.call_fd], [], [], timeout)[0]:
            return False
        os.eventfd_read(self.call_fd)
        return True

    def wait(self, n: int = 1, timeout: float = 20.0) -> list[Request]:
        """Waits, by interrupts alone, until ``n`` requests have completed; returns them in the device's order."""
        deadline = time.monotonic() + timeout
        while True:
            self.completed += self.reap()
            if len(self.completed) >= n:
                found, self.completed = self.completed[:n], self.completed[n:]
                return found
            # An interrupt at the next used entry; after the fence the device sees that, or we see its entry.
            self.set_used_event(self._last_used)
            self.set_no_interrupt(False)
            fence()
            if self.used_idx != self._last_used:
                continue
            if not self.wait_interrupt(deadline - time.monotonic() if deadline > time.monotonic() else 0):
                if self.used_idx != self._last_used:
                    raise LostInterrupt(f"queue {self.index}: used.idx {self.used_idx}, no interrupt in {timeout} s")
                raise TimeoutError(f"queue {self.index}: {len(self.completed)} of {n} requests after {timeout} s")

    def run(self, out: Sequence[bytes] = (), into: Sequence[int] = (), *, indirect: bool | None = None) -> Request:
        """Submits one chain, kicks, and waits until that one is done."""
        request = self.submit(out, into, indirect=indirect)
        self.kick()
        others: list[Request] = []
        while not request.done:
            others += [r for r in self.wait(1) if r is not request]
        self.completed = others + self.completed
        return request
