"""What a NIC knows that neither the core nor guest memory does, as the bytes of a snapshot.

Little-endian, without padding; equal NICs give equal bytes. Behind the fixed part, for each queue pair, a length and
that many bytes of received frames (native/net_held.c).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from motorcade.proto.messages import MAX_STATE

VERSION = 1
FIXED = struct.Struct("<QQHH?6s")
LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class NetState:
    """Untrusted until NetDevice.load has looked at it.

    ``features``: what the driver accepted; ``offloads``: the GUEST_* of them that are in force. ``pairs``: queue pairs
    of the device; ``active``: those in use. ``mac``: 6 bytes that the driver chose, or None: the host's choice is in
    force. ``frames``: one a pair.
    """

    features: int
    offloads: int
    pairs: int
    active: int
    mac: bytes | None
    frames: Sequence[bytes]

    def pack(self) -> bytes:
        """The bytes of version VERSION."""
        mac_set = self.mac is not None
        fixed = FIXED.pack(self.features, self.offloads, self.pairs, self.active, mac_set, self.mac or bytes(6))
        return fixed + b"".join(LENGTH.pack(len(data)) + data for data in self.frames)

    @classmethod
    def unpack(cls, data: bytes) -> NetState:
        """ValueError: they are not what ``pack`` gives."""
        if len(data) < FIXED.size:
            raise ValueError(f"a NIC's state has {len(data)} bytes, fewer than {FIXED.size}")
        features, offloads, pairs, active, mac_set, mac = FIXED.unpack_from(data)
        at, frames = FIXED.size, []
        for pair in range(pairs):
            if len(data) - at < LENGTH.size:
                raise ValueError(f"a NIC's state ends before the frames of queue pair {pair}")
            (size,) = LENGTH.unpack_from(data, at)
            at += LENGTH.size
            if size > len(data) - at:
                raise ValueError(f"a NIC's state ends in the frames of queue pair {pair}")
            frames.append(data[at : at + size])
            at += size
        state = cls(features, offloads, pairs, active, mac if mac_set else None, tuple(frames))
        if state.pack() != data:
            raise ValueError("a NIC's state has bytes that mean nothing")
        return state


def room(pairs: int) -> int:
    """How many bytes of frames fit into a state. 16 pairs may hold more than that: what comes last is then lost on the
    way to the restored machine, as on a wire."""
    return MAX_STATE - FIXED.size - pairs * LENGTH.size
