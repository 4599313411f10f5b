"""A virtio device as its driver sees it, whatever the transport: status, features, queues, configuration space.

The device's own logic is in a sidecar; a ``Backend`` stands for it here. Nothing a driver reads waits for the
sidecar. The one write that waits is the reset (status 0): when it returns, the sidecar touches guest memory
no more (virtio 1.2, 2.4.2).
"""

from __future__ import annotations

import enum
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import msgspec

from motorcade.proto.messages import CONFIG_DRIVER, CONFIG_STATE

log = logging.getLogger(__name__)

F_VERSION_1 = 1 << 32
CONFIG_CHANGED = 2  # InterruptStatus bit 1 (table 4.1)


class Status(enum.IntFlag):
    """Device status bits (virtio 1.2, 2.1)."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 64
    FAILED = 128


@dataclass(frozen=True)
class Identity:
    """What a sidecar's hello says of its device."""

    virtio_type: int
    features: int
    queue_sizes: tuple[int, ...]
    config: bytes
    config_kinds: bytes = b""  # Hello.configKinds

    def keep(self, new: bytes, kept: bytes, least: int) -> bytes:
        """``new`` with those bytes of ``kept``, of the same length, whose kind is ``least`` or more."""
        mask = self.config_kinds.ljust(len(new), b"\0")
        return bytes(k if kind >= least else n for n, k, kind in zip(new, kept, mask, strict=True))


@dataclass
class Queue:
    """A virtqueue as the driver has set it up so far."""

    max_size: int
    size: int
    ready: bool = False
    desc: int = 0
    driver: int = 0
    device: int = 0

    def problem(self) -> str | None:
        """Why the sidecar could not use it (2.7: power of two; alignments 16, 2 and 4), or None."""
        if not 1 <= self.size <= self.max_size or self.size & (self.size - 1):
            return f"size {self.size} is not a power of two up to {self.max_size}"
        for name, address, align in (("desc", self.desc, 16), ("driver", self.driver, 2), ("device", self.device, 4)):
            if address % align:
                return f"{name} ring at {address:#x} is not aligned to {align}"
        return None


class QueueState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A virtqueue in a snapshot: Queue as plain data."""

    max_size: int
    size: int
    ready: bool
    desc: int
    driver: int
    device: int

    def problem(self) -> str | None:
        """Why no driver can have set it up so, or None. What a sidecar could not use is for Queue.problem."""
        if not 0 < self.max_size <= 0x8000 or not 0 <= self.size <= 0xFFFF:
            return f"size {self.size} of {self.max_size}"
        if not all(0 <= address < 1 << 64 for address in (self.desc, self.driver, self.device)):
            return "an address of more than 64 bits"
        return None


class DeviceState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A device's driver-visible state in a snapshot: plain, untrusted data until ``Device.restore`` has seen it."""

    virtio_type: int
    offered: int
    status: int
    driver_features: int
    features_sel: int
    driver_features_sel: int
    queue_sel: int
    config_generation: int
    config: bytes
    interrupts: int
    queues: list[QueueState]

    def problem(self) -> str | None:
        """Why no device can be in this state, or None."""
        words = (self.features_sel, self.driver_features_sel, self.queue_sel, self.config_generation, self.virtio_type)
        if not all(0 <= word <= 0xFFFF_FFFF for word in words) or not 0 <= self.status <= 0xFF:
            return "a register of more bits than it has"
        if not 0 <= self.driver_features < 1 << 64 or not 0 <= self.offered < 1 << 64:
            return "features of more than 64 bits"
        if not 0 <= self.interrupts <= 3:
            return f"InterruptStatus {self.interrupts:#x}"
        if self.status & Status.DRIVER_OK and not self.status & Status.FEATURES_OK:
            return "DRIVER_OK without FEATURES_OK"
        return next((f"queue {i}: {why}" for i, q in enumerate(self.queues) if (why := q.problem())), None)


class Backend(Protocol):
    """The sidecar's side, reached from any vCPU thread."""

    def activate(self, features: int, queues: dict[int, Queue], config: bytes) -> None:
        """Hands the queues over, and ``config`` where the core keeps any of it. Returns at once; kicks made meanwhile
        stay in the eventfds."""

    def reset(self) -> None:
        """Returns when the sidecar no longer touches guest memory nor raises interrupts, or is dead."""

    def write_config(self, offset: int, data: bytes) -> None:
        """Hands on the driver's write. Returns at once."""


class Interrupts(Protocol):
    """How the device reaches its driver, apart from the sidecar's own used-buffer interrupts."""

    def config_changed(self) -> None:
        """Raises a configuration change notification."""

    def clear(self) -> None:
        """Forgets what is pending, at a reset."""

    def pending(self) -> int:
        """InterruptStatus: what the driver has not acknowledged."""

    def restore(self, bits: int) -> None:
        """Sets InterruptStatus and interrupts nobody yet."""

    def raise_again(self) -> None:
        """Interrupts the driver, if anything is pending: an edge may have been lost on its way."""


class Device:
    """The driver-visible state of one device. Methods may be called from any vCPU thread and the main thread."""

    def __init__(
        self,
        device_id: str,
        backend: Backend,
        interrupts: Interrupts,
        set_doorbells: Callable[[list[int]], None],
        on_needs_reset: Callable[[str], None],
    ) -> None:
        """``set_doorbells`` gets the indices of the queues whose notifications go straight to the sidecar."""
        self.id = device_id
        self._backend = backend
        self._interrupts = interrupts
        self._set_doorbells = set_doorbells
        self._on_needs_reset = on_needs_reset
        self.on_reset: Callable[[str], None] = lambda _id: None  # gets our id, on the thread that resets
        # Never held while waiting for the sidecar: the main thread takes it to hand over that sidecar's notices.
        self._lock = threading.RLock()
        self._resetting = False
        # Called after the driver has changed configuration space, a reset included, by any thread.
        self.on_config_written: Callable[[], None] = lambda: None
        self.identity: Identity | None = None
        self.config_generation = 0
        self._config = bytearray()
        self._clear()

    def _clear(self) -> None:
        self.status = Status(0)
        self.driver_features = 0
        self.features_sel = 0
        self.driver_features_sel = 0
        self.queue_sel = 0
        sizes = self.identity.queue_sizes if self.identity else ()
        self.queues = [Queue(max_size=n, size=n) for n in sizes]
        if self.identity is not None and self.identity.config_kinds:
            now = bytes(self._config)
            self._config[:] = self.identity.keep(now, bytes(len(now)), CONFIG_DRIVER)
            if self._config != now:
                self.on_config_written()

    def plug(self, identity: Identity) -> None:
        """Makes the device present, with what its sidecar said."""
        with self._lock:
            self.identity = identity
            self._config = bytearray(identity.config)
            self._clear()

    def unlike(self, identity: Identity, accepted: int) -> str | None:
        """Why a sidecar of this identity cannot take the place of the present one before a driver that has ``accepted``
        these features (0: no driver), or None."""
        with self._lock:
            mine = self.identity
            if mine is None:
                return None
            if identity.virtio_type != mine.virtio_type:
                return f"it is of virtio device type {identity.virtio_type}, not {mine.virtio_type}"
            if identity.queue_sizes != mine.queue_sizes:
                return f"its queues have sizes {list(identity.queue_sizes)}, not {list(mine.queue_sizes)}"
            if len(identity.config) != len(self._config):
                return f"it has {len(identity.config)} bytes of configuration space, not {len(self._config)}"
            if lacking := accepted & mine.features & ~identity.features:
                return f"it lacks feature bits {lacking:#x}, which the driver uses"
            return None

    def replug(self, identity: Identity) -> None:
        """A sidecar that is not ``unlike`` has taken the present one's place; the driver's settings stay."""
        with self._lock:
            known = self.identity is not None
            self.identity = identity
            new = identity.keep(identity.config, bytes(self._config), 1) if known else identity.config
            if known and new != self._config:
                self.change_config(new)

    @property
    def offered(self) -> int:
        """Feature bits offered to the driver."""
        return (self.identity.features | F_VERSION_1) if self.identity else 0

    # What the driver does.

    @property
    def queue(self) -> Queue | None:
        """The selected queue, if there is such a one."""
        return self.queues[self.queue_sel] if self.queue_sel < len(self.queues) else None

    def queue_writable(self) -> Queue | None:
        """The selected queue while its settings may be changed: features agreed, not ready, not running yet."""
        queue = self.queue
        if queue is None or not self.status & Status.FEATURES_OK or self.status & Status.DRIVER_OK or queue.ready:
            return None
        return queue

    def set_queue_ready(self, ready: bool) -> None:
        """QueueReady. Taking a queue back while the device runs would need VIRTIO_F_RING_RESET, not offered."""
        with self._lock:
            queue = self.queue
            if queue is None or not self.status & Status.FEATURES_OK:
                return
            if self.status & Status.DRIVER_OK:
                if ready != queue.ready:
                    self.needs_reset(f"queue {self.queue_sel}: ready changed while the device runs")
                return
            if ready and (problem := queue.problem()):
                self.needs_reset(f"queue {self.queue_sel}: {problem}")
                return
            queue.ready = ready

    def write_driver_features(self, value: int) -> None:
        """DriverFeatures, 32 bits at the selected half; ignored once agreed (2.2.1)."""
        with self._lock:
            if self.status & Status.FEATURES_OK or self.driver_features_sel > 1:
                return
            shift = 32 * self.driver_features_sel
            self.driver_features &= ~(0xFFFF_FFFF << shift)
            self.driver_features |= value << shift

    def write_status(self, value: int) -> None:
        """The Status register: bits are only ever added; 0 resets."""
        if value == 0:
            self.reset()
            return
        with self._lock:
            if self._resetting:
                return  # another vCPU's reset is not over; its end forgets all of this anyway
            new = Status(value & 0xFF) | (self.status & Status.NEEDS_RESET)
            if self.status & ~new:
                log.warning("%s: driver cleared status bits %#x without a reset", self.id, self.status & ~new)
                new |= self.status
            if new & Status.FEATURES_OK and not self.status & Status.FEATURES_OK:
                extra = self.driver_features & ~self.offered
                if extra or not self.driver_features & F_VERSION_1:
                    log.warning("%s: features %#x refused (offered %#x)", self.id, self.driver_features, self.offered)
                    new &= ~Status.FEATURES_OK
            if new & Status.DRIVER_OK and not new & Status.FEATURES_OK:
                self.needs_reset("DRIVER_OK before FEATURES_OK")
                return
            starting = new & Status.DRIVER_OK and not self.status & Status.DRIVER_OK
            self.status = new
            if starting and not new & (Status.NEEDS_RESET | Status.FAILED):
                ready = {i: q for i, q in enumerate(self.queues) if q.ready}
                self._set_doorbells(list(ready))
                self._backend.activate(self.driver_features, ready, self.kept_config)

    def notify(self, index: int) -> None:
        """A queue notification that no doorbell took: a queue never set up, or a device not started."""
        with self._lock:
            if self.status & Status.DRIVER_OK:
                self.needs_reset(f"notification of queue {index}, which was never set up")
            else:
                log.debug("%s: notification of queue %d before DRIVER_OK ignored", self.id, index)

    def read_config(self, offset: int, size: int) -> int:
        """Little-endian bytes of the configuration space; those past its end read as 0."""
        with self._lock:
            return int.from_bytes(self._config[offset : offset + size].ljust(size, b"\0"), "little")

    def write_config(self, offset: int, size: int, value: int) -> None:
        """The driver's write of configuration space; the sidecar decides what it changes."""
        with self._lock:
            if not self.status & Status.DRIVER or offset + size > len(self._config):
                return
            data = value.to_bytes(size, "little")
            assert self.identity is not None
            if self.identity.config_kinds:
                # What the driver writes it may read at once.
                new = bytearray(self._config)
                new[offset : offset + size] = data
                self._config[:] = self.identity.keep(bytes(self._config), bytes(new), CONFIG_DRIVER)
                self.on_config_written()
            self._backend.write_config(offset, data)

    @property
    def config(self) -> bytes:
        """Configuration space as the driver reads it."""
        with self._lock:
            return bytes(self._config)

    @property
    def kept_config(self) -> bytes:
        """For the sidecar, when the device is activated; empty where it knows all of it."""
        return self.config if self.identity is not None and self.identity.config_kinds else b""

    def reset(self) -> None:
        """Back to the state after power-on. Waits for the sidecar to let go of the queues."""
        with self._lock:
            if self._resetting:
                return
            self._resetting = True
            self._set_doorbells([])
            running = bool(self.status & Status.DRIVER_OK)
        try:
            if running:
                self._backend.reset()
        finally:
            with self._lock:
                self._interrupts.clear()
                self._clear()
                self._resetting = False
        self.on_reset(self.id)

    # Another sidecar; the vCPUs are parked.

    def misfit(self, identity: Identity) -> str | None:
        """Why the slot, or the driver that is bound, could not go on with a sidecar of this identity, or None."""
        with self._lock:
            now = self.identity
            if now is None:
                return "its sidecar has not said what it is"
            if (identity.virtio_type, len(identity.config)) != (now.virtio_type, len(now.config)):
                return "the device is of another kind"
            if identity.queue_sizes != now.queue_sizes:
                return f"it has {len(now.queue_sizes)} queues, the device {len(identity.queue_sizes)}"
            if now.virtio_type == 1 or not self.status:
                return None  # a NIC's sidecar may do in software what its driver was promised (Load)
            if lacking := self.driver_features & ~(identity.features | F_VERSION_1):
                return f"uses features {lacking:#x}, which the device lacks"
            return None

    def rebind(self, device_id: str, backend: Backend, identity: Identity) -> None:
        """Goes on with another sidecar, under another id; ``misfit`` has nothing against it. The driver is told that
        its configuration has changed."""
        with self._lock:
            self.id, self._backend, self.identity = device_id, backend, identity
            if self.status:
                self.change_config(identity.config)
            else:
                self.plug(identity)

    # Snapshots; the vCPUs are parked.

    def save(self) -> bytes:
        """What the driver sees of the device and what it wrote, canonical. ValueError before its sidecar's hello."""
        with self._lock:
            if self.identity is None:
                raise ValueError("its sidecar has not said what it is")
            queues = [QueueState(q.max_size, q.size, q.ready, q.desc, q.driver, q.device) for q in self.queues]
            return msgspec.json.encode(
                DeviceState(
                    virtio_type=self.identity.virtio_type,
                    offered=self.offered,
                    status=int(self.status),
                    driver_features=self.driver_features,
                    features_sel=self.features_sel,
                    driver_features_sel=self.driver_features_sel,
                    queue_sel=self.queue_sel,
                    config_generation=self.config_generation,
                    config=bytes(self._config),
                    interrupts=self._interrupts.pending(),
                    queues=queues,
                )
            )

    def restore(self, data: bytes) -> None:
        """Puts back what ``save`` gave into a device whose sidecar has no queues.

        The sidecar is told by ``link`` (Load, Activate), not here. ValueError: damaged, or of a device that this
        one cannot stand in for; the message names the difference. Nothing has changed then.
        """
        try:
            state = msgspec.json.decode(data, type=DeviceState)
        except (msgspec.DecodeError, UnicodeDecodeError) as e:
            raise ValueError(f"it cannot be read: {e}") from None
        if problem := state.problem():
            raise ValueError(f"it is none that a device can be in: {problem}")
        with self._lock:
            if self.identity is None:
                raise ValueError("its sidecar has not said what it is")
            if problem := self._unlike(state, self.identity):
                raise ValueError(problem)
            self.status = Status(state.status)
            self.driver_features = state.driver_features
            self.features_sel, self.driver_features_sel = state.features_sel, state.driver_features_sel
            self.queue_sel = state.queue_sel
            self.queues = [Queue(q.max_size, q.size, q.ready, q.desc, q.driver, q.device) for q in state.queues]
            self.config_generation = state.config_generation
            self._config[:] = self.identity.keep(bytes(self._config), state.config, CONFIG_STATE)
            if state.config != self._config:
                # A disk or NIC bound to something else. The generation tells a driver that reads right now; that it
                # has changed at all, the interrupt.
                self.config_generation = (self.config_generation + 1) & 0xFFFF_FFFF
            changed = state.config != self._config and bool(self.status & Status.DRIVER_OK)
            self._interrupts.restore(state.interrupts | (CONFIG_CHANGED if changed else 0))
            self._set_doorbells(list(self.running_queues()))

    @staticmethod
    def _unlike(state: DeviceState, identity: Identity) -> str | None:
        """Why a device of this identity cannot go on from ``state``, or None."""
        if state.virtio_type != identity.virtio_type:
            return f"it is of virtio device type {state.virtio_type}, the sidecar's is {identity.virtio_type}"
        sizes = tuple(q.max_size for q in state.queues)
        if sizes != identity.queue_sizes:
            return f"its queues have sizes {list(sizes)}, the sidecar's {list(identity.queue_sizes)}"
        if len(state.config) != len(identity.config):
            return f"it has {len(state.config)} bytes of configuration space, the sidecar's {len(identity.config)}"
        # Features are the sidecar's to judge when it is activated: a NIC bound to another backend offers others, and
        # may yet do in software what its driver was promised.
        if state.status & Status.DRIVER_OK:
            for index, q in enumerate(state.queues):
                problem = Queue(q.max_size, q.size, q.ready, q.desc, q.driver, q.device).problem()
                if q.ready and problem:
                    return f"queue {index}: {problem}"
        return None

    def raise_again(self) -> None:
        """Interrupts the driver once more for what it has not acknowledged."""
        self._interrupts.raise_again()

    def running_queues(self) -> dict[int, Queue]:
        """The queues that the driver handed over, by index; empty before DRIVER_OK."""
        with self._lock:
            return {i: q for i, q in enumerate(self.queues) if q.ready} if self.status & Status.DRIVER_OK else {}

    # What the sidecar does, by way of the main thread.

    def change_config(self, config: bytes) -> bool:
        """Takes over a new configuration space of the same length and tells the driver; False if it is not that."""
        with self._lock:
            if self.identity is None or len(config) != len(self._config):
                return False
            self._config[:] = self.identity.keep(config, bytes(self._config), CONFIG_DRIVER)
            self.config_generation = (self.config_generation + 1) & 0xFFFF_FFFF
            if self.status & Status.DRIVER_OK:
                self._interrupts.config_changed()
            return True

    def needs_reset(self, reason: str) -> None:
        """The device cannot go on; the driver is told (2.1.2) and the rest of the machine is not concerned."""
        with self._lock:
            if self.status & Status.NEEDS_RESET:
                return
            self.status |= Status.NEEDS_RESET
            if self.status & Status.DRIVER_OK:
                self._interrupts.config_changed()
            self._on_needs_reset(reason)
