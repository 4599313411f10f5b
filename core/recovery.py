"""Sidecars that take the place of others, as the core sees it: after a death, or because somebody asked.

The supervisor ends and starts processes; each new one says hello here like any other, at rest, and is told what its
device's driver had set up (or to forget, where there is no driver), and to go on. The in-flight regions say the rest
(sidecars/native/inflight.h). The guest's registers are answered meanwhile as ever. A reset by the guest waits for
nobody: what it would wait for is dead, and the successor is not told of that driver any more.

In good order (restart, upgrade) the successor is ready before the present one is brought to rest:

    restartSidecar ->   supervisor: forks or executes the successor, which stands by
                     <- sidecarReady
    quiesce, save       the present one
    handOver ->         supervisor: ends it, replaces it
                     <- sidecarReplaced; then as after a death
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from motorcade.core.life import LifeLink
from motorcade.core.link import QUIESCE_MS, SAVE_MS, LinkState, SidecarError, SidecarLink
from motorcade.core.platform import PAGER, Platform
from motorcade.core.qmp.errors import DeviceNotFound, QmpError
from motorcade.core.task import Future, Task
from motorcade.core.virtio import Identity
from motorcade.proto import messages

log = logging.getLogger(__name__)

Done = Callable[[QmpError | None], None]


class Owner(Protocol):
    """The machine."""

    @property
    def quiet(self) -> bool:
        """Whether sidecars are at rest now, and stay so until ``Platform.wake``."""

    def on_event(self, name: str, data: Mapping[str, object]) -> None:
        """Says something over QMP."""

    def kill_sidecar(self, device_id: str, reason: str) -> None:
        """This one is of no use."""


@dataclass
class _Restart:
    """Somebody asked for a successor."""

    ready: Future[str]  # why there is none, or empty
    served: Future[None]
    state: messages.DeviceState | None = None  # of the one that was brought to rest
    activation: int = 0  # to which the state belongs


class Recovery:
    """Of one VM. On the main thread."""

    def __init__(self, platform: Platform, life: LifeLink, owner: Owner) -> None:
        self._platform, self._life, self._owner = platform, life, owner
        self._restarts: dict[str, _Restart] = {}

    @property
    def busy(self) -> bool:
        """Whether a sidecar is being restarted, so that no snapshot can be taken."""
        return bool(self._restarts)

    # What the supervisor says.

    def died(self, link: SidecarLink, reason: str) -> None:
        """Its process is gone, and another will come."""
        link.down(reason)
        self._event("SIDECAR_EXITED", link, reason)

    def failed(self, link: SidecarLink, reason: str) -> None:
        """Its process is gone for good, unless somebody asks for another."""
        alive = link.state is LinkState.PRESENT
        link.died(reason)
        self._platform.lose(link.device_id, reason)
        if alive:
            self._event("SIDECAR_EXITED", link, reason)
        self._event("SIDECAR_FAILED", link, reason)
        if (restart := self._restarts.get(link.device_id)) is not None:
            restart.served.fail(SidecarError(reason))

    def replaced(self, link: SidecarLink, pid: int) -> None:
        """Another process is there, and will say hello."""
        if link.state is LinkState.GONE:
            self._platform.find(link.device_id)
        link.replaced(pid)

    def ready(self, life: messages.SidecarReady) -> None:
        """A successor stands by, or there is none."""
        if (restart := self._restarts.get(life.device_id)) is not None:
            restart.ready.set(life.error)

    # What the sidecars say.

    def hello(self, link: SidecarLink, identity: Identity, welcome: Callable[[], None]) -> None:
        """One that takes another's place has introduced itself. ``welcome`` answers it."""
        device = self._platform.devices.get(link.device_id)
        if device is not None and (problem := device.unlike(identity, link.features)):
            self._owner.kill_sidecar(link.device_id, f"it cannot take the last one's place: {problem}")
            return
        if device is not None:
            device.replug(identity)
            link.refresh(device.config)
        link.hello()
        welcome()
        restart = self._restarts.get(link.device_id)
        state = restart.state if restart is not None and restart.activation == link.activation else None
        reason = link.gone_reason
        link.take_over(state, not self._owner.quiet and not link.paused, lambda: self._serves(link, reason))

    def _serves(self, link: SidecarLink, reason: str) -> None:
        log.info("%s: process %d serves in place of the last one", link.device_id, link.pid)
        self._event("SIDECAR_RESTARTED", link, reason)
        if (restart := self._restarts.get(link.device_id)) is not None:
            restart.served.set(None)

    def _event(self, name: str, link: SidecarLink, reason: str) -> None:
        self._owner.on_event(name, {"id": link.device_id, "kind": link.kind, "reason": reason})

    # What a person asks for.

    def restart(self, device_id: str, path: str, done: Done, *, upgrade: bool) -> None:
        """Puts a successor in the place of a device's sidecar, or of one that has failed; ``done`` when it serves, or
        why it does not and what serves instead. ``upgrade``: one that runs the code on disk, in ``path`` before all
        else.

        Errors: DeviceNotFound, QmpError: nothing was begun.
        """
        link = self._platform.links.get(device_id)
        if link is None or link.kind == PAGER:
            raise DeviceNotFound(f"no device has the id {device_id}")
        if device_id in self._restarts:
            raise QmpError(f"the sidecar of {device_id} is being restarted already")
        if link.state is LinkState.WAITING:
            raise QmpError(f"the sidecar of {device_id} has ended, and is being replaced")
        restart = self._restarts[device_id] = _Restart(Future(), Future())

        def ended(error: Exception | None) -> None:
            del self._restarts[device_id]
            if error is not None and not isinstance(error, SidecarError):
                log.error("a restart failed in a way that it should not", exc_info=error)
            done(None if error is None else QmpError(str(error)))

        Task(self._restart(link, restart, messages.RestartSidecar(device_id, upgrade, path)), ended)

    async def _restart(self, link: SidecarLink, restart: _Restart, question: messages.RestartSidecar) -> None:
        self._life.send(question)
        if error := await restart.ready:
            left = "" if link.state is LinkState.GONE else "; the old one goes on"
            raise SidecarError(f"{link.device_id}: the new sidecar did not start: {error}{left}")
        if link.state is LinkState.PRESENT:
            try:
                await link.ask(messages.Quiesce(), QUIESCE_MS)
                answer = await link.ask(messages.Save(), SAVE_MS)
            except SidecarError:
                # Gone meanwhile: the successor comes as after any death. Else it goes on as it was.
                if link.state is LinkState.PRESENT:
                    self._life.send(messages.HandOver(link.device_id, cancel=True))
                    if not self._owner.quiet:
                        link.wake()
                    raise
            else:
                assert isinstance(answer, messages.Saved)
                restart.state, restart.activation = answer.state, link.activation
        self._life.send(messages.HandOver(link.device_id, cancel=False))
        await restart.served

    def close(self) -> None:
        """The VM ends: nobody waits any more."""
        for restart in list(self._restarts.values()):
            for future in (restart.ready, restart.served):
                future.fail(SidecarError("the VM ended"))
