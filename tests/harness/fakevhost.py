"""A vhost-user backend in Python, in the test's own process: it answers requests, and lies where it is told to."""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from motorcade.sidecars.vhostuser import protocol
from motorcade.sidecars.vhostuser.protocol import HEADER, REPLY, U64, VERSION, VRING_STATE, Protocol, Request

FEATURES = 1 << 32 | protocol.F_PROTOCOL_FEATURES | 1 << 29 | 1 << 5
PROTOCOLS = Protocol.MQ | Protocol.REPLY_ACK | Protocol.CONFIG | Protocol.BACKEND_REQ

Answer = bytes | tuple[bytes, Sequence[int]] | None
Lie = Callable[[bytes], Answer]


@dataclass
class Ring:
    """What the front-end said of one."""

    size: int = 0
    base: int = 0
    places: tuple[int, ...] = ()
    kick: int = -1
    call: int = -1
    error: int = -1


@dataclass
class FakeBackend:
    """Serves one front-end after the other, each as the ones before, until ``close``. ``lies``: what is sent instead of
    the answer to a request (whole messages, with descriptors; None: silence; EOF: it closes).

    ``hold``: requests are taken and not answered; ``late``: but by a stop, after its own answer and without a call.
    ``answer_on_drop``: so many of those that are held are answered when the connection has ended.
    Each has one buffer to read, of four bytes, and one to write.
    """

    path: Path
    features: int = FEATURES
    protocols: int = PROTOCOLS
    queues: int = 2
    config: bytes = bytes(60)
    lies: dict[Request, Lie] = field(default_factory=dict)
    hold: bool = False
    late: bool = False
    answer_on_drop: int = 0

    def __post_init__(self) -> None:
        self.seen: list[Request] = []
        self.accepted = 0
        self.connections = 0
        self.written: list[tuple[int, bytes]] = []  # SET_CONFIG
        self.taken: list[bytes] = []  # what requests said
        self.inflight: list[bytes] = []  # the region at each SET_INFLIGHT_FD
        self.log: tuple[int, int] = (0, 0)
        self.rings: dict[int, Ring] = {}
        self._held: list[tuple[int, int]] = []  # heads, descriptors to be written
        self.requests: socket.socket | None = None  # our requests to the front-end
        self.connection: socket.socket | None = None
        self.error: BaseException | None = None
        self._region: mmap.mmap | None = None
        self._memory: list[tuple[int, int, mmap.mmap]] = []
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(8)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self) -> FakeBackend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def connect(self) -> dict[str, int]:
        """What the supervisor gives the sidecar."""
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(str(self.path))
        except OSError as e:
            sock.close()
            raise OSError(e.errno, f"no backend at {self.path}: {e.strerror}") from None
        return {"backend": sock.detach()}

    def close(self) -> None:
        """Ends it."""
        os.eventfd_write(self._stop, 1)
        self._thread.join(20)
        self._listener.close()
        assert self.error is None, self.error

    def drop(self) -> None:
        """Ends the connection, as a crash does."""
        assert self.connection is not None
        self.connection.shutdown(socket.SHUT_RDWR)

    # Its thread.

    def _serve(self) -> None:
        try:
            while True:
                if self._stop in select.select([self._listener, self._stop], [], [])[0]:
                    return
                self.connection, _ = self._listener.accept()
                self.connections += 1
                try:
                    stopped = self._front_end(self.connection)
                except (ConnectionError, BrokenPipeError, EOFError):
                    stopped = False
                finally:
                    self._forget()
                if stopped:
                    return
        except BaseException as e:
            self.error = e

    def _forget(self) -> None:
        assert self.connection is not None
        self.connection.close()
        for head, into in self._held[: self.answer_on_drop]:
            self._answer(self.rings[0], head, into)
        self._held = []
        for ring in self.rings.values():
            for fd in (ring.kick, ring.call, ring.error):
                if fd >= 0:
                    os.close(fd)
        self.rings = {}
        self._memory = []
        if self.requests is not None:
            self.requests.close()
            self.requests = None

    def _front_end(self, sock: socket.socket) -> bool:
        while True:
            kicks = {ring.kick: index for index, ring in self.rings.items() if ring.kick >= 0}
            ready = select.select([sock, self._stop, *kicks], [], [])[0]
            if self._stop in ready:
                return True
            for fd in ready:
                if fd in kicks:
                    self._run(kicks[fd])
            if sock in ready:
                self._message(sock)

    def _message(self, sock: socket.socket) -> None:
        head, fds, _, _ = socket.recv_fds(sock, HEADER.size, 8)
        if len(head) != HEADER.size:
            raise EOFError
        number, flags, size = HEADER.unpack(head)
        payload = sock.recv(size, socket.MSG_WAITALL) if size else b""
        request = Request(number)
        self.seen.append(request)
        answer = self._do(request, payload, fds)
        rights: Sequence[int] = ()
        if isinstance(answer, tuple):
            answer, rights = answer
        if answer is None and flags & protocol.NEED_REPLY:
            answer = U64.pack(0)
        if request in self.lies:
            lie = self.lies[request](payload)
            if lie is None:
                return
            data, rights = lie if isinstance(lie, tuple) else (lie, ())
            if not data:
                raise EOFError
            socket.send_fds(sock, [data], list(rights))
            for fd in rights:
                os.close(fd)
        elif answer is not None:
            socket.send_fds(sock, [reply(request, answer)], list(rights))
        if request is Request.GET_VRING_BASE and self.late:
            for head, into in self._held:
                self._answer(self.rings[payload[0]], head, into)
            self._held = []

    def _do(self, request: Request, payload: bytes, fds: list[int]) -> Answer:
        if request is Request.GET_FEATURES:
            return U64.pack(self.features)
        if request is Request.GET_PROTOCOL_FEATURES:
            return U64.pack(self.protocols)
        if request is Request.GET_QUEUE_NUM:
            return U64.pack(self.queues)
        if request is Request.SET_FEATURES:
            self.accepted = U64.unpack(payload)[0]
        elif request is Request.GET_CONFIG:
            offset, size, _ = protocol.CONFIG.unpack_from(payload)
            return payload[: protocol.CONFIG.size] + self.config[offset : offset + size]
        elif request is Request.SET_CONFIG:
            offset, size, _ = protocol.CONFIG.unpack_from(payload)
            data = payload[protocol.CONFIG.size :]
            self.written.append((offset, data))
            self.config = self.config[:offset] + data + self.config[offset + size :]
        elif request is Request.SET_BACKEND_REQ_FD:
            self.requests = socket.socket(fileno=fds[0])
        elif request is Request.SET_MEM_TABLE:
            self._map(payload, fds)
        elif request is Request.SET_LOG_BASE:
            self.log = protocol.LOG.unpack(payload)[0], fds[0]
            return b""
        elif request is Request.GET_INFLIGHT_FD:
            return self._make_inflight(payload)
        elif request is Request.SET_INFLIGHT_FD:
            with mmap.mmap(fds[0], mmap.PAGESIZE) as region:
                self.inflight.append(region[:4])
            self._region = mmap.mmap(fds[0], mmap.PAGESIZE)
            os.close(fds[0])
        else:
            return self._of_ring(request, payload, fds)
        return None

    def _of_ring(self, request: Request, payload: bytes, fds: list[int]) -> Answer:
        if len(payload) < 4 or request is Request.SET_PROTOCOL_FEATURES:
            return None
        ring = self.rings.setdefault(payload[0], Ring())
        if request is Request.SET_VRING_NUM:
            ring.size = VRING_STATE.unpack(payload)[1]
        elif request is Request.SET_VRING_BASE:
            ring.base = VRING_STATE.unpack(payload)[1]
        elif request is Request.SET_VRING_ADDR:
            ring.places = protocol.VRING_ADDR.unpack(payload)[2:5]
        elif request is Request.SET_VRING_KICK:
            ring.kick = fds[0]
        elif request is Request.SET_VRING_CALL:
            ring.call = fds[0]
        elif request is Request.SET_VRING_ERR:
            ring.error = fds[0]
        elif request is Request.GET_VRING_BASE:
            os.close(ring.kick)
            ring.kick = -1
            return VRING_STATE.pack(payload[0], ring.base)
        return None

    def _make_inflight(self, payload: bytes) -> Answer:
        fd = os.memfd_create("inflight")
        os.ftruncate(fd, mmap.PAGESIZE)
        self._inflight_fd = fd
        return payload[:0] + protocol.INFLIGHT.pack(mmap.PAGESIZE, 0, *protocol.INFLIGHT.unpack(payload)[2:]), [fd]

    def _map(self, payload: bytes, fds: list[int]) -> None:
        self._memory = []
        for i, fd in enumerate(fds):
            at = protocol.MEMORY.size + i * protocol.REGION.size
            _, size, user, offset = protocol.REGION.unpack_from(payload, at)
            self._memory.append((user, size, mmap.mmap(fd, size, offset=offset)))
            os.close(fd)

    def _at(self, user: int) -> tuple[mmap.mmap, int]:
        for start, size, mapping in self._memory:
            if start <= user < start + size:
                return mapping, user - start
        raise AssertionError(f"{user:#x} is not in the memory table")

    def _run(self, index: int) -> None:
        """Takes what is there, and answers it."""
        ring = self.rings[index]
        os.eventfd_read(ring.kick)
        (desc, d), _, (avail, a) = (self._at(place) for place in ring.places)
        while ring.base != struct.unpack_from("<H", avail, a + 2)[0]:
            (head,) = struct.unpack_from("<H", avail, a + 4 + 2 * (ring.base % ring.size))
            gpa, size, _, following = struct.unpack_from("<QIHH", desc, d + 16 * head)
            data, at = self._at(gpa + self._user)
            self.taken.append(bytes(data[at : at + size]))
            ring.base = (ring.base + 1) & 0xFFFF
            if self._region is not None:
                self._region[:4] = struct.pack("<HH", 1, head)
            if self.hold:
                self._held.append((head, following))
                continue
            self._answer(ring, head, following)
            os.eventfd_write(ring.call, 1)

    def _answer(self, ring: Ring, head: int, into: int) -> None:
        (desc, d), (used, u), _ = (self._at(place) for place in ring.places)
        gpa, size, _, _ = struct.unpack_from("<QIHH", desc, d + 16 * into)
        data, at = self._at(gpa + self._user)
        data[at : at + size] = b"\x5a" * size
        (used_idx,) = struct.unpack_from("<H", used, u + 2)
        struct.pack_into("<II", used, u + 4 + 8 * (used_idx % ring.size), head, size)
        struct.pack_into("<H", used, u + 2, (used_idx + 1) & 0xFFFF)

    @property
    def _user(self) -> int:
        return self._memory[0][0]  # guest memory begins at 0 there


def reply(request: int, payload: bytes) -> bytes:
    """A whole message."""
    return HEADER.pack(request, VERSION | REPLY, len(payload)) + payload
