"""A vhost-user backend that is connected and has said what it offers. The rings and who runs them are device.py's."""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from motorcade.proto.memory import Region
from motorcade.sidecars.vhostuser import protocol
from motorcade.sidecars.vhostuser.protocol import BackendError, BackendRequests, Connection, Gone, Protocol, Request

ANSWER = 5.0  # seconds for what takes microseconds
STOP = 8.0  # seconds to finish what is in flight; the core waits 10 for a reset
F_VERSION_1 = 1 << 32
# Feature bits that reach the driver: the device type's own, indirect descriptors and EVENT_IDX. The others are about
# the transport, or rings of another form, which neither the core nor this front-end knows (virtio 1.2, 6).
_PASSED_ON: int = sum(1 << bit for bit in (*range(24), 28, 29, *range(50, 64)))
USER_BASE = 1 << 40  # "user addresses", by which vhost-user speaks of memory: the guest's and this


@dataclass(frozen=True)
class Ring:
    """Where a queue is. Addresses are guest physical."""

    index: int
    size: int
    desc: int
    driver: int
    device: int


@dataclass
class Inflight:
    """The region in which a backend notes what it has in hand, for the one that comes after it. Owns ``fd``."""

    fd: int
    size: int
    offset: int

    def close(self) -> None:
        """Lets go of it."""
        os.close(self.fd)


class Backend:
    """One connection, from its negotiation on. Every method may raise BackendError, after which it is of no use."""

    def __init__(self, fd: int, *, queues: int, config_size: int) -> None:
        """Owns ``fd``, the connected socket. ``queues``: how many the device has; ``config_size``: bytes of its
        configuration space that are the backend's to say."""
        self.connection = Connection(socket.socket(fileno=fd), ANSWER)
        self.requests: BackendRequests | None = None
        self._config_size = config_size
        try:
            self._negotiate(queues)
            self.config = self.get_config()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the connection."""
        self.connection.close()
        if self.requests is not None:
            self.requests.close()

    def _negotiate(self, queues: int) -> None:
        c = self.connection
        self.all_features = c.ask_number(Request.GET_FEATURES)
        if not self.all_features & F_VERSION_1:
            raise BackendError("is for drivers from before virtio 1.0 only (feature VERSION_1 is missing)")
        self.protocol = Protocol(0)
        if self.all_features & protocol.F_PROTOCOL_FEATURES:
            offered = c.ask_number(Request.GET_PROTOCOL_FEATURES)
            self.protocol = Protocol(offered & sum(Protocol))
            c.send(Request.SET_PROTOCOL_FEATURES, protocol.U64.pack(self.protocol))
            c.acknowledges = Protocol.REPLY_ACK in self.protocol
        c.send(Request.SET_OWNER)
        # Without MQ it has as many as its device type must have; what that is, only it knows.
        self.most_queues = c.ask_number(Request.GET_QUEUE_NUM) if Protocol.MQ in self.protocol else queues
        if queues > self.most_queues:
            raise BackendError(f"has {self.most_queues} queues, not {queues}")
        if Protocol.BACKEND_REQ in self.protocol:
            self.requests = BackendRequests()
            c.confirm(Request.SET_BACKEND_REQ_FD, b"", [self.requests.theirs.fileno()])
            self.requests.theirs.close()  # so that its end is seen

    @property
    def features(self) -> int:
        """What the driver may be offered."""
        return self.all_features & _PASSED_ON

    @property
    def can_log(self) -> bool:
        """It says which pages it writes."""
        return bool(self.all_features & protocol.F_LOG_ALL) and Protocol.LOG_SHMFD in self.protocol

    # Configuration space.

    def get_config(self) -> bytes:
        """As it is now."""
        size = self._config_size
        if not size:
            return b""
        if Protocol.CONFIG not in self.protocol:
            raise BackendError("has no configuration space to give (protocol feature CONFIG), which this device needs")
        question = protocol.CONFIG.pack(0, size, 0) + bytes(size)
        self.connection.send(Request.GET_CONFIG, question)
        answer = self.connection.receive(Request.GET_CONFIG, len(question), least=0)
        head = protocol.CONFIG.size
        if len(answer) != len(question) or answer[:head] != question[:head]:
            raise BackendError(f"does not give {size} bytes of configuration space")
        return answer[head:]

    def set_config(self, offset: int, data: bytes) -> None:
        """The driver wrote there."""
        if Protocol.CONFIG in self.protocol:
            self.connection.confirm(Request.SET_CONFIG, protocol.CONFIG.pack(offset, len(data), 0) + data)

    def config_changed(self) -> bool:
        """Takes what has come on its own channel: whether ``get_config`` may give something else now."""
        if self.requests is None:
            return False
        try:
            return self.requests.take()
        except Gone:
            self.requests.close()  # it has nothing to say any more; the rest goes on
            self.requests = None
            return False

    # The rings.

    def set_up(self, features: int, memory: int, regions: Sequence[Region], *, log: bool) -> None:
        """What the driver accepted, and guest memory, whose descriptor stays the caller's. ``log``: rings will be
        logged, too, in what ``set_log`` gives."""
        features |= F_VERSION_1 | self.all_features & protocol.F_PROTOCOL_FEATURES
        if log:
            features |= protocol.F_LOG_ALL
        self.connection.confirm(Request.SET_FEATURES, protocol.U64.pack(features))
        table = protocol.MEMORY.pack(len(regions), 0)
        for r in regions:
            table += protocol.REGION.pack(r.gpa, r.size, USER_BASE + r.gpa, r.offset)
        self.connection.confirm(Request.SET_MEM_TABLE, table, [memory] * len(regions))

    def set_log(self, fd: int, size: int) -> None:
        """Where it notes which pages it writes: ``size`` bytes of ``fd``, which stays the caller's."""
        c = self.connection
        c.send(Request.SET_LOG_BASE, protocol.LOG.pack(size, 0), [fd])
        c.receive(Request.SET_LOG_BASE, protocol.U64.size, least=0)  # whether it says anything differs

    def get_inflight(self, queues: int, queue_size: int) -> Inflight | None:
        """A fresh region of its, which is in use from now on; None where it has none."""
        if Protocol.INFLIGHT_SHMFD not in self.protocol:
            return None
        question = protocol.INFLIGHT.pack(0, 0, queues, queue_size)
        answer, fd = self.connection.ask_fd(Request.GET_INFLIGHT_FD, question, len(question))
        size, offset, _, _ = protocol.INFLIGHT.unpack(answer)
        if fd is None:
            raise BackendError("sent no descriptor with its answer to GET_INFLIGHT_FD")
        region = Inflight(fd, size, offset)
        if not 0 < size <= 1 << 30 or offset % mmap.PAGESIZE:
            region.close()
            raise BackendError(f"has an inflight region of {size} bytes at {offset}")
        return region

    def set_inflight(self, region: Inflight, queues: int, queue_size: int) -> None:
        """What it, or its predecessor, gave by ``get_inflight``."""
        payload = protocol.INFLIGHT.pack(region.size, region.offset, queues, queue_size)
        self.connection.confirm(Request.SET_INFLIGHT_FD, payload, [region.fd])

    def start(self, ring: Ring, base: int, *, kick: int, call: int, error: int, log: bool) -> None:
        """Has it run a ring, from avail entry ``base`` on. The eventfds stay the caller's."""
        c, index = self.connection, ring.index
        c.send(Request.SET_VRING_NUM, protocol.VRING_STATE.pack(index, ring.size))
        c.send(Request.SET_VRING_BASE, protocol.VRING_STATE.pack(index, base))
        places = (USER_BASE + ring.desc, USER_BASE + ring.device, USER_BASE + ring.driver)
        flags = protocol.VRING_F_LOG if log else 0
        c.confirm(Request.SET_VRING_ADDR, protocol.VRING_ADDR.pack(index, flags, *places, ring.device if log else 0))
        c.send(Request.SET_VRING_ERR, protocol.U64.pack(index), [error])
        c.send(Request.SET_VRING_CALL, protocol.U64.pack(index), [call])
        c.confirm(Request.SET_VRING_KICK, protocol.U64.pack(index), [kick])
        if self.all_features & protocol.F_PROTOCOL_FEATURES:  # else it is enabled by now
            c.confirm(Request.SET_VRING_ENABLE, protocol.VRING_STATE.pack(index, 1))

    def stop(self, index: int, *, call: int) -> int:
        """Has it leave a ring alone: the next avail entry that it would have taken. ``call``: its call eventfd.

        libvhost-user closes that here, with requests still in flight (qemu-storage-daemon), and gives the ring up for
        broken when it has one of them to tell of. So it gets it again, in the message right behind.
        """
        c = self.connection
        c.deadline = STOP
        try:
            c.send(Request.GET_VRING_BASE, protocol.VRING_STATE.pack(index, 0))
            c.send(Request.SET_VRING_CALL, protocol.U64.pack(index), [call])
            answer = c.receive(Request.GET_VRING_BASE, protocol.VRING_STATE.size)
        finally:
            c.deadline = ANSWER
        same, base = protocol.VRING_STATE.unpack(answer)
        if same != index or base > 0xFFFF:
            raise BackendError(f"answered that queue {same} is at {base} when it was asked for queue {index}")
        return int(base)
