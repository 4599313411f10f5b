"""A virtio-net driver over the simulated guest: one real net sidecar, with buffers posted and frames counted."""

from __future__ import annotations

import itertools
import struct
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from harness.driver import Memory, Queue
from harness.frames import GUEST_MAC
from harness.sidecar import Sidecar
from motorcade.proto.messages import Activate, DeviceState, NetBoot
from motorcade.sidecars._net import lib
from motorcade.sidecars.device import RING_EVENT_IDX, RING_INDIRECT_DESC

HEADER = struct.Struct("<BBHHHHH")  # struct virtio_net_hdr_v1
NEEDS_CSUM, DATA_VALID = 1, 2
GSO_NONE, GSO_TCPV4, GSO_UDP, GSO_TCPV6, GSO_ECN = 0, 1, 3, 4, 0x80
OK, ERR = 0, 1
BIG = 65562  # what a driver without MRG_RXBUF posts when it accepts TSO (5.1.6.3.1)


def bit(name: str) -> int:
    """A feature bit: ``bit("CSUM")``."""
    return 1 << int(getattr(lib, f"VIRTIO_NET_F_{name}"))


def bits(*names: str) -> int:
    """Several."""
    return sum(bit(n) for n in names)


GUEST_OFFLOADS = bits("GUEST_CSUM", "GUEST_TSO4", "GUEST_TSO6", "GUEST_ECN", "GUEST_UFO")
HOST_OFFLOADS = bits("CSUM", "HOST_TSO4", "HOST_TSO6", "HOST_ECN", "HOST_UFO")
OFFLOADS = GUEST_OFFLOADS | HOST_OFFLOADS | bit("CTRL_GUEST_OFFLOADS")


@dataclass
class Header:
    """struct virtio_net_hdr_v1."""

    flags: int = 0
    gso_type: int = GSO_NONE
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0
    num_buffers: int = 0

    def pack(self) -> bytes:
        """As in guest memory."""
        return HEADER.pack(
            self.flags, self.gso_type, self.hdr_len, self.gso_size, self.csum_start, self.csum_offset, self.num_buffers
        )


@dataclass
class Received:
    """One frame as the driver got it, and the queue pair that it came by."""

    header: Header
    frame: bytes
    pair: int


class Nic:
    """A net sidecar, started but not activated: ``up()`` is DRIVER_OK. A context manager that owns the process."""

    def __init__(
        self,
        backend: str,
        fds: Mapping[str, int],
        *,
        pairs: int = 1,
        mtu: int = 0,
        name: str = "net0",
        mac: bytes = GUEST_MAC,
        cold: bool = False,
    ) -> None:
        self.pairs = pairs
        self.memory = Memory(64 << 20)
        role = NetBoot(name, mac, pairs, backend, mtu)
        self.sidecar = Sidecar("net", role, fds, queues=2 * pairs + 1, memory=self.memory, cold=cold)
        self.received: deque[Received] = deque()
        self._ended: list[Sidecar] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for sidecar in (self.sidecar, *reversed(self._ended)):
            sidecar.close()
        self.memory.close()

    def up(
        self,
        *,
        without: int = 0,
        event_idx: bool = True,
        indirect: bool = False,
        buffers: int = 128,
        size: int = 1536,
        ring: int = 256,
    ) -> Self:
        """Activates with all that is offered but ``without``, and posts ``buffers`` receive buffers of ``size``."""
        features = self.sidecar.offered & ~without & ~(RING_EVENT_IDX | RING_INDIRECT_DESC)
        self.features = features | (RING_EVENT_IDX if event_idx else 0) | (RING_INDIRECT_DESC if indirect else 0)
        self.mrg = bool(features & bit("MRG_RXBUF"))
        self.size = size
        pairs = self.pairs if features & bit("MQ") else 1
        make = self.sidecar.queue
        self.rx = [make(2 * i, ring, event_idx=event_idx, indirect=indirect) for i in range(pairs)]
        self.tx = [make(2 * i + 1, ring, event_idx=event_idx, indirect=indirect) for i in range(pairs)]
        self.ctrl: Queue | None = None
        if features & bit("CTRL_VQ"):
            self.ctrl = make(2 * pairs, 64, event_idx=event_idx, indirect=indirect)
        for queue in self.rx:
            self.post(queue, buffers)
        self.sidecar.ask(Activate(self.features, tuple(q.config for q in self.queues)))
        return self

    @property
    def queues(self) -> list[Queue]:
        """Those that the driver set up."""
        pairs = [q for pair in zip(self.rx, self.tx, strict=True) for q in pair]
        return pairs + ([self.ctrl] if self.ctrl else [])

    def end(self) -> DeviceState:
        """Quiesces, saves and kills the sidecar. The driver and guest memory stay."""
        self.sidecar.quiesce()
        state = self.sidecar.save()
        self.sidecar.kill()
        return state

    def successor(self, backend: str, fds: Mapping[str, int], *, mac: bytes = GUEST_MAC, mtu: int = 0) -> None:
        """Starts a sidecar, quiesced and not loaded, in the place of the one that was ended."""
        old = self.sidecar
        self._ended.append(old)
        role = NetBoot(old.role.device_id, mac, self.pairs, backend, mtu)
        self.sidecar = Sidecar("net", role, fds, queues=2 * self.pairs + 1, incoming=True, predecessor=old)

    def restore(self, state: DeviceState) -> None:
        """The driver goes on with the successor, which is not resumed yet."""
        self.sidecar.restore(state, self.queues, self.features)

    def move(self, backend: str, fds: Mapping[str, int], *, mac: bytes = GUEST_MAC) -> DeviceState:
        """``end``, ``successor``, ``restore`` and resume. The state is as saved again before that: the same."""
        state = self.end()
        self.successor(backend, fds, mac=mac)
        self.restore(state)
        assert self.sidecar.save() == state
        self.sidecar.resume()
        return state

    def reset(self) -> None:
        """The driver resets the device; what was in flight is forgotten."""
        self.sidecar.reset()
        self.received.clear()

    def post(self, queue: Queue, n: int) -> None:
        """Makes receive buffers available, and kicks if the device wants that."""
        for _ in range(n):
            queue.submit(into=[self.size], publish=False)
        queue.publish()
        queue.kick()

    def send(self, frame: bytes, header: Header | None = None, *, pair: int = 0, parts: Sequence[int] = ()) -> None:
        """Sends one frame and waits until the device has let go of it. ``parts``: where to split header and frame."""
        data = (header or Header()).pack() + frame
        cuts = [0, *parts, len(data)]
        self.tx[pair].run(out=[data[a:b] for a, b in itertools.pairwise(cuts)])

    def recv(self, timeout: float = 20.0, pair: int | None = None) -> Received:
        """The next frame, by interrupts alone; its buffers are posted again."""
        deadline = time.monotonic() + timeout
        while not self.received:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no frame in {timeout} s\n{self.sidecar.log_tail()}")
            if not self._take(pair):
                self._wait(left)
        return self.received.popleft()

    def recv_frame(self, timeout: float = 20.0) -> bytes:
        """The next frame's bytes."""
        return self.recv(timeout).frame

    def nothing_comes(self, timeout: float = 0.2) -> bool:
        """No frame arrives in ``timeout`` seconds."""
        try:
            self.received.appendleft(self.recv(timeout))
        except TimeoutError:
            return True
        return False

    def command(self, cls: int, cmd: int, data: bytes = b"") -> int:
        """A control command's answer."""
        assert self.ctrl is not None
        return self.ctrl.run(out=[bytes([cls, cmd]) + data], into=[1]).status

    def counters(self) -> dict[str, int]:
        """The details of its stats."""
        return {c.name: c.value for c in self.sidecar.stats().detail}

    def poll_until(self, done: Callable[[], bool], what: str, timeout: float = 20.0) -> None:
        """See Sidecar.poll_until."""
        self.sidecar.poll_until(done, what, timeout)

    @property
    def link_up(self) -> bool:
        """VIRTIO_NET_S_LINK_UP of the configuration space as last announced."""
        return bool(self.sidecar.config[6] & lib.VIRTIO_NET_S_LINK_UP)

    def wait_link(self, up: bool) -> None:
        """Until the device announces it."""
        self.sidecar.wait_until(lambda: self.link_up == up, f"the link to be {'up' if up else 'down'}")

    def _wait(self, timeout: float) -> None:
        """Asks for an interrupt at each queue's next used entry, and waits for one."""
        for queue in self.rx:
            queue.set_used_event(queue._last_used)
            queue.set_no_interrupt(False)
        from harness.driver import fence

        fence()
        if all(q.used_idx == q._last_used for q in self.rx):
            self.rx[0].wait_interrupt(timeout)

    def _take(self, pair: int | None) -> bool:
        found = False
        for i, queue in enumerate(self.rx):
            if pair is not None and i != pair:
                continue
            done = queue.completed + queue.reap()
            queue.completed = []
            posted = len(done)
            while done:
                first = done.pop(0)
                header = Header(*HEADER.unpack(first.data[0][:12]))
                data = first.data[0][12 : first.written]
                # All buffers of a frame become used at once (5.1.6.4.1).
                assert header.num_buffers >= 1
                for _ in range(header.num_buffers - 1):
                    more = done.pop(0)
                    data += more.data[0][: more.written]
                self.received.append(Received(header, data, i))
                found = True
            if posted:
                self.post(queue, posted)
        return found
