"""The core's end of one sidecar: what it was asked, what it answered, and whether it is still there.

States: WAITING until its hello, then PRESENT; WAITING again once the supervisor says that the process has ended and
another takes its place (recovery.py), GONE where none does. A sidecar that is silent past a deadline, or
answers with an error where there can be none, is reported to the supervisor to be killed; GONE follows. Whenever it is
not PRESENT, and after an answered reset, guest memory is safe from it.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import logging
import threading
from collections.abc import Callable
from typing import Protocol

from motorcade.core import virtio
from motorcade.core.loop import Loop
from motorcade.core.task import Future
from motorcade.proto import messages
from motorcade.proto.framing import ControlServer, Gone, Outcome, Timeout

log = logging.getLogger(__name__)

DEADLINE_MS = 10_000  # generous: a sidecar answers in under a millisecond unless its backend hangs
PING_MS = 15_000  # a host short of memory or processors is no reason to replace a sidecar
DEBUG_MS = 24 * 3_600_000  # whoever is at its prompt may be thinking
STATS_MS = 3_000  # somebody waits for them at a terminal
SHUTDOWN_MS = 30_000  # flushing a disk's cache may take long
QUIESCE_MS = 30_000  # requests in flight are finished first
SAVE_MS = 30_000
WRITES_KEPT = 64  # of configuration space, while a sidecar is being replaced

_activations = itertools.count(1)


class LinkState(enum.Enum):
    """Of one sidecar, as the core sees it."""

    WAITING = "waiting"
    PRESENT = "present"
    GONE = "gone"


class SidecarError(Exception):
    """A sidecar could not do what a snapshot needs; the text begins with its name."""


class Kill(Protocol):
    """What asks the supervisor to end a device's sidecar."""

    def __call__(self, device_id: str, reason: str, *, unless_traced: bool = False) -> None:
        """``unless_traced``: not one that a debugger holds."""


class SidecarLink:
    """One sidecar. A virtio.Backend, whose methods come from vCPU threads; all else is the main thread's."""

    def __init__(
        self, device_id: str, kind: str, pid: int, loop: Loop, server: ControlServer, kill: Kill
    ) -> None:
        """``kill`` asks the supervisor to end the process."""
        self.device_id = device_id
        self.kind = kind
        self.pid = pid
        self.state = LinkState.WAITING
        self.gone_reason = ""
        self.paused = False  # by a person: it stays quiet over snapshots
        self.debug = False  # a person may hold its main thread, at a prompt, as long as they like
        self.last_stats: messages.StatsReport | None = None
        self.whole_memory = False  # all of guest memory must be there before it runs
        self._loop = loop
        self._server = server
        self._kill = kill
        self._main = threading.current_thread()
        # Waiters of reset(): set when it was answered or the sidecar is gone.
        self._released: list[threading.Event] = []
        # What the driver has set up, for a sidecar that takes the place of this one; and what it wrote meanwhile.
        self._setup: messages.Activate | None = None
        self.successor = False
        """Whether the present process has taken another's place."""
        self._writes: list[messages.ConfigWrite] = []

    def hello(self, *, whole_memory: bool = False) -> None:
        """The sidecar has introduced itself."""
        self.state = LinkState.PRESENT
        self.whole_memory = whole_memory

    def died(self, reason: str) -> None:
        """The process has ended; whoever waited for it need not wait any more."""
        self.state = LinkState.GONE
        self.paused = False
        self.gone_reason = reason
        self._setup = None  # its driver has to begin anew
        self._writes.clear()
        self._server.forget(self.device_id)
        self._release()

    def down(self, reason: str) -> None:
        """The process has ended, and another will take its place."""
        self.state = LinkState.WAITING
        self.gone_reason = reason
        self._server.forget(self.device_id)
        self._release()

    @property
    def activation(self) -> int:
        """The number of what the driver has set up; 0: nothing."""
        return self._setup.activation if self._setup is not None else 0

    @property
    def features(self) -> int:
        """What the driver that has set it up accepted."""
        return self._setup.features if self._setup is not None else 0

    def refresh(self, config: bytes) -> None:
        """Configuration space as it is now, for ``take_over``, of a kind that is told of it."""
        if self._setup is not None and self._setup.config:
            self._setup = dataclasses.replace(self._setup, config=config)

    def take_over(self, state: messages.DeviceState | None, go: bool, done: Callable[[], None]) -> None:
        """Tells a sidecar that has taken another's place, and is at rest, what the driver had set up or has written
        since; with ``go`` it goes on. ``state``: what the last one saved, where it was brought to rest. ``done``: it
        has.

        One that refuses the state goes on from the in-flight regions: it lacks what only the last one knew.
        """
        if state is not None and self.kind != "serial":  # whose ring to the guest is never at rest while the guest runs

            def loaded(outcome: Outcome) -> None:
                if isinstance(outcome, messages.Error | Timeout):
                    log.warning("%s: it does not take the last one's state: %s", self.device_id, outcome)
                self._set_up(go, done)

            self._server.request(self.device_id, messages.Load(state), DEADLINE_MS, loaded)
        else:
            self._set_up(go, done)

    def _set_up(self, go: bool, done: Callable[[], None]) -> None:
        writes, self._writes = self._writes, []
        if self._setup is not None:
            self._request(self._setup, DEADLINE_MS)
        else:
            self._request(messages.Reset(), DEADLINE_MS)
        for write in writes:
            self._request(write, DEADLINE_MS)
        if go:
            self._request(messages.Resume(), DEADLINE_MS, done)
        else:
            self._request(messages.Ping(), DEADLINE_MS, done)

    def replaced(self, pid: int) -> None:
        """Another process is in its place, and will say hello: what the last one was asked, it will not answer."""
        if self.state is LinkState.PRESENT:
            self.gone_reason = "it was replaced"
        self._server.expect(self.device_id, pid)
        self.pid, self.successor = pid, True
        self.state = LinkState.WAITING
        self._release()

    def _release(self) -> None:
        for event in self._released:
            event.set()
        self._released.clear()

    def _request(self, body: messages.Request, deadline_ms: int, done: Callable[[], None] | None = None) -> None:
        """Asks; a time-out or an error answer has the sidecar killed. One that is not there is told by
        ``take_over``."""
        if self.state is LinkState.PRESENT:
            self._ask(body, deadline_ms, done)

    def _ask(self, body: messages.Request, deadline_ms: int, done: Callable[[], None] | None = None) -> None:
        if self.debug:
            deadline_ms = DEBUG_MS
        what = type(body).__name__.lower()

        def answered(outcome: Outcome) -> None:
            if isinstance(outcome, Timeout):
                self._kill(self.device_id, _silence(what, outcome))
            elif isinstance(outcome, messages.Error):
                self._kill(self.device_id, f"{what} failed: {outcome.text}")
            elif not isinstance(outcome, Gone) and done is not None:
                done()

        self._server.request(self.device_id, body, deadline_ms, answered)

    def activate(self, features: int, queues: dict[int, virtio.Queue], config: bytes) -> None:
        """See virtio.Backend."""
        body = messages.Activate(
            features=features,
            queues=tuple(
                messages.Queue(index=i, size=q.size, desc=q.desc, driver=q.driver, device=q.device)
                for i, q in queues.items()
            ),
            config=config,
            activation=next(_activations),
        )
        self._loop.call_soon(lambda: self._activate(body))

    def _activate(self, body: messages.Activate) -> None:
        self._setup = body
        self._request(body, DEADLINE_MS)

    def write_config(self, offset: int, data: bytes) -> None:
        """See virtio.Backend."""
        self._loop.call_soon(lambda: self._write(messages.ConfigWrite(offset=offset, data=data)))

    def _write(self, body: messages.ConfigWrite) -> None:
        if self.state is LinkState.WAITING:
            # Later ones count; a driver that floods a gap of milliseconds does not fill our memory.
            self._writes = [*self._writes[-(WRITES_KEPT - 1) :], body]
        self._request(body, DEADLINE_MS)

    def reset(self) -> None:
        """See virtio.Backend. Its end is sure: an answer, or the death that a missed deadline brings about."""
        released = threading.Event()

        def ask() -> None:
            self._setup = None
            self._writes.clear()
            if self.state is not LinkState.PRESENT:  # nothing of it is alive, and its successor is not set up
                released.set()
                return
            self._released.append(released)
            self._request(messages.Reset(), DEADLINE_MS, self._release)

        if threading.current_thread() is self._main:
            ask()
            while not self._loop.run_until(released.is_set, 60.0):
                log.error("%s: still waiting for the sidecar's end", self.device_id)
        else:
            self._loop.call_soon(ask)
            released.wait()

    def ask(self, body: messages.Request, deadline_ms: int) -> Future[messages.Answer]:
        """Asks, and has nobody killed: SidecarError for silence, a refusal, or a sidecar that is gone."""
        future: Future[messages.Answer] = Future()
        what = type(body).__name__.lower()

        def answered(outcome: Outcome) -> None:
            if isinstance(outcome, Timeout):
                future.fail(SidecarError(f"{self.device_id}: {_silence(what, outcome)}"))
            elif isinstance(outcome, messages.Error):
                future.fail(SidecarError(f"{self.device_id}: {what}: {outcome.text}"))
            elif isinstance(outcome, Gone):
                future.fail(SidecarError(f"{self.device_id}: its sidecar is gone: {self.gone_reason}"))
            else:
                future.set(outcome)

        if self.state is LinkState.WAITING:
            future.fail(SidecarError(f"{self.device_id}: its sidecar is not there yet"))
        else:
            self._server.request(self.device_id, body, deadline_ms, answered)
        return future

    def pause(self) -> Future[messages.Answer]:
        """Brings it to rest, which no snapshot's end ends: only clearing ``paused`` and ``wake`` do."""
        rest = self.ask(messages.Quiesce(), QUIESCE_MS)

        def at_rest() -> None:
            try:
                rest.result()
            except SidecarError as e:
                log.warning("not paused: %s", e)
            else:
                self.paused = True

        rest.on_done(at_rest)
        return rest

    def wake(self) -> None:
        """Ends a quiesce, or the rest in which a restored sidecar starts; one that does not answer is killed. A paused
        one stays quiet."""
        if self.paused:
            return
        self._request(messages.Resume(), DEADLINE_MS)

    def restore_queues(
        self, features: int, queues: dict[int, virtio.Queue], state: messages.DeviceState, config: bytes = b""
    ) -> Future[messages.Answer]:
        """Has a sidecar that was given ``state`` (Load) go on with the queues that its driver had set up. ``config``:
        as of ``activate``.

        ValueError where the two do not belong together.
        """
        known = [q.index for q in state.queues]
        if len(set(known)) != len(known) or not set(known) <= queues.keys():
            raise ValueError(f"the sidecar's queues {known} are not the driver's {sorted(queues)}")
        body = messages.Activate(
            features,
            tuple(
                messages.Queue(
                    index=at.index,
                    size=queues[at.index].size,
                    desc=queues[at.index].desc,
                    driver=queues[at.index].driver,
                    device=queues[at.index].device,
                    last_avail=at.last_avail,
                    used_idx=at.used_idx,
                    error=at.error,
                )
                for at in state.queues
            ),
            restored=True,
            config=config,
            activation=next(_activations),
        )
        self._setup = body
        return self.ask(body, DEADLINE_MS)

    def stats(self, done: Callable[[messages.StatsReport | None], None]) -> None:
        """Asks for the counters; None when the sidecar is gone, or gives none within STATS_MS. Nobody is killed."""
        if self.state is not LinkState.PRESENT:
            done(None)
            return

        def answered(outcome: Outcome) -> None:
            report = outcome if isinstance(outcome, messages.StatsReport) else None
            self.last_stats = report or self.last_stats
            done(report)

        self._server.request(self.device_id, messages.StatsRequest(), STATS_MS, answered)

    def ping(self) -> None:
        """Asks for a sign of life; silence has it killed, unless a debugger holds it."""
        if self.state is not LinkState.PRESENT:
            return

        def answered(outcome: Outcome) -> None:
            if isinstance(outcome, Timeout):
                if self.debug:
                    log.warning("%s: no sign of life, but somebody may be at its prompt", self.device_id)
                else:
                    # Unless a debugger holds it, which the supervisor can see.
                    self._kill(self.device_id, f"no sign of life for {PING_MS / 1000:g} s", unless_traced=True)

        self._server.request(self.device_id, messages.Ping(), PING_MS, answered)

    def shutdown(self) -> None:
        """Asks it to flush, close its backend and end; GONE follows. One that has not said hello yet is killed."""
        if self.state is not LinkState.GONE:
            self._ask(messages.Shutdown(), SHUTDOWN_MS)


def _silence(what: str, outcome: Timeout) -> str:
    if outcome.unconnected:
        return f"its sidecar has closed its connection, and cannot be asked to {what}"
    return f"no answer to {what} within {outcome.deadline_ms / 1000:g} s"
