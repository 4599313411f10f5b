"""A disk under test: the blk sidecar with a driver that speaks block requests (virtio 1.2, section 5.2.6)."""

from __future__ import annotations

import contextlib
import os
import random
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness.driver import Memory, Queue, Request
from harness.sidecar import Sidecar
from motorcade.proto.messages import BlkBoot
from motorcade.sidecars.blk import overlay

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
SECTOR = 512
UNMAP = 1
F_RO, F_BLK_SIZE, F_FLUSH, F_CONFIG_WCE, F_MQ, F_DISCARD, F_WRITE_ZEROES = (1 << n for n in (5, 6, 9, 11, 12, 13, 14))
CONFIG_WCE = 32  # offset in configuration space
ENGINES = ("io_uring", "sync")

_HEADER = struct.Struct("<IIQ")
_RANGE = struct.Struct("<QII")


def header(kind: int, sector: int = 0) -> bytes:
    """The device-readable start of a request."""
    return _HEADER.pack(kind, 0, sector)


def extent(sector: int, count: int, flags: int = 0) -> bytes:
    """A segment of DISCARD or WRITE_ZEROES."""
    return _RANGE.pack(sector, count, flags)


class Driver:
    """Block requests on one queue, one at a time or many. Offsets and sizes in bytes, multiples of 512."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue

    def submit_read(self, offset: int, size: int) -> Request:
        """Makes a read available, without a kick."""
        return self.queue.submit([header(IN, offset // SECTOR)], [size, 1])

    def submit_write(self, offset: int, data: bytes) -> Request:
        """Makes a write available, without a kick."""
        return self.queue.submit([header(OUT, offset // SECTOR), data], [1])

    def read(self, offset: int, size: int) -> bytes:
        """What the disk holds; AssertionError when it says anything but OK."""
        request = self.queue.run([header(IN, offset // SECTOR)], [size, 1])
        assert request.status == OK, f"read of {size} at {offset}: status {request.status}"
        assert request.written == size + 1
        return request.data[0]

    def write(self, offset: int, data: bytes) -> int:
        """Writes; returns the status."""
        return self.queue.run([header(OUT, offset // SECTOR), data], [1]).status

    def flush(self) -> int:
        """FLUSH; returns the status."""
        return self.queue.run([header(FLUSH)], [1]).status

    def discard(self, offset: int, size: int, flags: int = 0) -> int:
        """DISCARD; returns the status."""
        return self.queue.run([header(DISCARD), extent(offset // SECTOR, size // SECTOR, flags)], [1]).status

    def write_zeroes(self, offset: int, size: int, flags: int = 0) -> int:
        """WRITE_ZEROES; returns the status."""
        return self.queue.run([header(WRITE_ZEROES), extent(offset // SECTOR, size // SECTOR, flags)], [1]).status

    def run_all(self, requests: Sequence[Request]) -> None:
        """Kicks and waits until all of these, made available before, are done. AssertionError unless all are OK."""
        self.queue.kick()
        while not all(r.done for r in requests):
            self.queue.wait(1)
        bad = [r.status for r in requests if r.status != OK]
        assert not bad, f"statuses {bad}"


class Disk(Sidecar):
    """A blk sidecar on ``path``, with ``overlay_path`` over it if one is given, which is made if it does not exist, and
    read-only overlays ``layers``, the lowest first, between them."""

    def __init__(
        self,
        path: Path,
        *,
        overlay_path: Path | None = None,
        readonly: bool = False,
        direct: bool = False,
        queues: int = 1,
        discard: bool = True,
        engine: str = "auto",
        serial: str = "serial-number",
        memory: Memory | None = None,
        cold: bool = False,
        wait: bool = True,
        layers: Sequence[Path] = (),
        incoming: bool = False,
        predecessor: Sidecar | None = None,
        takes_over: bool = False,
    ) -> None:
        flags = os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
        mode = os.O_RDONLY if readonly or overlay_path else os.O_RDWR
        fds = {"disk": os.open(path, mode | flags)}
        try:
            below = fds["disk"]
            for i, layer in enumerate(layers):
                below = fds[f"layer.{i}"] = os.open(layer, os.O_RDONLY | flags)
            if overlay_path:
                if not overlay_path.exists():
                    overlay.create(overlay_path, below, layer=bool(layers))
                fds["overlay"] = os.open(overlay_path, os.O_RDWR | flags)
            role = BlkBoot(
                device_id="disk0",
                path=str(path)[-100:],
                readonly=readonly,
                direct=direct,
                overlay=overlay_path is not None,
                serial=serial,
                queues=queues,
                discard=discard,
                io_engine=engine,
                layers=len(layers),
            )
            super().__init__(
                "blk",
                role,
                fds,
                queues=queues,
                memory=memory,
                cold=cold,
                wait=wait,
                incoming=incoming,
                predecessor=predecessor,
                takes_over=takes_over,
            )
        finally:
            for fd in fds.values():
                os.close(fd)

    def driver(self, **kwargs: bool | int) -> Driver:
        """Queue 0, activated."""
        return Driver(self.start(**kwargs)[0])  # type: ignore[arg-type]

    def counter(self, name: str) -> int:
        """One of the kind's own counters."""
        return {c.name: c.value for c in self.stats().detail}[name]


def pattern(size: int, seed: int = 1) -> bytes:
    """Bytes of which each sector is different and says where it came from."""
    return b"".join(struct.pack("<QQ", seed, n) * 32 for n in range(size // SECTOR))


def exercise(d: Driver, model: bytearray, rng: random.Random, rounds: int) -> None:
    """Random requests of every kind and size, in batches whose requests share blocks but no sectors."""
    sectors = len(model) // 512
    for _ in range(rounds):
        batch, reads = [], []
        at = rng.randrange(0, sectors // 2)
        for _ in range(rng.randint(1, 12)):
            n = rng.choice([1, 1, 1, 2, 7, 8, 8, 16, 64, 200])
            n = min(n, sectors - at)
            if n == 0:
                break
            span = slice(at * 512, (at + n) * 512)
            kind = rng.randrange(4)
            if kind == 0:
                r = d.submit_read(at * 512, n * 512)
                reads.append((r, bytes(model[span])))
            elif kind == 3:
                r = d.queue.submit([header(WRITE_ZEROES), extent(at, n, rng.choice([0, UNMAP]))], [1])
                model[span] = bytes(n * 512)
            else:
                data = rng.randbytes(n * 512)
                r = d.submit_write(at * 512, data)
                model[span] = data
            batch.append(r)
            at += n + rng.choice([0, 0, 0, 1, 8])
        d.run_all(batch)
        for r, expected in reads:
            assert r.data[0] == expected
        if rng.random() < 0.2:
            assert d.flush() == OK


FSOPEN_CLOEXEC = FSMOUNT_CLOEXEC = 1
FSCONFIG_SET_STRING, FSCONFIG_CMD_CREATE = 1, 6
SYS_FSOPEN, SYS_FSCONFIG, SYS_FSMOUNT = 430, 431, 432  # the same on every architecture


@contextlib.contextmanager
def small_tmpfs(size: int) -> Iterator[Path]:
    """A tmpfs of ``size`` bytes that is mounted nowhere, so that it is gone however the test ends. Needs root."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)

    def call(number: int, *args: object) -> int:
        result: int = libc.syscall(number, *args)
        if result < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return result

    context = call(SYS_FSOPEN, b"tmpfs", FSOPEN_CLOEXEC)
    try:
        call(SYS_FSCONFIG, context, FSCONFIG_SET_STRING, b"size", str(size).encode(), 0)
        call(SYS_FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0)
        mount = call(SYS_FSMOUNT, context, FSMOUNT_CLOEXEC, 0)
    finally:
        os.close(context)
    try:
        yield Path(f"/proc/self/fd/{mount}")
    finally:
        os.close(mount)
