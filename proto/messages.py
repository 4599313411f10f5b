"""Every message between the processes as a frozen dataclass whose annotations say its bounds.

This module imports nothing heavy; schema.py turns these into bytes and back, and checks the bounds both ways.
``check`` methods hold what a bound cannot say. Units and meanings: control.capnp and boot.capnp.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Annotated, TypeAlias

from motorcade.proto.memory import Region

MAX_QUEUES = 64
MAX_CONFIG = 256
"""Bytes of device configuration space that fit a virtio-mmio slot of 0x200 (virtio 1.2, 4.2.2)."""
MAX_STATE = 512 << 10
"""Bytes of a sidecar's saved state."""
NO_QUEUE = 0xFFFF
"""NeedsReset.queue when the reason is not about one queue."""


CONFIG_STATE = 1
CONFIG_DRIVER = 2
"""Kinds of bytes of configuration space, besides 0 (control.capnp, Hello.configKinds)."""


class Malformed(ValueError):
    """Bytes of a peer that are not a message, or a message with a field out of its bounds."""


@dataclass(frozen=True)
class Max:
    """The most elements of a list, bytes of a Data, or bytes of a Text's UTF-8."""

    n: int


Id: TypeAlias = Annotated[str, Max(64)]
Word: TypeAlias = Annotated[str, Max(64)]
Line: TypeAlias = Annotated[str, Max(4096)]
Json: TypeAlias = Annotated[str, Max(16 << 10)]


class ErrorCode(enum.Enum):
    """Why a request was refused; the values are the enumerants of ``Error.Code``."""

    GENERIC = "generic"
    VERSION = "version"
    STATE = "state"
    INVALID = "invalid"
    UNKNOWN = "unknown"


# --- control.capnp ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hello:
    """A sidecar's first message: who it is and what its device offers."""

    protocol_version: int
    device_id: Id
    pid: int
    virtio_type: int
    features: int
    queue_sizes: Annotated[tuple[int, ...], Max(MAX_QUEUES)]
    config: Annotated[bytes, Max(MAX_CONFIG)]
    whole_memory: bool = False
    config_kinds: Annotated[bytes, Max(MAX_CONFIG)] = b""

    def check(self) -> None:
        if len(self.config_kinds) > len(self.config) or any(kind > CONFIG_DRIVER for kind in self.config_kinds):
            raise Malformed("kinds of configuration space that are none")
        for size in self.queue_sizes:
            if not 0 < size <= 32768 or size & (size - 1):
                raise Malformed(f"queue size {size} is not a power of two up to 32768")


@dataclass(frozen=True, slots=True)
class Welcome:
    """The core's answer to Hello, with the version that both will speak."""

    protocol_version: int


@dataclass(frozen=True, slots=True)
class Queue:
    """One virtqueue as the driver set it up: ring addresses are guest physical."""

    index: int
    size: int
    desc: int
    driver: int
    device: int
    last_avail: int = 0
    used_idx: int = 0
    error: int = 0

    def check(self) -> None:
        if not 0 < self.size <= 32768 or self.size & (self.size - 1):
            raise Malformed(f"queue {self.index} has size {self.size}, not a power of two up to 32768")


@dataclass(frozen=True, slots=True)
class Activate:
    """The driver is ready: what it accepted, and the queues that it set up."""

    features: int
    queues: Annotated[tuple[Queue, ...], Max(MAX_QUEUES)]
    restored: bool = False
    config: Annotated[bytes, Max(MAX_CONFIG)] = b""
    activation: int = 0


@dataclass(frozen=True, slots=True)
class Reset:
    """Stop every queue and forget the driver's settings."""


@dataclass(frozen=True, slots=True)
class ConfigWrite:
    """The driver wrote ``data`` at ``offset`` of the configuration space."""

    offset: int
    data: Annotated[bytes, Max(MAX_CONFIG)]


@dataclass(frozen=True, slots=True)
class StatsRequest:
    """Asks for a StatsReport."""


@dataclass(frozen=True, slots=True)
class Ping:
    """Asks for an Ok."""


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Flush, close the backend, answer, exit with status 0."""


@dataclass(frozen=True, slots=True)
class Quiesce:
    """Come to rest: nothing in flight, no guest memory touched and no interrupt raised until Resume."""


@dataclass(frozen=True, slots=True)
class Save:
    """While quiesced: asks for a Saved."""


@dataclass(frozen=True, slots=True)
class QueueState:
    """Where the device side of a virtqueue stands; ``error`` is an enum mc_vq_error, 0 for a healthy queue."""

    index: int
    last_avail: int
    used_idx: int
    error: int = 0


@dataclass(frozen=True, slots=True)
class DeviceState:
    """What a sidecar knows that neither the core nor guest memory does. ``version`` is of ``data``, the kind's own.

    Without ``queues`` the device was not activated.
    """

    version: int
    data: Annotated[bytes, Max(MAX_STATE)]
    queues: Annotated[tuple[QueueState, ...], Max(MAX_QUEUES)] = ()


@dataclass(frozen=True, slots=True)
class Load:
    """While quiesced and not activated: go on from this state."""

    state: DeviceState


@dataclass(frozen=True, slots=True)
class Saved:
    """The answer to Save."""

    state: DeviceState


@dataclass(frozen=True, slots=True)
class Resume:
    """Go on, and look at every queue once."""


@dataclass(frozen=True, slots=True)
class Populate:
    """To the pager: fill all of guest memory, then answer."""


@dataclass(frozen=True, slots=True)
class Inject:
    """Fail (``status``) or delay the next ``count`` requests of a kind; 0: none any more."""

    operation: Word
    count: int
    status: Word = ""
    delay_ms: int = 0


@dataclass(frozen=True, slots=True)
class Command:
    """What only one kind of sidecar understands; ``arguments`` is a JSON object."""

    name: Word
    arguments: Json = "{}"


@dataclass(frozen=True, slots=True)
class CommandResult:
    """The answer to Command: JSON."""

    value: Json


@dataclass(frozen=True, slots=True)
class Ok:
    """Done as asked."""


@dataclass(frozen=True, slots=True)
class Error:
    """Refused; ``text`` is for a person."""

    code: ErrorCode
    text: Line


@dataclass(frozen=True, slots=True)
class QueueStats:
    """Counts of one queue since its device was made; ``latency`` as in control.capnp."""

    index: int
    requests: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    errors: int = 0
    kicks: int = 0
    interrupts: int = 0
    suppressed: int = 0
    taken: int = 0
    in_flight: int = 0
    latency_ns: int = 0
    latency: Annotated[tuple[int, ...], Max(64)] = ()


@dataclass(frozen=True, slots=True)
class Counter:
    """A count that only one kind of sidecar has."""

    name: Word
    value: int


@dataclass(frozen=True, slots=True)
class StatsReport:
    """The answer to StatsRequest."""

    queues: Annotated[tuple[QueueStats, ...], Max(MAX_QUEUES)]
    detail: Annotated[tuple[Counter, ...], Max(128)] = ()


@dataclass(frozen=True, slots=True)
class ConfigChanged:
    """The whole configuration space as it is now."""

    data: Annotated[bytes, Max(MAX_CONFIG)]


@dataclass(frozen=True, slots=True)
class NeedsReset:
    """The guest broke queue ``queue`` (NO_QUEUE: the device); it needs a reset."""

    queue: int
    reason: Line


Request: TypeAlias = (
    Hello
    | Activate
    | Reset
    | ConfigWrite
    | StatsRequest
    | Ping
    | Shutdown
    | Quiesce
    | Save
    | Load
    | Resume
    | Populate
    | Inject
    | Command
)
Answer: TypeAlias = Ok | Error | Welcome | StatsReport | Saved | CommandResult
Notice: TypeAlias = ConfigChanged | NeedsReset
Body: TypeAlias = Request | Answer | Notice


@dataclass(frozen=True, slots=True)
class Message:
    """One control message. ``id`` 0 marks a notice; ``deadline_ms`` is 0 but in requests."""

    id: int
    deadline_ms: int
    body: Body


# --- boot.capnp ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Slot:
    """One device as the core sees it."""

    device_id: Id
    kind: Word
    index: int
    queues: int
    pid: int
    info: Json = "{}"
    debug: bool = False


@dataclass(frozen=True, slots=True)
class CoreBoot:
    """What the core needs to know."""

    uuid: Word
    cpus: int
    cmdline: Line
    devices: Annotated[tuple[Slot, ...], Max(64)]
    uart: Id = ""
    paused: bool = False
    kernel_path: Line = ""
    initrd_path: Line = ""
    on_reboot: Word = "reset"
    generation_id: Annotated[bytes, Max(16)] = b""
    defer: bool = False
    on_poweroff: Word = "end"
    on_crash: Word = "end"


@dataclass(frozen=True, slots=True)
class BlkBoot:
    """What a blk sidecar needs to know."""

    device_id: Id
    path: Line
    readonly: bool = False
    direct: bool = False
    overlay: bool = False
    serial: Annotated[str, Max(20)] = ""
    queues: int = 1
    discard: bool = False
    io_engine: Word = "auto"
    layers: int = 0
    removed: bool = False


@dataclass(frozen=True, slots=True)
class NetBoot:
    """What a net sidecar needs to know; ``mac`` is 6 bytes."""

    device_id: Id
    mac: Annotated[bytes, Max(6)]
    queue_pairs: int = 1
    backend: Word = "tap"
    mtu: int = 0

    def check(self) -> None:
        if len(self.mac) != 6:
            raise Malformed(f"a MAC address has 6 bytes, this one {len(self.mac)}")


@dataclass(frozen=True, slots=True)
class SerialBoot:
    """What a serial sidecar needs to know; ``scrollback`` is in bytes."""

    device_id: Id
    flavour: Word
    backend: Word
    scrollback: int = 65536


@dataclass(frozen=True, slots=True)
class PagerBoot:
    """What a pager needs to know; ``size`` is of guest memory, in bytes, which begins at ``start`` in "template.0"."""

    size: int
    eager: bool = False
    parents: int = 0
    start: int = 0

    @property
    def device_id(self) -> str:
        """Of its control connection; no device of a machine may have it."""
        return "pager"


@dataclass(frozen=True, slots=True)
class KitBoot:
    """What a sidecar of the kit (sidecars/sdk) needs to know; ``options`` is JSON."""

    device_id: Id
    kind: Word
    options: Json = "{}"


Role: TypeAlias = CoreBoot | BlkBoot | NetBoot | SerialBoot | PagerBoot | KitBoot


@dataclass(frozen=True, slots=True)
class Boot:
    """What the supervisor sends first. ``fd_labels`` is filled in by boot.send_boot."""

    protocol_version: int
    vm_name: Word
    control_socket: Line
    regions: Annotated[tuple[Region, ...], Max(64)]
    log_level: Word
    role: Role
    fd_labels: Annotated[tuple[Word, ...], Max(4096)] = ()
    incoming: bool = False
    lazy: bool = False
    standby: bool = False


@dataclass(frozen=True, slots=True)
class Ready:
    """Child: everything is open and mapped, the sandbox is closed."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Child: why it cannot start; it exits with status 1 after this."""

    reason: Json


@dataclass(frozen=True, slots=True)
class Running:
    """Core: every sidecar said hello, the vCPUs may run."""


@dataclass(frozen=True, slots=True)
class Ended:
    """Core: the VM is over; ``status`` is the exit status for vmmctl, ``detail`` is for a person."""

    status: int
    reason: Word
    detail: Json = ""


@dataclass(frozen=True, slots=True)
class SidecarDied:
    """To the core. ``replaced``: another process will take its place, if it can be had."""

    device_id: Id
    reason: Line
    replaced: bool = False


@dataclass(frozen=True, slots=True)
class ShutdownVm:
    """To the core: end the VM at once, flush the disks."""


@dataclass(frozen=True, slots=True)
class KillSidecar:
    """Core: this device's sidecar is silent past a deadline."""

    device_id: Id


@dataclass(frozen=True, slots=True)
class Silent:
    """Core: this device's sidecar gives no sign of life; it is to be killed, unless a debugger holds it."""

    device_id: Id


@dataclass(frozen=True, slots=True)
class Mapping:
    """A run of guest memory in some process: ``size`` bytes at ``address`` are those at ``offset`` of the memfd."""

    address: int
    size: int
    offset: int


Mappings: TypeAlias = Annotated[tuple[Mapping, ...], Max(64)]


@dataclass(frozen=True, slots=True)
class LazyReady:
    """Child, with its userfaultfd as the one descriptor: ready, and its memory is to be filled."""

    mappings: Mappings


@dataclass(frozen=True, slots=True)
class Serve:
    """To the pager, with a userfaultfd: fill that process's mapping."""

    process: Word
    mappings: Mappings


@dataclass(frozen=True, slots=True)
class WorkingSet:
    """Pager: the chunks that were asked for first, in order, as little-endian 32-bit numbers."""

    chunks: Annotated[bytes, Max(60 << 10)]


@dataclass(frozen=True, slots=True)
class Damaged:
    """Pager: the template cannot be read, or its bytes are not what was saved. The VM cannot go on."""

    reason: Line


@dataclass(frozen=True, slots=True)
class OpenTarget:
    """Core: where a snapshot is to go. ``what``: template, state, devices or dump (boot.capnp)."""

    uri: Line
    base: Line = ""
    what: Word = "template"


@dataclass(frozen=True, slots=True)
class Target:
    """To the core, with descriptors by label; or why there is no such place."""

    error: Line
    labels: Annotated[tuple[Word, ...], Max(250)] = ()
    description: Json = ""


@dataclass(frozen=True, slots=True)
class CopyDisks:
    """Core: the disks are quiet; copy what the template needs of them."""


@dataclass(frozen=True, slots=True)
class DisksCopied:
    """To the core: what is to be remembered of the disks, as JSON; or why it could not be copied."""

    error: Line
    disks: Json = "[]"


@dataclass(frozen=True, slots=True)
class CloseTarget:
    """Core: everything is written and fsynced (``keep``), or none of it counts."""

    keep: bool


@dataclass(frozen=True, slots=True)
class TargetClosed:
    """To the core: the target has its name now (no error), or is removed."""

    error: Line


@dataclass(frozen=True, slots=True)
class OpenIncoming:
    """Core: a state that is to come in; of fd:NAME with its descriptor. ``what``: machine or devices (boot.capnp)."""

    uri: Line
    what: Word = "machine"


@dataclass(frozen=True, slots=True)
class Incoming:
    """To the core, with the descriptor of the state; or why there is none."""

    error: Line


@dataclass(frozen=True, slots=True)
class SidecarReplaced:
    """To the core: a sidecar has ended, and process ``pid`` is in its place."""

    device_id: Id
    pid: int


@dataclass(frozen=True, slots=True)
class Reopen:
    """A sidecar of the kit: open again what its kind's ``open_at`` opens."""


@dataclass(frozen=True, slots=True)
class Reopened:
    """To that sidecar, with descriptors by label; or why there are none."""

    error: Line
    labels: Annotated[tuple[Word, ...], Max(16)] = ()


@dataclass(frozen=True, slots=True)
class Hotplug:
    """Core: a request of proto/hotplug.py, as JSON."""

    request: Json


@dataclass(frozen=True, slots=True)
class Hotplugged:
    """To the core: its answer as JSON, with descriptors by label; or why it was not done, and nothing has changed."""

    error: Line
    answer: Json = "{}"
    labels: Annotated[tuple[Word, ...], Max(250)] = ()


@dataclass(frozen=True, slots=True)
class RestartSidecar:
    """Core: put a successor in the place of this device's sidecar, in good order."""

    device_id: Id
    upgrade: bool = False
    path: Line = ""


@dataclass(frozen=True, slots=True)
class SidecarReady:
    """To the core: the successor stands by; or why there is none."""

    device_id: Id
    error: Line = ""


@dataclass(frozen=True, slots=True)
class HandOver:
    """Core: the present sidecar is at rest and may be ended; or (``cancel``) it goes on, and the successor may be."""

    device_id: Id
    cancel: bool = False


@dataclass(frozen=True, slots=True)
class Go:
    """To a sidecar that stands by."""


@dataclass(frozen=True, slots=True)
class Ending:
    """Core: the VM ends. Sidecars that end from here on are not missed."""


Life: TypeAlias = (
    Ready
    | Failed
    | Running
    | Ended
    | SidecarDied
    | ShutdownVm
    | KillSidecar
    | Silent
    | LazyReady
    | Serve
    | WorkingSet
    | Damaged
    | OpenTarget
    | Target
    | CopyDisks
    | DisksCopied
    | CloseTarget
    | TargetClosed
    | OpenIncoming
    | Incoming
    | SidecarReplaced
    | Reopen
    | Reopened
    | Hotplug
    | Hotplugged
    | RestartSidecar
    | SidecarReady
    | HandOver
    | Go
    | Ending
)
