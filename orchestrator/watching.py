"""The two ways to look at a VM from outside: ``watch.sock`` and ``metrics.sock`` in its run directory."""

from __future__ import annotations

import selectors
from typing import TYPE_CHECKING

from motorcade.orchestrator.errors import UserError
from motorcade.orchestrator.httpserver import HttpServer
from motorcade.orchestrator.watchserver import WatchServer, listen, listen_tcp

if TYPE_CHECKING:
    from motorcade.orchestrator.machine import Machine
    from motorcade.orchestrator.rundir import RunDir
    from motorcade.orchestrator.vmlook import VmLook


class Watching:
    """The supervisor's. Owns the sockets until ``close``."""

    def __init__(self, machine: Machine, run: RunDir, selector: selectors.BaseSelector, look: VmLook) -> None:
        """Opens nothing yet."""
        self._machine, self._run, self._look = machine, run, look
        self._watch = WatchServer(selector, look.rings, look.status)
        self._http = HttpServer(selector, self._metrics, "text/plain; version=0.0.4; charset=utf-8")

    def open(self) -> None:
        """Listens. Errors: UserError."""
        try:
            self._watch.open(self._run.path / "watch.sock")
            self._http.add(listen(self._run.path / "metrics.sock"))
        except OSError as e:
            raise UserError(f"{self._run.path}: {e.strerror or e}") from None
        if self._machine.metrics is not None:
            self._http.add(listen_tcp(self._machine.metrics))

    def _metrics(self) -> str:
        from motorcade.orchestrator import metrics  # when somebody asks first

        return metrics.render(metrics.of_vm(self._look.status()))

    @property
    def due(self) -> float | None:
        """When ``work`` has something to do, in time.monotonic() seconds."""
        return min((t for t in (self._watch.due, self._http.due) if t is not None), default=None)

    def work(self) -> None:
        """What is due by now."""
        self._watch.work()
        self._http.work()

    def note(self, device: str, text: str) -> None:
        """Something happened to a process: whoever traces it is told."""
        self._watch.note(device, text)

    def forget(self, device: str) -> None:
        """A device was taken away."""
        self._watch.forget(device)

    def close(self) -> None:
        """Hangs up on everybody."""
        self._watch.close()
        self._http.close()
