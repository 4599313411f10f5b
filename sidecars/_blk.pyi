"""The blk sidecar's C data path (native/blk.h, virtqueue.h and sandbox.h). cffi's C objects are Any."""

from typing import Any, TypeAlias

CData: TypeAlias = Any

class _Lib:
    MC_BLK_MAX_QUEUES: int
    MC_BLK_QUEUE_SIZE: int
    MC_BLK_OVERLAY_BLOCK: int
    MC_BLK_MAX_LAYERS: int
    MC_BLK_INJECT_READ: int
    MC_BLK_INJECT_WRITE: int
    MC_BLK_INJECT_FLUSH: int
    MC_BLK_INJECT_DISCARD: int
    MC_BLK_AUTO: int
    MC_BLK_URING: int
    MC_BLK_SYNC: int
    VIRTIO_ID_BLOCK: int
    VIRTIO_BLK_ID_BYTES: int
    VIRTIO_BLK_F_SEG_MAX: int
    VIRTIO_BLK_F_RO: int
    VIRTIO_BLK_F_BLK_SIZE: int
    VIRTIO_BLK_F_FLUSH: int
    VIRTIO_BLK_F_TOPOLOGY: int
    VIRTIO_BLK_F_CONFIG_WCE: int
    VIRTIO_BLK_F_MQ: int
    VIRTIO_BLK_F_DISCARD: int
    VIRTIO_BLK_F_WRITE_ZEROES: int
    VIRTIO_BLK_T_IN: int
    VIRTIO_BLK_T_OUT: int
    VIRTIO_BLK_T_FLUSH: int
    VIRTIO_BLK_T_GET_ID: int
    VIRTIO_BLK_T_DISCARD: int
    VIRTIO_BLK_T_WRITE_ZEROES: int
    VIRTIO_BLK_S_OK: int
    VIRTIO_BLK_S_IOERR: int
    VIRTIO_BLK_S_UNSUPP: int

    def mc_blk_new(self, params: CData, error: CData, /) -> CData: ...
    def mc_blk_free(self, b: CData, /) -> None: ...
    def mc_blk_features(self, b: CData, /) -> int: ...
    def mc_blk_config(self, b: CData, size: CData, /) -> CData: ...
    def mc_blk_engine_name(self, b: CData, /) -> CData: ...
    def mc_blk_counters(self, b: CData, /) -> CData: ...
    def mc_blk_queue(self, b: CData, i: int, /) -> CData: ...
    def mc_blk_activate(self, b: CData, features: int, queue_mask: int, /) -> None: ...
    def mc_blk_run(self, b: CData, /) -> int: ...
    def mc_blk_stop(self, b: CData, /) -> None: ...
    def mc_blk_reset(self, b: CData, /) -> None: ...
    def mc_blk_set_writeback(self, b: CData, on: bool, /) -> None: ...
    def mc_blk_inject(self, b: CData, ops: int, count: int, status: int, delay_ms: int, /) -> None: ...
    def mc_blk_sync(self, b: CData, /) -> int: ...
    def mc_vq_init(self, vq: CData, size: int, desc: int, avail: int, used: int, /) -> int: ...
    def mc_vq_strerror(self, error: int, /) -> CData: ...
    MC_SANDBOX_USER: int
    MC_SANDBOX_MOUNT: int
    MC_SANDBOX_IPC: int
    MC_SANDBOX_UTS: int
    MC_SANDBOX_NET: int
    MC_SANDBOX_LANDLOCK: int
    MC_SANDBOX_STATUS: int
    def mc_sandbox_enter(self, limits: CData, had: CData, step: CData, /) -> int: ...
    def mc_sandbox_close(self, program: CData, size: int, words: CData, step: CData, /) -> int: ...
    def mc_sandbox_sanitized(self) -> bool: ...
    def mc_uffd_open(self, device_fd: int, /) -> int: ...
    def mc_uffd_register(self, uffd: int, address: int, size: int, /) -> int: ...

ffi: Any
lib: _Lib
