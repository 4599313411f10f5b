"""VMs that are prepared before anybody asks: a supervisor that has forked its core and sidecars, all of them waiting.

They have no VM's data and no run directory. The zygote keeps some of each shape that was asked for lately, and makes
up for those that were taken once requests have stopped for a moment, so that a burst of clones is not slowed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import socket
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import msgspec
from msgspec import Meta

from motorcade.orchestrator import footprint
from motorcade.orchestrator.footprint import Footprint
from motorcade.proto.memory import PAGE

if TYPE_CHECKING:
    from motorcade.orchestrator.ahead import Ahead
    from motorcade.orchestrator.machine import Machine

log = logging.getLogger("motorcade.zygote")

QUIET = 0.05  # seconds without a request before the next one is prepared
SHAPES = 3  # the most that are kept ready; the one that was asked for longest ago goes
MAX_DEATHS = 3  # of a shape's spares, after which no more are made until the shape is asked for again
_MAX_SIDECARS = 64
_MAX_MEMORY = 1 << 46


class BadShape(ValueError):
    """A request's shape is none."""


def shape(machine: Machine, *, pager: bool = False) -> dict[str, Any]:
    """What a prepared VM must have in common with ``machine``, as a request carries it. ``pager``: its memory fills
    itself."""
    consoles = len(machine.consoles)
    rngs = sum(kit.kind == "rng" for kit in machine.devices)  # other packages' kinds are not prepared
    sidecars = {"blk": len(machine.disks), "net": len(machine.nets), "serial": consoles}
    sidecars |= {"rng": rngs, "balloon": int(machine.the_balloon is not None), "pager": int(pager)}
    present = {kind: number for kind, number in sidecars.items() if number}
    return {"sidecars": present, "memory": int(machine.memory)}


class Shape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a VM can have ready before anything else of it is known. ``memory``: bytes of RAM; 0: not yet."""

    sidecars: dict[
        Literal["blk", "net", "serial", "rng", "balloon", "pager"], Annotated[int, Meta(ge=1, le=_MAX_SIDECARS)]
    ]
    memory: Annotated[int, Meta(ge=0, le=_MAX_MEMORY, multiple_of=PAGE)] = 0

    @property
    def name(self) -> str:
        """The same for the same shape."""
        return json.dumps(msgspec.to_builtins(self), sort_keys=True)


def check(shape: Any) -> Shape:
    """The shape of a request. Errors: BadShape."""
    try:
        checked = msgspec.convert(shape, Shape)
    except msgspec.ValidationError as e:
        raise BadShape(f"no shape: {e}") from None
    if sum(checked.sidecars.values()) > _MAX_SIDECARS:
        raise BadShape(f"more than {_MAX_SIDECARS} sidecars")
    return checked


@dataclass
class Spare:
    """A prepared VM. Owns the zygote's end of a socket, whose end is the spare's end."""

    pid: int
    link: socket.socket

    @property
    def ready(self) -> bool:
        """It has forked its processes, and is not gone."""
        return bool(select.select([self.link], [], [], 0)[0]) and self.link.recv(1, socket.MSG_PEEK) != b""


@dataclass
class _Shelf:
    shape: Shape
    spares: list[Spare] = field(default_factory=list)
    deaths: int = 0  # of spares since one was asked for
    example: int = 0  # the supervisor that was forked last for such a VM
    footprint: Footprint = field(default_factory=dict)  # of an example's processes


class Pool:
    """The spares of a zygote, by shape."""

    def __init__(self, size: int) -> None:
        """``size``: how many of each shape; 0: none."""
        self.size = size
        self._shelves: OrderedDict[str, _Shelf] = OrderedDict()  # the one asked for last at the end
        self._last = 0.0  # when the last one was prepared, as time.monotonic()

    def take(self, shape: Any, line: int) -> int | None:
        """Gives the lifeline to a spare of that shape. Its pid; None where there is none. Errors: BadShape."""
        if shape is None or self.size == 0:
            return None
        wanted = check(shape)
        shelf = self._shelves.setdefault(wanted.name, _Shelf(wanted))
        self._shelves.move_to_end(wanted.name)
        shelf.deaths = 0
        if len(self._shelves) > SHAPES:
            self._drop(self._shelves.popitem(last=False)[1])
        while shelf.spares:
            spare = shelf.spares.pop(0)
            with spare.link:
                try:
                    socket.send_fds(spare.link, [b"take"], [line])
                except (BrokenPipeError, ConnectionResetError):
                    continue  # killed; its end will be reported to ``gone``
                return spare.pid
        return None

    def forked(self, shape: Any, pid: int) -> None:
        """A request of that shape was answered with this supervisor: what it writes to, spares will."""
        if shape is not None and (shelf := self._shelves.get(check(shape).name)) is not None:
            shelf.example = pid

    def due(self, used: float) -> float | None:
        """When ``prepare`` has something to do, as time.monotonic(). ``used``: when the last request came."""
        return max(used, self._last) + QUIET if self._short() is not None else None

    def prepare(self, spawn: Callable[[Callable[[], NoReturn]], int]) -> None:
        """Has ``spawn`` fork one more spare, of the shape that was asked for last among those that lack one."""
        shelf = self._short()
        if shelf is None:
            return
        if not shelf.footprint and shelf.example:
            shelf.footprint = footprint.learn(shelf.example)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = spawn(lambda: run(theirs, shelf.shape, shelf.footprint))
        theirs.close()
        shelf.spares.append(Spare(pid, ours))
        self._last = time.monotonic()

    def gone(self, pid: int) -> None:
        """A process of this zygote has ended; perhaps it was a spare."""
        for shelf in self._shelves.values():
            if shelf.example == pid:
                shelf.example = 0
            for spare in [s for s in shelf.spares if s.pid == pid]:
                shelf.spares.remove(spare)
                shelf.deaths += 1
                spare.link.close()

    def status(self) -> list[dict[str, Any]]:
        """For a person, the shape asked for last first."""
        return [
            {
                "sidecars": shelf.shape.sidecars,
                "memory": shelf.shape.memory,
                "size": self.size,
                "forked": [spare.pid for spare in shelf.spares],
                "ready": sum(spare.ready for spare in shelf.spares),
            }
            for shelf in reversed(self._shelves.values())
        ]

    def _short(self) -> _Shelf | None:
        shelves = reversed(self._shelves.values())
        return next((s for s in shelves if len(s.spares) < self.size and s.deaths < MAX_DEATHS), None)

    @staticmethod
    def _drop(shelf: _Shelf) -> None:
        for spare in shelf.spares:
            spare.link.close()


def run(link: socket.socket, wanted: Shape, known: Footprint) -> NoReturn:
    """A spare's process, from the fork on; ``link`` is its end of the socket to the zygote, ``known`` what its
    processes are going to write to."""
    from motorcade.orchestrator import daemon

    try:
        line = wait(link, wanted, known)
    except BaseException:
        log.exception("a prepared VM ends")
        os._exit(1)
    if line is None:
        os._exit(0)
    daemon.run(line, daemon.take_environment)


def wait(link: socket.socket, wanted: Shape, known: Footprint) -> socket.socket | None:
    """Forks the processes, and waits. The lifeline of whoever takes it; None when the zygote has no use for it."""
    from motorcade.orchestrator import daemon, spawn

    daemon.leave_parent(link.fileno())
    name = f"prepared by {os.getppid()}"
    spawn.title("supervisor", name)
    ready = open_ahead(wanted)
    for kind, number in (*wanted.sidecars.items(), ("core", 1)):
        for _ in range(number):
            spawn.prepare(kind, name, ready, known.get(kind, []))
    footprint.copy_ahead(known.get("supervisor", []))  # each fork has made our pages copy-on-write again
    with link:
        with contextlib.suppress(BrokenPipeError):  # taken already: the zygote has said its word, and closed
            link.send(b"ready")
        try:
            data, lines, _, _ = socket.recv_fds(link, 16, 1)
        except ConnectionResetError:
            # It closed with our word unread. unix(7) says so first, and keeps its own last word for the next call.
            data, lines, _, _ = socket.recv_fds(link, 16, 1)
    return socket.socket(fileno=lines[0]) if data else None


def open_ahead(wanted: Shape) -> Ahead | None:
    """RAM, kept for the VM to come; None where there is none to keep or no KVM here."""
    from motorcade.orchestrator import ahead, resources
    from motorcade.orchestrator.errors import UserError
    from motorcade.sidecars import lazymem

    if wanted.memory == 0:
        return None
    try:
        os.close(resources.open_kvm(1))
    except UserError as e:
        log.info("no blank VMs: %s", e)  # whoever takes this VM will be told
        return None
    lazy = "pager" in wanted.sidecars and not lazymem.permitted()
    fd = resources.sealed_memfd("guest-memory", wanted.memory)
    kept = ahead.Ahead(fd, lazy, lazymem.open_device() if lazy else None)
    ahead.keep(kept)
    return kept
