"""What a console knows that neither the core nor guest memory does, as the bytes of a snapshot: little-endian, without
padding, and equal for equal consoles."""

from __future__ import annotations

import struct
from dataclasses import dataclass

VERSION = 1
FIXED = struct.Struct("<QII")


@dataclass(frozen=True, slots=True)
class SerialState:
    """``features``: what the driver accepted, 0 without one. ``pending``: typed, and not yet taken by the guest.
    ``history``: the end of what the guest printed, for whoever attaches later."""

    features: int
    pending: bytes
    history: bytes

    def pack(self) -> bytes:
        """The bytes of version VERSION."""
        return FIXED.pack(self.features, len(self.pending), len(self.history)) + self.pending + self.history

    @classmethod
    def unpack(cls, data: bytes) -> SerialState:
        """ValueError: they are not what ``pack`` gives."""
        if len(data) < FIXED.size:
            raise ValueError(f"a console's state has {len(data)} bytes, fewer than {FIXED.size}")
        features, pending, history = FIXED.unpack_from(data)
        if len(data) != FIXED.size + pending + history:
            raise ValueError(f"a console's state has {len(data)} bytes, for {pending} of input and {history} of output")
        middle = FIXED.size + pending
        return cls(features, data[FIXED.size : middle], data[middle:])
