"""vhost-user as its front-end speaks it (QEMU's docs/interop/vhost-user.rst): messages, and the connection.

The backend is not trusted: whatever it sends is bounded, of the kind that was asked for, and in time, or the connection
is over (BackendError). Descriptors that it sends unasked are closed.
"""

from __future__ import annotations

import array
import contextlib
import enum
import os
import select
import socket
import struct
import time
from collections.abc import Sequence

VERSION = 1
_VERSION_MASK = 3
REPLY = 1 << 2
NEED_REPLY = 1 << 3
HEADER = struct.Struct("<III")  # request, flags, size
MAX_PAYLOAD = 4096  # of anything that a backend may send; the largest is a configuration space, of 256 bytes
MAX_CONFIG = 256
_MAX_FDS = 8  # of one message; more is nothing that we know

F_LOG_ALL = 1 << 26
F_PROTOCOL_FEATURES = 1 << 30


class Protocol(enum.IntFlag):
    """Protocol features that this front-end can use."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    REPLY_ACK = 1 << 3
    BACKEND_REQ = 1 << 5
    CONFIG = 1 << 9
    INFLIGHT_SHMFD = 1 << 12


class Request(enum.IntEnum):
    """The front-end's."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32


CONFIG_CHANGE = 2  # the backend's own request, on the other channel

U64 = struct.Struct("<Q")
VRING_STATE = struct.Struct("<II")  # index, number
VRING_ADDR = struct.Struct("<IIQQQQ")  # index, flags, descriptors, used, avail, where the log has the used ring
VRING_F_LOG = 1
MEMORY = struct.Struct("<II")  # regions
REGION = struct.Struct("<QQQQ")  # guest physical address, size, user address, offset in the descriptor
LOG = struct.Struct("<QQ")  # size, offset
CONFIG = struct.Struct("<III")  # offset, size, flags
INFLIGHT = struct.Struct("<QQHH")  # size, offset, queues, queue size


class BackendError(Exception):
    """The connection is over, for this reason: the backend's silence, end, refusal or nonsense."""


class Gone(BackendError):
    """The other end is closed."""


class Refused(BackendError):
    """It says no to one request; the connection goes on."""


class Connection:
    """The front-end's end of a connection. Owns the socket. ``deadline``: seconds for each answer."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self.socket, self.deadline = sock, deadline
        self.acknowledges = False  # REPLY_ACK was negotiated
        sock.setblocking(False)

    @classmethod
    def connect(cls, path: str, deadline: float) -> Connection:
        """To who listens at ``path``. Errors: OSError."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(path)
        except OSError:
            sock.close()
            raise
        return cls(sock, deadline)

    def fileno(self) -> int:
        """For poll."""
        return self.socket.fileno()

    def close(self) -> None:
        """Ends it."""
        self.socket.close()

    def send(self, request: Request, payload: bytes = b"", fds: Sequence[int] = (), *, flags: int = 0) -> None:
        """Sends a request; ``fds`` stay the caller's. Errors: BackendError."""
        data = HEADER.pack(request, VERSION | flags, len(payload)) + payload
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        until = time.monotonic() + self.deadline
        while data:
            try:
                sent = self.socket.sendmsg([data], rights, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._wait(select.POLLOUT, until, f"does not read {request.name}")
                continue
            except OSError as e:
                raise Gone(f"closed the connection before {request.name} ({e.strerror})") from None
            data, rights = data[sent:], []  # the descriptors go with the first byte

    def confirm(self, request: Request, payload: bytes, fds: Sequence[int] = ()) -> None:
        """Sends a request, and has the backend say that it has done it, where it can. Errors: BackendError."""
        if not self.acknowledges:
            self.send(request, payload, fds)
            return
        self.send(request, payload, fds, flags=NEED_REPLY)
        (error,) = U64.unpack(self.receive(request, U64.size))
        if error:
            raise Refused(f"refused {request.name}")

    def ask(self, request: Request, payload: bytes = b"", size: int = U64.size, fds: Sequence[int] = ()) -> bytes:
        """Sends a request whose answer has ``size`` bytes. Errors: BackendError."""
        self.send(request, payload, fds)
        return self.receive(request, size)

    def ask_number(self, request: Request) -> int:
        """Sends a request whose answer is a number of 64 bits. Errors: BackendError."""
        return int(U64.unpack(self.ask(request))[0])

    def ask_fd(self, request: Request, payload: bytes, size: int) -> tuple[bytes, int | None]:
        """Sends a request whose answer may have a descriptor beside it: the caller's. Errors: BackendError."""
        self.send(request, payload)
        fds: list[int] = []
        try:
            data = self.receive(request, size, fds)
            if len(fds) > 1:
                raise BackendError(f"sent {len(fds)} descriptors with its answer to {request.name}")
        except BackendError:
            close_all(fds)
            raise
        return data, fds[0] if fds else None

    def receive(self, request: Request, size: int, fds: list[int] | None = None, *, least: int | None = None) -> bytes:
        """The answer to ``request``, of ``size`` bytes, or from ``least`` to so many. Descriptors are added to ``fds``;
        where there is none, they are one mistake more. Errors: BackendError."""
        what = f"its answer to {request.name}"
        number, flags, found = HEADER.unpack(self._read(HEADER.size, what, fds))
        if number != request or not flags & REPLY or flags & _VERSION_MASK != VERSION:
            raise BackendError(f"sent message {number} with flags {flags:#x} instead of {what}")
        if not (size if least is None else least) <= found <= size:
            raise BackendError(f"sent {found} bytes as {what}, which has {size}")
        return self._read(found, what, fds)

    def refuse_words(self) -> None:
        """Something has come that nobody asked for, or the end. Errors: BackendError, if that is so."""
        data, fds = receive_some(self.socket, HEADER.size)
        close_all(fds)
        if data is not None:
            raise BackendError("speaks unasked")

    def _read(self, size: int, what: str, fds: list[int] | None) -> bytes:
        data = b""
        until = time.monotonic() + self.deadline
        while len(data) < size:
            part, sent = receive_some(self.socket, size - len(data), what)
            if part is None:
                self._wait(select.POLLIN, until, f"does not give {what}")
                continue
            if fds is None and sent:
                close_all(sent)
                raise BackendError(f"sent descriptors with {what}")
            if fds is not None:
                fds += sent
            data += part
        return data

    def _wait(self, events: int, until: float, what: str) -> None:
        poll = select.poll()
        poll.register(self.socket, events)
        left = until - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise BackendError(f"{what} within {self.deadline:g} s")


def receive_some(sock: socket.socket, size: int, what: str = "") -> tuple[bytes | None, list[int]]:
    """Up to ``size`` bytes of a socket that does not block, and what descriptors came beside them: the caller's. None:
    there is nothing yet. Errors: BackendError, Gone."""
    room = array.array("i")
    before = f" before {what}" if what else ""
    try:
        data, extra, flags, _ = sock.recvmsg(size, socket.CMSG_SPACE(_MAX_FDS * room.itemsize), socket.MSG_CMSG_CLOEXEC)
    except BlockingIOError:
        return None, []
    except OSError as e:
        raise Gone(f"closed the connection{before} ({e.strerror})") from None
    for level, kind, content in extra:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            room.frombytes(content[: len(content) - len(content) % room.itemsize])
    fds = list(room)
    if flags & socket.MSG_CTRUNC:
        close_all(fds)
        raise BackendError(f"sent more than {_MAX_FDS} descriptors with {what or 'what it said'}")
    if not data:
        close_all(fds)
        raise Gone(f"closed the connection{before}")
    return data, fds


class BackendRequests:
    """What the backend asks by itself, on a channel of its own (SET_BACKEND_REQ_FD). Owns its end."""

    def __init__(self) -> None:
        self._socket, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        self._data = b""

    def fileno(self) -> int:
        """For poll."""
        return self._socket.fileno()

    def close(self) -> None:
        """Ends it."""
        self._socket.close()
        self.theirs.close()

    def take(self) -> bool:
        """Takes what has come, a bounded part of it at a time: whether the configuration changed. What is nothing to us
        is refused, if it wants to be told. Errors: BackendError."""
        what = "the end of its own request"
        part, fds = receive_some(self._socket, MAX_PAYLOAD, what)
        close_all(fds)  # nothing that we know has any
        self._data += part or b""
        changed = False
        while len(self._data) >= HEADER.size:
            number, flags, size = HEADER.unpack_from(self._data)
            if size > MAX_PAYLOAD or flags & _VERSION_MASK != VERSION or flags & REPLY:
                raise BackendError(f"sent a request {number} of {size} bytes with flags {flags:#x} of its own")
            if len(self._data) < HEADER.size + size:
                break
            self._data = self._data[HEADER.size + size :]
            known = number == CONFIG_CHANGE
            changed = changed or known
            if flags & NEED_REPLY:
                answer = HEADER.pack(number, VERSION | REPLY, U64.size) + U64.pack(0 if known else 1)
                with contextlib.suppress(BlockingIOError, OSError):  # who does not read answers has none
                    self._socket.send(answer, socket.MSG_NOSIGNAL)
        return changed


def close_all(fds: Sequence[int]) -> None:
    """Closes descriptors that nobody wants."""
    for fd in fds:
        os.close(fd)
