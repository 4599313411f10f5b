"""The blk sidecar: a disk (virtio 1.2, section 5.2) from a file or block device, with an optional overlay.

The data path is C (sidecars/native/blk.h); this is its life cycle, and what it says to the log.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from motorcade.proto.messages import BlkBoot, Counter, StatsReport
from motorcade.sidecars import _blk
from motorcade.sidecars import device as base
from motorcade.sidecars._blk import ffi, lib
from motorcade.sidecars.blk import overlay

if TYPE_CHECKING:
    from motorcade.proto.memory import GuestMemory
    from motorcade.proto.messages import Boot, Inject

log = logging.getLogger("motorcade.blk")

ENGINES = {"auto": lib.MC_BLK_AUTO, "io_uring": lib.MC_BLK_URING, "sync": lib.MC_BLK_SYNC}
OPERATIONS = {
    lib.VIRTIO_BLK_T_IN: "read",
    lib.VIRTIO_BLK_T_OUT: "write",
    lib.VIRTIO_BLK_T_FLUSH: "flush",
    lib.VIRTIO_BLK_T_DISCARD: "discard",
    lib.VIRTIO_BLK_T_WRITE_ZEROES: "write zeroes",
}
INJECTED = {
    "read": lib.MC_BLK_INJECT_READ,
    "write": lib.MC_BLK_INJECT_WRITE,
    "flush": lib.MC_BLK_INJECT_FLUSH,
    "discard": lib.MC_BLK_INJECT_DISCARD,
}
STATUSES = {"": lib.VIRTIO_BLK_S_OK, "ioerr": lib.VIRTIO_BLK_S_IOERR, "unsupp": lib.VIRTIO_BLK_S_UNSUPP}
MAX_DELAY = (1 << 24) - 1  # milliseconds
WCE_OFFSET = ffi.offsetof("struct virtio_blk_config", "wce")
STATE_VERSION = 1
_STATE = struct.Struct(
    "<B3xIQ"
)  # write-back cache, block size, capacity in sectors: what the driver was told, and chose
LOG_INTERVAL = 1.0  # seconds between two log lines about failed requests


class BlkDevice(base.Device):
    """One disk. Raises ValueError, OverlayError or OSError when it cannot be opened."""

    ffi, lib = ffi, lib
    sandbox_role = "blk"
    virtio_type = lib.VIRTIO_ID_BLOCK

    def __init__(self, boot: Boot, fds: Mapping[str, int], memory: GuestMemory) -> None:
        super().__init__(boot, fds, memory)
        role = boot.role
        if not isinstance(role, BlkBoot):
            raise ValueError("a blk sidecar was given the Boot of another kind")
        if role.io_engine not in ENGINES:
            raise ValueError(f"unknown ioEngine {role.io_engine!r}; known: {', '.join(ENGINES)}")
        self.role = role
        self._mem = ffi.new("struct mc_mem *")
        base.init_memory(ffi, self._mem, memory, self.dirty)
        self._isr = base.map_isr(fds["isr"])
        self._active: list[int] = []
        self._logged = (0.0, 0)  # when, and how many failures until then
        params = self._params(role)
        error = ffi.new("char[256]")
        self._blk = lib.mc_blk_new(params, error)
        if self._blk == ffi.NULL:
            raise ValueError(f"{role.path}: {ffi.string(error).decode()}")
        if not role.readonly and self._counters.overlay_blocks:
            log.info("the overlay holds %d blocks of 4 KiB", self._counters.overlay_blocks)
        log.info("%s: %s, %d sectors", role.path, self.engine, self._config.capacity)
        if role.io_engine == "auto" and self.engine != "io_uring":
            log.warning("io_uring is not permitted here: plain system calls, one transfer at a time")

    def _params(self, role: BlkBoot) -> _blk.CData:
        if role.layers > (overlay.MAX_LAYERS if role.overlay else 0):
            raise ValueError(f"{role.layers} layers: below an overlay up to {overlay.MAX_LAYERS} are possible")
        files = [self.fds[f"layer.{i}"] for i in range(role.layers)]
        files += [self.fds["overlay"]] if role.overlay else []
        headers = overlay.open_stack([self.fds["disk"], *files])
        found = [
            {"fd": fd, "map": header.map_offset, "data": header.data_offset}
            for fd, header in zip(files, headers, strict=True)
        ]
        top = found.pop() if found else {"fd": -1}
        return ffi.new(
            "struct mc_blk_params *",
            {
                "disk_fd": self.fds["disk"],
                "event_fd": self.event_fd,
                "engine": ENGINES[role.io_engine],
                "readonly": role.readonly,
                "direct": role.direct,
                "discard": role.discard,
                "removed": role.removed,
                "queues": role.queues,
                "overlay_size": headers[-1].size if headers else 0,
                "overlay": top,
                "layers": len(found),
                "layer": found,
                "serial": role.serial.encode()[: lib.VIRTIO_BLK_ID_BYTES],
                "mem": self._mem,
                "isr": ffi.cast("struct mc_isr *", ffi.from_buffer(self._isr)),
                "watch": base.watched(ffi, self.watch),
                "keep": self.keep.native,
                "keep_map": self.keep.kind if self.keep.kind_size else ffi.NULL,
                "keep_map_size": self.keep.kind_size,
            },
        )

    @property
    def _counters(self) -> _blk.CData:
        return lib.mc_blk_counters(self._blk)

    @property
    def _config(self) -> _blk.CData:
        return lib.mc_blk_config(self._blk, ffi.new("uint32_t *"))

    @property
    def engine(self) -> str:
        """What does the I/O: io_uring or sync."""
        return str(ffi.string(lib.mc_blk_engine_name(self._blk)).decode())

    @property
    def beat(self) -> _blk.CData:
        return lib.mc_blk_beat(self._blk)

    @property
    def features(self) -> int:
        return int(lib.mc_blk_features(self._blk)) | base.RING_FEATURES

    @property
    def queue_sizes(self) -> list[int]:
        return [lib.MC_BLK_QUEUE_SIZE] * self.role.queues

    @property
    def config(self) -> bytes:
        size = ffi.new("uint32_t *")
        config = lib.mc_blk_config(self._blk, size)
        return bytes(ffi.buffer(config, size[0]))

    def activate(self, features: int, queues: Sequence[base.QueueConfig]) -> None:
        for q in queues:
            vq = lib.mc_blk_queue(self._blk, q.index)
            kick, call = self.fds[f"kick.{q.index}"], self.fds["call.0"]
            base.init_queue(lib, vq, q, features, kick_fd=kick, call_fd=call, keep=self.keep)
        self._active = [q.index for q in queues]
        lib.mc_blk_activate(self._blk, features, sum(1 << i for i in self._active))

    def run(self) -> None:
        if err := lib.mc_blk_run(self._blk):
            raise OSError(err, f"the {self.engine} loop cannot go on: {os.strerror(err)}")

    def stop(self) -> None:
        lib.mc_blk_stop(self._blk)

    def reset(self) -> None:
        self._active = []
        lib.mc_blk_reset(self._blk)

    def quiesce(self) -> None:
        """The file, or the overlay, holds all that the driver has written, and can be copied."""
        self._sync()

    def save(self) -> base.DeviceState:
        """What was written is in the files; what is left is the cache mode, and what the driver knows the disk by."""
        c = self._config
        queues = tuple(base.queue_state(lib.mc_blk_queue(self._blk, i)) for i in sorted(self._active))
        return base.DeviceState(STATE_VERSION, _STATE.pack(bool(c.wce), c.blk_size, c.capacity), queues)

    def load(self, state: base.DeviceState) -> None:
        if state.version != STATE_VERSION:
            raise ValueError(f"a disk's state of version {state.version}; this program knows version {STATE_VERSION}")
        if len(state.data) != _STATE.size:
            raise ValueError(f"a disk's state of {len(state.data)} bytes, not {_STATE.size}")
        writeback, block, capacity = _STATE.unpack(state.data)
        c = self._config
        if state.data != _STATE.pack(bool(writeback), block, capacity):
            raise ValueError("a disk's state with a cache mode that does not exist")
        if capacity != c.capacity:
            raise ValueError(f"{self.role.path} has {c.capacity} sectors, the saved disk had {capacity}")
        if not block or block % c.blk_size:
            raise ValueError(
                f"{self.role.path} takes no less than {c.blk_size} bytes at a time, the saved disk took {block}"
            )
        if not self.role.readonly:
            lib.mc_blk_set_writeback(self._blk, bool(writeback))

    def broken_queues(self) -> list[base.BrokenQueue]:
        self._log_failures()
        return base.broken(ffi, lib, [lib.mc_blk_queue(self._blk, i) for i in self._active])

    def write_config(self, offset: int, data: bytes) -> None:
        # Only the cache mode is writable, a byte (virtio 1.2, section 5.2.4.2).
        if offset == WCE_OFFSET and len(data) == 1 and not self.role.readonly:
            lib.mc_blk_set_writeback(self._blk, data != b"\0")

    def inject(self, what: Inject) -> None:
        """Requests of these kinds fail as if the host had failed them, or wait, or both. A stop lets none wait."""
        if what.operation != "any" and what.operation not in INJECTED:
            raise ValueError(f"a disk has no {what.operation} requests (any, {', '.join(INJECTED)})")
        if what.status not in STATUSES:
            raise ValueError(f"a disk does not answer {what.status} (ioerr, unsupp)")
        if what.delay_ms > MAX_DELAY:
            raise ValueError(f"the longest delay is {MAX_DELAY} ms")
        if what.count and not what.status and not what.delay_ms:
            raise ValueError("neither a status nor a delay: nothing would happen")
        ops = sum(INJECTED.values()) if what.operation == "any" else INJECTED[what.operation]
        lib.mc_blk_inject(self._blk, ops, what.count, STATUSES[what.status], what.delay_ms)

    def _log_failures(self) -> None:
        """One line a second at most: a guest can ask a full disk to be written to as often as it likes."""
        c = self._counters
        when, seen = self._logged
        if c.io_errors == seen or time.monotonic() - when < LOG_INTERVAL:
            return
        log.error(
            "%s: %s at byte %d failed: %s (%d failed requests since the last report)",
            self.role.path,
            OPERATIONS.get(c.last_error_type, "request"),
            c.last_error_offset,
            os.strerror(c.last_error),
            c.io_errors - seen,
        )
        self._logged = (time.monotonic(), c.io_errors)

    def stats(self) -> StatsReport:
        c = self._counters
        return StatsReport(
            queues=tuple(base.queue_stats(self.watch, i) for i in range(self.role.queues)),
            detail=tuple(Counter(name.replace("_", "-"), int(getattr(c, name))) for name in COUNTERS),
        )

    def close(self) -> None:
        self._sync()

    def _sync(self) -> None:
        if err := lib.mc_blk_sync(self._blk):
            raise OSError(err, f"{self.role.path}: what was written may not be permanent: {errno.errorcode.get(err)}")


COUNTERS = [name for name, _ in ffi.typeof("struct mc_blk_counters").fields]
