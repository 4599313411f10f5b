"""States that come into a machine: from its Boot, by migrate-incoming, and by load-devices-state.

Wherever a state is, the supervisor has opened it; here it is read, checked and put into the machine.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Protocol

from motorcade.core.kvm import KvmError
from motorcade.core.life import LifeLink
from motorcade.core.link import SidecarError
from motorcade.core.platform import Platform
from motorcade.core.qmp.errors import QmpError
from motorcade.core.snapshot import devices
from motorcade.core.snapshot.restore import restore
from motorcade.core.task import Future, Task
from motorcade.proto import messages

log = logging.getLogger(__name__)

Done = Callable[[QmpError | None], None]
_EXPECTED = (ValueError, KvmError, SidecarError, OSError, devices.LoadError)


class Owner(Protocol):
    """The machine."""

    def expect_hellos(self) -> Future[None]:
        """Every sidecar is to say hello soon; when all have."""

    def announce(self) -> None:
        """A state is there that a machine began with: it runs, or could."""

    def fail(self, reason: str) -> None:
        """Ends the VM: it is neither what it was nor what it was to be."""

    def hold(self) -> Future[None]:
        """See coordinator.Owner, as below."""

    def let_go(self) -> None: ...

    def loaded(self) -> None:
        """The machine, which is held, is another one now: as restored, and it has not run."""


class Incoming:
    """Of one VM. ``deferred``: it was started to wait for a state."""

    def __init__(self, platform: Platform, life: LifeLink, owner: Owner, *, deferred: bool) -> None:
        self._platform, self._life, self._owner = platform, life, owner
        self._waits = deferred
        self.busy = False
        """Whether a state is on its way into a machine that has been there before."""

    def begin(self, state: int) -> None:
        """Restores the machine. ``state``: the template's; taken. The end is the owner's to hear."""
        self._waits = False
        Task(self._restore(state), self._restored)

    async def _restore(self, state: int) -> None:
        try:
            await restore(self._platform, state, self._owner.expect_hellos())
        finally:
            os.close(state)

    def _restored(self, error: Exception | None) -> None:
        if error is None:
            self._owner.announce()
        else:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if not isinstance(error, _EXPECTED):
            log.error("restoring failed in a way that it should not", exc_info=error)
        self._owner.fail(str(error) or type(error).__name__)

    def migrate(self, uri: str, given: int, done: Done, *, what: str = "machine") -> None:
        """See qmp.MachineControl.migrate_incoming. ``what``: OpenIncoming's."""
        if not self._waits:
            raise QmpError("this machine does not wait for a template: it was not started with --incoming defer")
        self._waits = False

        async def open_state() -> None:
            state = await self._open(uri, given, what)
            done(None)
            self.begin(state)

        def ended(error: Exception | None) -> None:
            if error is not None:
                self._waits = True
                done(QmpError(str(error)))

        Task(open_state(), ended)

    def load(self, uri: str, given: int, done: Done) -> None:
        """See qmp.MachineControl.load_devices."""
        if self._waits:
            self.migrate(uri, given, done, what="devices")
            return
        if self.busy:
            raise QmpError("a state is being loaded already")
        self.busy = True

        def ended(error: Exception | None) -> None:
            self.busy = False
            if error is not None and not isinstance(error, devices.LoadError):
                self._fail(error)
            self._owner.let_go()
            done(None if error is None else QmpError(str(error)))

        Task(self._load(uri, given), ended)

    async def _load(self, uri: str, given: int) -> None:
        await self._owner.hold()  # it is stopped, and stays so
        state = await self._open(uri, given, "devices")
        try:
            restored = devices.read(self._platform, state)
        finally:
            os.close(state)
        await devices.load(self._platform, restored)
        self._owner.loaded()

    async def _open(self, uri: str, given: int, what: str) -> int:
        """The descriptor of a state, the caller's. Takes ``given``. Errors: LoadError."""
        question = messages.OpenIncoming(uri, what)
        try:
            answer, fds = await self._life.ask(question, messages.Incoming, [given] if given >= 0 else [])
        finally:
            if given >= 0:
                os.close(given)
        if answer.error or len(fds) != 1:
            for fd in fds:
                os.close(fd)
            raise devices.LoadError(answer.error or "the supervisor opened no state")
        return fds[0]
