"""What a snapshot is to be, and how it is going: what QMP and the coordinator say to each other."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class SnapshotError(Exception):
    """Why there is no snapshot, for a person."""


class Cancelled(SnapshotError):
    """Somebody asked for that."""


class Status(enum.StrEnum):
    """QEMU's MigrationStatus, as far as it applies here."""

    NONE = "none"
    SETUP = "setup"
    ACTIVE = "active"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def over(self) -> bool:
        """Whether nothing is going on."""
        return self not in (Status.SETUP, Status.ACTIVE)


class Kind(enum.Enum):
    """Whom a snapshot is for: each of them is asked after by commands of its own."""

    MIGRATION = enum.auto()  # query-migrate, events MIGRATION
    DUMP = enum.auto()  # query-dump
    DEVICES = enum.auto()  # nobody; the command waits for its end


@dataclass(frozen=True)
class Plan:
    """A snapshot to be taken. ``uri``, ``base`` and ``what`` are OpenTarget's (boot.capnp)."""

    uri: str
    base: str = ""
    what: str = "template"
    live: bool = False
    rest: bool = False
    """The machine does not go on afterwards, until it is told to: nothing of what was saved changes."""
    given: int = -1
    """The descriptor that ``uri`` (fd:NAME) stands for; whoever starts the snapshot takes it."""

    @property
    def kind(self) -> Kind:
        """See Kind."""
        return {"dump": Kind.DUMP, "devices": Kind.DEVICES}.get(self.what, Kind.MIGRATION)

    @property
    def is_dump(self) -> bool:
        """Whether it is for debuggers: nobody goes on from it."""
        return self.what == "dump"

    @property
    def needs_ram(self) -> bool:
        """Whether all of RAM has to be there: the core writes it, or the supervisor does."""
        return self.what in ("template", "save", "dump")

    @property
    def ram_label(self) -> str | None:
        """Which descriptor RAM is written to; None where the core writes none."""
        return {"template": "memory", "dump": "state"}.get(self.what)

    @property
    def labels(self) -> set[str]:
        """Of the descriptors that it takes."""
        return {"state", self.ram_label or "state"} | ({"base.state", "base.0"} if self.base else set())

    @property
    def asks_supervisor(self) -> bool:
        """Whether that copies disks or RAM while all stands still."""
        return self.what in ("template", "save")


@dataclass
class Report:
    """How the present snapshot, or the last, is going. Times in seconds of time.monotonic(), sizes in bytes."""

    status: Status = Status.NONE
    error: str = ""
    started: float = 0.0
    active: float = 0.0  # when SETUP was over
    ended: float = 0.0
    downtime: float = 0.0  # how long the guest stood still for it
    ram_total: int = 0
    ram_remaining: int = 0
    transferred: int = 0
