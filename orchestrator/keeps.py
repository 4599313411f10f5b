"""How much memory of a device outlives its sidecar (sidecars/native/inflight.h; docs/internals.md, Recovery)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from motorcade.proto.messages import BlkBoot, KitBoot, NetBoot, SerialBoot

if TYPE_CHECKING:
    from collections.abc import Mapping

    from motorcade.proto.messages import Role

KIT_STATE = 1 << 16  # for two copies of what a device of the kit has to remember


def size(role: Role, queues: int, fds: Mapping[str, int]) -> int:
    """Bytes for a device whose sidecar has this ``role`` and these descriptors by label. Errors: OverlayError,
    OSError."""
    # Constants of every kind's extension; each is imported only where such a device is.
    if isinstance(role, BlkBoot):
        from motorcade.sidecars._blk import lib as blk

        room = 0
        if role.overlay:
            from motorcade.sidecars.blk import overlay

            room = overlay.read_header(fds["overlay"]).map_size
        return blk.MC_KEEP_QUEUES + queues * blk.MC_KEEP_QUEUE + room
    if isinstance(role, SerialBoot):
        from motorcade.sidecars._serial import lib as serial

        room = serial.mc_serial_keep_size(role.scrollback)
        return serial.MC_KEEP_QUEUES + queues * serial.MC_KEEP_QUEUE + room
    if isinstance(role, KitBoot):
        from motorcade.sidecars._queue import lib as kit

        return kit.MC_KEEP_QUEUES + queues * kit.MC_KEEP_QUEUE + KIT_STATE
    from motorcade.sidecars._net import lib as net

    room = net.mc_net_stream_keep_size() if isinstance(role, NetBoot) and role.backend == "passt" else 0
    return net.MC_KEEP_QUEUES + queues * net.MC_KEEP_QUEUE + room


def lost_its_place(role: Role, queues: int, inflight: int) -> bool:
    """Whether the last process of this device was killed where nobody can say how far it had come with its backend, so
    that the backend has to be another one; it begins anew then. ``inflight``: the device's memory."""
    if not isinstance(role, NetBoot) or role.backend != "passt":
        return False
    from motorcade.sidecars._net import ffi, lib

    at, place = lib.MC_KEEP_QUEUES + queues * lib.MC_KEEP_QUEUE, ffi.new("struct mc_net_stream_keep *")
    os.preadv(inflight, [ffi.buffer(place)], at)
    if not place.busy:
        return False
    os.pwrite(inflight, bytes(ffi.sizeof("struct mc_net_stream_keep")), at)
    return True
