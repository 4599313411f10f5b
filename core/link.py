"""The core's end of one sidecar: what it was asked, what it answered, and whether it is still there.

States go one way: WAITING until its hello, then PRESENT, and GONE for good once the supervisor says that the process
has ended. A sidecar that is silent past a deadline, or answers with an error where there can be none, is reported
to the supervisor to be killed; GONE follows. Only GONE and an answered reset mean that guest memory is safe
from it.
"""

from __future__ import annotations

import enum
import logging
import threading
from collections.abc import Callable
from pathlib import Path

from motorcade.core import virtio
from motorcade.core.loop import Loop
from motorcade.proto import messages
from motorcade.proto.framing import ControlServer, Gone, Outcome, Timeout

log = logging.getLogger(__name__)

DEADLINE_MS = 10_000  # generous: a sidecar answers in under a millisecond unless its backend hangs
PING_MS = 30_000  # a host short of memory or processors is no reason to lose a disk
SHUTDOWN_MS = 30_000  # flushing a disk's cache may take long


class LinkState(enum.Enum):
    """Of one sidecar, as the core sees it."""

    WAITING = "waiting"
    PRESENT = "present"
    GONE = "gone"


class SidecarLink:
    """One sidecar. A virtio.Backend, whose methods come from vCPU threads; all else is the main thread's."""

    def __init__(
        self, device_id: str, kind: str, pid: int, loop: Loop, server: ControlServer, kill: Callable[[str, str], None]
    ) -> None:
        """``kill(device_id, reason)`` asks the supervisor to end the process."""
        self.device_id = device_id
        self.kind = kind
        self.pid = pid
        self.state = LinkState.WAITING
        self.gone_reason = ""
        self._loop = loop
        self._server = server
        self._kill = kill
        self._main = threading.current_thread()
        # Waiters of reset(): set when it was answered or the sidecar is gone.
        self._released: list[threading.Event] = []

    def hello(self) -> None:
        """The sidecar has introduced itself."""
        self.state = LinkState.PRESENT

    def died(self, reason: str) -> None:
        """The process has ended; whoever waited for it need not wait any more."""
        self.state = LinkState.GONE
        self.gone_reason = reason
        self._server.forget(self.device_id)
        self._release()

    def _release(self) -> None:
        for event in self._released:
            event.set()
        self._released.clear()

    def _request(self, body: messages.Request, deadline_ms: int, done: Callable[[], None] | None = None) -> None:
        """Asks; a time-out or an error answer has the sidecar killed."""
        if self.state is LinkState.GONE:
            return
        what = type(body).__name__.lower()

        def answered(outcome: Outcome) -> None:
            if isinstance(outcome, Timeout):
                self._kill(self.device_id, f"no answer to {what} within {deadline_ms / 1000:g} s")
            elif isinstance(outcome, messages.Error):
                self._kill(self.device_id, f"{what} failed: {outcome.text}")
            elif not isinstance(outcome, Gone) and done is not None:
                done()

        self._server.request(self.device_id, body, deadline_ms, answered)

    def activate(self, features: int, queues: dict[int, virtio.Queue]) -> None:
        """See virtio.Backend."""
        body = messages.Activate(
            features=features,
            queues=tuple(
                messages.Queue(index=i, size=q.size, desc=q.desc, driver=q.driver, device=q.device)
                for i, q in queues.items()
            ),
        )
        self._loop.call_soon(lambda: self._request(body, DEADLINE_MS))

    def write_config(self, offset: int, data: bytes) -> None:
        """See virtio.Backend."""
        self._loop.call_soon(lambda: self._request(messages.ConfigWrite(offset=offset, data=data), DEADLINE_MS))

    def reset(self) -> None:
        """See virtio.Backend. Its end is sure: an answer, or the death that a missed deadline brings about."""
        released = threading.Event()

        def ask() -> None:
            if self.state is LinkState.GONE:
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

    def stats(self, done: Callable[[messages.StatsReport | None], None]) -> None:
        """Asks for the counters; None when the sidecar is gone or gives none."""
        if self.state is not LinkState.PRESENT:
            done(None)
            return
        self._server.request(
            self.device_id,
            messages.StatsRequest(),
            DEADLINE_MS,
            lambda answer: done(answer if isinstance(answer, messages.StatsReport) else None),
        )

    def ping(self) -> None:
        """Asks for a sign of life; silence has it killed, unless a debugger holds it."""
        if self.state is not LinkState.PRESENT:
            return

        def answered(outcome: Outcome) -> None:
            if isinstance(outcome, Timeout):
                if _is_traced(self.pid):
                    log.warning("%s: no sign of life, but a debugger is attached to it", self.device_id)
                else:
                    self._kill(self.device_id, f"no sign of life for {PING_MS / 1000:g} s")

        self._server.request(self.device_id, messages.Ping(), PING_MS, answered)

    def shutdown(self) -> None:
        """Asks it to flush, close its backend and end; GONE follows."""
        self._request(messages.Shutdown(), SHUTDOWN_MS)


def _is_traced(pid: int) -> bool:
    """Whether somebody debugs this process (proc(5), TracerPid)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False  # it has ended, or is none of our business; either way nobody waits for it
    return any(line.startswith("TracerPid:") and line.split()[1] != "0" for line in status.splitlines())
