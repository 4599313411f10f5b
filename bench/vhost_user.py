"""A vhost-user front-end (QEMU's docs/interop/vhost-user.rst), as much of one as the benchmarks need."""

from __future__ import annotations

import enum
import socket
import struct
from collections.abc import Sequence

_HEADER = struct.Struct("<III")
VERSION = 1
REPLY = 1 << 2
F_PROTOCOL_FEATURES = 1 << 30
PROTOCOL_MQ = 1 << 0
USER_BASE = 0x10_0000_0000  # where we pretend to have guest memory mapped


class Request(enum.IntEnum):
    """Of the protocol."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    SET_VRING_ENABLE = 18


class FrontEnd:
    """Owns the connection."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(20)
        self.socket.connect(path)

    def send(self, request: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Sends a request that has no answer."""
        data = _HEADER.pack(request, VERSION, len(payload)) + payload
        socket.send_fds(self.socket, [data], list(fds))

    def ask(self, request: Request, payload: bytes = b"") -> bytes:
        """Sends a request and returns its answer's payload."""
        self.send(request, payload)
        number, flags, size = _HEADER.unpack(self._receive(_HEADER.size))
        if number != request or not flags & REPLY:
            raise ConnectionError(f"the back-end answered {number} to {request.name}")
        return self._receive(size)

    def _receive(self, size: int) -> bytes:
        data = self.socket.recv(size, socket.MSG_WAITALL)
        if len(data) != size:
            raise ConnectionError("the back-end closed the connection")
        return data

    def set_up(self, features: int, memory_fd: int, size: int) -> None:
        """Owner, features and one region of guest memory at 0."""
        (offered,) = struct.unpack("<Q", self.ask(Request.GET_FEATURES))
        if missing := features & ~offered:
            raise ConnectionError(f"the back-end does not offer feature bits {missing:#x}")
        protocol = PROTOCOL_MQ & struct.unpack("<Q", self.ask(Request.GET_PROTOCOL_FEATURES))[0]
        self.send(Request.SET_PROTOCOL_FEATURES, struct.pack("<Q", protocol))
        self.send(Request.SET_OWNER)
        self.send(Request.SET_FEATURES, struct.pack("<Q", features | F_PROTOCOL_FEATURES))
        region = struct.pack("<QQQQ", 0, size, USER_BASE, 0)
        self.send(Request.SET_MEM_TABLE, struct.pack("<II", 1, 0) + region, [memory_fd])

    def start(self, index: int, size: int, desc: int, driver: int, device: int, kick: int, call: int) -> None:
        """Starts a queue at fresh rings. Addresses are guest physical."""
        self.send(Request.SET_VRING_NUM, struct.pack("<II", index, size))
        self.send(Request.SET_VRING_BASE, struct.pack("<II", index, 0))
        addresses = (USER_BASE + desc, USER_BASE + device, USER_BASE + driver, 0)
        self.send(Request.SET_VRING_ADDR, struct.pack("<IIQQQQ", index, 0, *addresses))
        self.send(Request.SET_VRING_CALL, struct.pack("<Q", index), [call])
        self.send(Request.SET_VRING_KICK, struct.pack("<Q", index), [kick])
        self.send(Request.SET_VRING_ENABLE, struct.pack("<II", index, 1))

    def stop(self, index: int) -> None:
        """Stops a queue; nothing of it is in flight when this returns."""
        self.ask(Request.GET_VRING_BASE, struct.pack("<II", index, 0))
