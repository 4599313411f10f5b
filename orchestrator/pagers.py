"""The pager of one VM, from the supervisor's side: what it is given, and its replacement when it dies.

It fills the memory of a restored machine, in every process that has it mapped: each sends its userfaultfd when it is
ready, the supervisor keeps a copy and hands it on. While there is no pager, whoever touches a page that is missing
waits; nothing else is lost, and the next one gets the same descriptors.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from motorcade.orchestrator import memoryfile, savefile
from motorcade.orchestrator.errors import UserError
from motorcade.proto import boot, messages

if TYPE_CHECKING:
    from motorcade.orchestrator.frozendisks import Incoming
    from motorcade.orchestrator.spawn import Child

log = logging.getLogger("motorcade.supervisor")

ID = "pager"  # its role, and its device id on the control plane
WORKING_SET = "working-set"  # its file in a template, and its descriptor
_BACK_OFF = 0.05  # seconds before the second replacement in a row; doubled with each, up to
_BACK_OFF_MAX = 2.0
_STEADY = 10.0  # seconds that a pager has to live for its death to be a new story
_MOST_DEATHS = 12  # in a row: about 20 seconds; more where machine.yaml's ``restarts`` is more


@dataclass(frozen=True)
class _Served:
    """A process whose memory is filled. Owns the userfaultfd."""

    process: str
    uffd: int
    mappings: tuple[messages.Mapping, ...]


class PagerKeeper:
    """Keeps a pager alive. Owns the userfaultfds; ``close`` lets go of them."""

    def __init__(
        self,
        fork: Callable[[], Child],
        send_boot: Callable[[Child, messages.Role, dict[str, int]], None],
        size: int,
        *,
        eager: bool,
        restarts: int,
    ) -> None:
        """``size``: bytes of RAM. ``eager``: it copies everything at the start, and serves nobody. ``restarts``: as in
        machine.yaml."""
        self._fork, self._send_boot, self._size, self.eager = fork, send_boot, size, eager
        self.child: Child | None = None
        self.due: float | None = None  # monotonic: when ``replace`` is to be called
        self._fds: dict[str, int] = {}  # what each pager gets; Resources owns them
        self._parents = self._start = 0
        self._served: list[_Served] = []
        self._booted = False
        self._born = 0.0
        self._deaths = 0
        self._most_deaths = max(_MOST_DEATHS, restarts)

    def start(self) -> Child:
        """The first one, which waits for its Boot."""
        self.child = self._fork()
        return self.child

    def boot(self, fds: dict[str, int], parents: int, start: int) -> None:
        """The template is known: descriptors by label, which stay the caller's as long as there is a VM. ``start``:
        where memory begins in the first."""
        assert self.child is not None
        self._fds, self._parents, self._start = fds, parents, start
        self._boot()

    def _boot(self) -> None:
        assert self.child is not None
        self._born = time.monotonic()
        self._booted = True
        role = messages.PagerBoot(self._size, self.eager, self._parents, self._start)
        self._send_boot(self.child, role, self._fds)
        for served in self._served:
            self._serve(served)

    def add(self, process: str, uffd: int, mappings: Sequence[messages.Mapping]) -> None:
        """A process is ready to have its memory filled. Takes ``uffd``."""
        served = _Served(process, uffd, tuple(mappings))
        self._served.append(served)
        if self._booted:
            self._serve(served)

    def _serve(self, served: _Served) -> None:
        assert self.child is not None
        if self.child.alive:
            boot.send_life(self.child.link, messages.Serve(served.process, served.mappings), [served.uffd])

    def forget(self, process: str) -> None:
        """A process has ended: its memory needs nothing any more."""
        for served in [s for s in self._served if s.process == process]:
            os.close(served.uffd)
            self._served.remove(served)

    def died(self) -> None:
        """The pager has ended, and should not have. ``due`` says when its replacement is to come.

        Errors: UserError where it ends again and again.
        """
        self._booted = False
        if time.monotonic() - self._born > _STEADY:
            self._deaths = 0
        self._deaths += 1
        if self._deaths > self._most_deaths:
            raise UserError(f"the pager ended {self._most_deaths} times in a row")
        wait = 0.0 if self._deaths == 1 else min(_BACK_OFF * 2 ** (self._deaths - 2), _BACK_OFF_MAX)
        self.due = time.monotonic() + wait

    def replace(self) -> Child:
        """Another one, which waits for ``resume``: the core has to know of it before it says hello."""
        self.due = None
        return self.start()

    def resume(self) -> None:
        """Gives the replacement the rights of the last one, if that had any yet."""
        if self._fds:
            self._boot()

    def close(self) -> None:
        """Lets go of the userfaultfds."""
        for served in self._served:
            os.close(served.uffd)
        self._served.clear()


def open_template(incoming: Incoming, state: int | None = None) -> dict[str, int]:
    """The descriptors of a template for the pager, by label; the caller's. ``state``: its state, open already, of which
    a copy is among them. Errors: UserError."""
    place = Path(incoming.template)
    fds: dict[str, int] = {}
    try:
        if state is not None:
            fds["state"] = os.dup(state)
        elif incoming.start:
            fds["state"] = savefile.open_state(place)
        else:
            fds["state"] = os.open(place / "state" if place.is_dir() else place, os.O_RDONLY | os.O_CLOEXEC)
        for n, path in enumerate(incoming.memory):
            fds[f"template.{n}"] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if not place.is_dir():
                memoryfile.lock_template(fds[f"template.{n}"], path)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # not recorded yet, or no template
            fds[WORKING_SET] = os.open(place / WORKING_SET, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        for fd in fds.values():
            os.close(fd)
        raise UserError(f"{e.filename}: {e.strerror}") from None
    except UserError:
        for fd in fds.values():
            os.close(fd)
        raise
    return fds


def keep_working_set(folder: Path, data: bytes) -> None:
    """Puts what a pager recorded beside the template, for the next ones; the first to come wins.

    A template that cannot be written to, or is gone, does without: that is logged.
    """
    from motorcade.sidecars.pager import workingset

    part = folder / f"{WORKING_SET}.{os.getpid()}.part"
    try:
        content = workingset.encode(data)
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            try:
                os.write(fd, content)
                os.fsync(fd)
            finally:
                os.close(fd)
            os.link(part, folder / WORKING_SET)
        except FileExistsError:
            log.info("%s has a working set already", folder)
        finally:
            part.unlink()
    except workingset.WorkingSetError as e:
        log.error("the pager's working set: %s", e)
    except OSError as e:
        log.warning("the working set of %s is not kept: %s", folder, e.strerror)
