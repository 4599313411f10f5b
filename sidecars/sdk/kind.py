"""What vmmctl and the supervisor know of a kind of the kit: its options, and what it opens.

``sdk.Device`` is a kind whose queues are the kit's. One that derives from ``Kind`` itself has a data path of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import msgspec

from motorcade.sidecars import device

if TYPE_CHECKING:
    from motorcade.proto.memory import GuestMemory
    from motorcade.proto.messages import Boot


class Options(msgspec.Struct, forbid_unknown_fields=True):
    """The keys of a device in machine.yaml beside ``id`` and ``kind``: fields with types and defaults, as msgspec
    checks them. All of it must be JSON, which is how it reaches the sidecar and how a template keeps it."""

    def problems(self) -> Iterable[tuple[str, str]]:
        """What types alone cannot say: pairs of a key (empty: the device as a whole) and what is wrong with it. vmmctl
        shows them with file, line and column."""
        return ()


class Place(Protocol):
    """Where a device is opened: in the supervisor of one VM."""

    device: str  # the id in machine.yaml
    directory: Path  # the VM's own, mode 0700, gone with it

    def start(self, argv: Sequence[str], keep: Sequence[int] = ()) -> None:
        """Starts a program that ends with the VM, with these descriptors (by the same numbers) and its words in the
        VM's logs. One that this device has started before ends first. OSError: it cannot be started, or not so often.
        """

    @property
    def running(self) -> bool:
        """The program that ``start`` started last has not ended."""

    def wait_end(self, seconds: float) -> bool:
        """Whether it ends within so many seconds."""


class Kind(device.Device):
    """Of one device. The module is imported by vmmctl and the supervisor too: it must start no thread and touch nothing
    when imported."""

    version: ClassVar[int] = 1  # of what ``save`` gives
    Options: ClassVar[type[Options]] = Options
    connects: ClassVar[bool] = False
    """What ``open_at`` gives is one connection: the supervisor keeps no copy, and each new process gets another one."""

    def __init__(self, boot: Boot, fds: Mapping[str, int], memory: GuestMemory) -> None:
        """ValueError: options that are none."""
        super().__init__(boot, fds, memory)
        from motorcade.proto.messages import KitBoot

        if not isinstance(boot.role, KitBoot):
            raise ValueError("a sidecar of the kit was given the Boot of another kind")
        self.id = boot.role.device_id
        self.options: Any = msgspec.json.decode(boot.role.options, type=self.Options)

    @classmethod
    def open(cls, options: Any) -> Mapping[str, int]:
        """In the supervisor, before the sidecar exists: opens what the backend is, by label. The descriptors are the
        supervisor's, which closes them; the sidecar finds copies in ``self.fds``. Inside its sandbox it can open
        nothing. OSError and ValueError become the message of `vmmctl up`."""
        return {}

    @classmethod
    def open_at(cls, options: Any, place: Place, *, again: bool = False) -> Mapping[str, int]:
        """As ``open``, for who needs a place for it or starts a program. ``again``: the sidecar has asked for it
        (``reopen``) or is another one; nobody waits then: it is there at once, or OSError."""
        return cls.open(options)

    @classmethod
    def count_queues(cls, options: Any) -> int:
        """How many there are."""
        raise NotImplementedError

    def reopen(self) -> None:
        """Asks the supervisor to open again what ``open_at`` opens; ``reopened`` gets what comes of it. On any thread,
        once the device is there for the core."""
        assert self.ask_supervisor is not None
        self.ask_supervisor()
