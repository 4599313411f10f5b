"""The machine as QMP sees it: what the core implements for its QMP server."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from motorcade.core.balloon import Balloon
    from motorcade.core.hotplug import Hotplug
    from motorcade.core.qmp.errors import QmpError
    from motorcade.core.snapshot.plan import Plan, Report
    from motorcade.proto.messages import Inject, StatsReport


class RunState(enum.StrEnum):
    """QEMU's RunState, as far as it applies here; the values are those of query-status."""

    PRELAUNCH = "prelaunch"  # never started yet
    RUNNING = "running"
    PAUSED = "paused"
    INMIGRATE = "inmigrate"
    FINISH_MIGRATE = "finish-migrate"  # stopped for a moment, for a snapshot
    POSTMIGRATE = "postmigrate"  # stopped, and a snapshot was taken of it
    SHUTDOWN = "shutdown"  # the guest powered off, and the VM is still there (on_poweroff: pause)
    INTERNAL_ERROR = "internal-error"  # the guest cannot go on, likewise (on_crash: pause)

    @property
    def runs(self) -> bool:
        """Whether vCPUs execute."""
        return self is RunState.RUNNING


@dataclass(frozen=True, slots=True)
class Vcpu:
    """One vCPU: its index, its host thread, and its place in the topology that the guest is shown."""

    index: int
    tid: int
    socket: int = 0
    core: int = 0
    thread: int = 0


@dataclass(frozen=True, slots=True)
class BlockDevice:
    """A disk for query-block; ``size`` in bytes, ``backing`` the read-only base of an overlay or empty. ``node``: its
    image's name. An image that no disk uses has no ``device_id``, and nobody has asked for its size."""

    device_id: str
    filename: str
    driver: str
    size: int | None
    readonly: bool = False
    direct: bool = False
    backing: str = ""
    node: str = ""


@dataclass(frozen=True, slots=True)
class CharDevice:
    """A console for query-chardev; ``filename`` says the backend in QEMU's form, such as ``pty:/dev/pts/3``."""

    label: str
    filename: str
    frontend_open: bool


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """One virtqueue that is set up: chains that its sidecar has taken and not answered, and chains that wait for it."""

    index: int
    size: int
    in_flight: int
    waiting: int


@dataclass(frozen=True, slots=True)
class NetDevice:
    """A NIC; ``backend`` is what it is connected to, for a person."""

    device_id: str
    mac: str
    backend: str


@dataclass(frozen=True, slots=True)
class Sidecar:
    """One backend process; ``slot`` is its virtio-mmio slot, None for the 16550's."""

    device_id: str
    kind: str
    pid: int
    state: str
    slot: int | None = None
    queues: Sequence[QueueDepth] = ()


class Watching(Protocol):
    """What a person may ask about, or of, a sidecar. Each ``done`` is called once, now or later, with None when it was
    done; DeviceNotFound and QmpError are raised at once."""

    def pause(self, device_id: str, done: Callable[[QmpError | None], None]) -> None:
        """Brings one to rest, until ``resume``."""

    def resume(self, device_id: str, done: Callable[[QmpError | None], None]) -> None:
        """Lets a paused one go on."""

    def inject(self, device_id: str, what: Inject, done: Callable[[QmpError | None], None]) -> None:
        """Has its next requests fail or wait."""

    def tracing(self) -> int:
        """Which events are recorded: bits of proto.watch.Kind."""

    def trace(self, kinds: int) -> None:
        """Records these from now on."""


class Debugger(Protocol):
    """Looks into a machine, running or not."""

    def read_memory(self, gpa: int, size: int) -> bytes:
        """``size`` bytes at guest physical ``gpa``. QmpError where that is not RAM."""

    def register(self, vcpu: int, name: str) -> int:
        """A register by its name, or an MSR by its number in hexadecimal. Errors: DeviceNotFound, QmpError."""

    def registers(self, vcpu: int) -> str:
        """All that matter, for a person. Errors: DeviceNotFound, QmpError."""


class MachineControl(Protocol):
    """What the QMP server asks of the machine, always on the core's main thread.

    A method that changes something emits its event (events.py) before it returns, and raises QmpError (errors.py)
    with a reason for a person when it cannot be done; nothing has changed then.
    """

    @property
    def name(self) -> str:
        """The VM's name in machine.yaml."""

    @property
    def uuid(self) -> str:
        """The VM's UUID in its usual form."""

    @property
    def run_state(self) -> RunState:
        """The state at this moment."""

    @property
    def memory_size(self) -> int:
        """Bytes of RAM."""

    @property
    def generation_id(self) -> bytes:
        """The VM generation ID, 16 bytes."""

    def set_generation_id(self, value: bytes) -> None:
        """Gives it another, 16 bytes, and tells the guest."""

    @property
    def debugger(self) -> Debugger:
        """For looking into it."""

    def vcpus(self) -> Sequence[Vcpu]:
        """The vCPUs by index."""

    def pause(self) -> None:
        """Stops the vCPUs; they have stopped when it returns. Event STOP; nothing if they were stopped."""

    def resume(self) -> None:
        """Lets the vCPUs run. Event RESUME; nothing if they ran."""

    def reset(self, reason: str) -> None:
        """Resets the machine as its reset button would, running or paused. Event RESET with ``reason``."""

    def powerdown(self) -> None:
        """Presses the ACPI power button. Event POWERDOWN."""

    def quit(self, reason: str) -> None:
        """Ends the VM, flushing its disks. Event SHUTDOWN with ``reason``."""

    def snapshot(self, plan: Plan, then: Callable[[Report], None] | None = None) -> None:
        """Begins a snapshot, which goes on by itself: ``snapshot_report``, events MIGRATION. Takes ``plan.given``,
        unless it raises. ``then`` is called once, at its end."""

    def cancel_snapshot(self) -> None:
        """Ends the snapshot at hand, if any."""

    @property
    def snapshot_report(self) -> Report:
        """How the present snapshot, or the last, is going; without dumps and states of devices."""

    @property
    def dump_report(self) -> Report:
        """How the present dump, or the last, is going."""

    def migrate_incoming(self, uri: str, done: Callable[[QmpError | None], None], given: int = -1) -> None:
        """Names the template to a machine that was started to wait for one. ``done`` is called once, with None when
        there is one there; what comes of it shows in ``run_state``. ``given``: as of ``load_devices``."""

    def load_devices(self, uri: str, given: int, done: Callable[[QmpError | None], None]) -> None:
        """Puts the state of devices at ``uri`` into the machine, which is stopped. ``given``: the descriptor that it
        stands for, or -1; taken, unless this raises. ``done`` is called once."""

    hotplug: Hotplug
    """Devices that come and go."""
    on_event: Callable[[str, Mapping[str, object]], None]
    """Emits an event."""

    @property
    def balloon(self) -> Balloon | None:
        """The balloon, where there is one."""

    def block_devices(self) -> Sequence[BlockDevice]:
        """The disks in slot order."""

    def spare_nodes(self) -> Sequence[BlockDevice]:
        """The images that are open and no disk uses, by name."""

    def char_devices(self) -> Sequence[CharDevice]:
        """The consoles, the 16550's first."""

    def net_devices(self) -> Sequence[NetDevice]:
        """The NICs in slot order."""

    def sidecars(self) -> Sequence[Sidecar]:
        """The backend processes in slot order."""

    def restart_sidecar(
        self, device_id: str, done: Callable[[QmpError | None], None], *, upgrade: bool = False, path: str = ""
    ) -> None:
        """Puts another process in the place of a device's sidecar; ``done`` is called once, when it serves.
        ``upgrade``: one that runs the code on disk, in the directory ``path`` first.

        Raises DeviceNotFound, QmpError.
        """

    def sidecar_stats(self, device_id: str, done: Callable[[StatsReport | None], None]) -> None:
        """Asks a sidecar for its counters; ``done`` is called once, now or within seconds, with None for none.

        Raises DeviceNotFound.
        """

    def last_stats(self, device_id: str) -> StatsReport | None:
        """The counters that a sidecar gave last, if it ever did. Raises DeviceNotFound."""

    @property
    def watching(self) -> Watching:
        """For commands about one sidecar."""
