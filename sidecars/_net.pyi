"""The net sidecar's C data path (native/net.h and native/virtqueue.h). cffi's C objects are Any."""

from typing import Any

class _Lib:
    MC_NET_MAX_PAIRS: int
    MC_NET_QUEUE_SIZE: int
    MC_NET_CTRL_SIZE: int
    MC_NET_MAX_FRAME: int
    MC_NET_TAP: int
    MC_NET_PASST: int
    MC_NET_LINK: int
    MC_TAP_OPEN_TUN: int
    MC_TAP_SETIFF: int
    MC_TAP_ONE_QUEUE: int
    MC_TAP_HEADER: int
    VIRTIO_NET_F_CSUM: int
    VIRTIO_NET_F_GUEST_CSUM: int
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS: int
    VIRTIO_NET_F_MTU: int
    VIRTIO_NET_F_MAC: int
    VIRTIO_NET_F_GUEST_TSO4: int
    VIRTIO_NET_F_GUEST_TSO6: int
    VIRTIO_NET_F_GUEST_ECN: int
    VIRTIO_NET_F_GUEST_UFO: int
    VIRTIO_NET_F_HOST_TSO4: int
    VIRTIO_NET_F_HOST_TSO6: int
    VIRTIO_NET_F_HOST_ECN: int
    VIRTIO_NET_F_HOST_UFO: int
    VIRTIO_NET_F_MRG_RXBUF: int
    VIRTIO_NET_F_STATUS: int
    VIRTIO_NET_F_CTRL_VQ: int
    VIRTIO_NET_F_CTRL_RX: int
    VIRTIO_NET_F_MQ: int
    VIRTIO_NET_F_CTRL_MAC_ADDR: int
    VIRTIO_NET_S_LINK_UP: int

    def mc_net_open(
        self, mem: Any, isr: Any, backend: int, fds: Any, pairs: int, mac: bytes, mtu: int, capture: int, /
    ) -> Any: ...
    def mc_net_close(self, net: Any, /) -> int: ...
    def mc_net_features(self, net: Any, /) -> int: ...
    def mc_net_event_fd(self, net: Any, /) -> int: ...
    def mc_net_get_status(self, net: Any, status: Any, /) -> None: ...
    def mc_net_set_features(self, net: Any, features: int, /) -> int: ...
    def mc_net_set_queue(
        self,
        net: Any,
        index: int,
        size: int,
        desc: int,
        avail: int,
        used: int,
        last_avail: int,
        used_idx: int,
        kick: int,
        call: int,
        /,
    ) -> int: ...
    def mc_net_queue(self, net: Any, index: int, /) -> Any: ...
    def mc_net_run(self, net: Any, /) -> int: ...
    def mc_net_stop(self, net: Any, /) -> None: ...
    def mc_net_reset(self, net: Any, /) -> None: ...
    def mc_tap_open(self, ifname: bytes, queues: int, fds: Any, step: Any, /) -> int: ...
    def mc_pcap_check(self, fd: int, /) -> int: ...
    def mc_vq_strerror(self, error: int, /) -> Any: ...
    def mc_sandbox_enter(self, step: Any, /) -> int: ...

class _FFI:
    NULL: Any
    errno: int

    def new(self, cdecl: str, init: Any = ..., /) -> Any: ...
    def cast(self, cdecl: str, value: Any, /) -> Any: ...
    def from_buffer(self, buffer: Any, /) -> Any: ...
    def buffer(self, cdata: Any, size: int = ..., /) -> Any: ...
    def string(self, cdata: Any, /) -> bytes: ...
    def typeof(self, cdecl: str, /) -> Any: ...
    def sizeof(self, cdecl: str, /) -> int: ...

lib: _Lib
ffi: _FFI
