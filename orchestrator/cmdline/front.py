"""What `vmmctl run` does once the supervisor is forked: as `vmmctl up`, but for what QEMU does otherwise."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from motorcade.orchestrator import lifeline
from motorcade.orchestrator.commands.foreground import Foreground
from motorcade.orchestrator.errors import EXIT_OK

if TYPE_CHECKING:
    from motorcade.orchestrator.cmdline.translate import Wish

_STATE_TIMEOUT = 600.0  # seconds for a command to give all of a machine's state


class Front(Foreground):
    """Quiet with -daemonize; on a console only where an option says so; gives the VM a state that comes some way."""

    def __init__(self, name: str, pid: int, line: socket.socket, wish: Wish) -> None:
        super().__init__(name, pid, line, detach=wish.daemonize)
        self._wish = wish
        self._state = wish.incoming if wish.incoming.startswith(("exec:", "fd:")) else ""

    def _await(self, event: str) -> dict[str, Any]:
        if not self._state:
            return super()._await(event)
        started = super()._await("started")
        super()._await("running")  # it waits for its state
        uri, self._state = self._state, ""
        self._give(uri)
        running = super()._await("running")
        return started if event == "started" else running

    def _give(self, uri: str) -> None:
        """Errors: UserError, with the reason."""
        from motorcade.orchestrator import rundir
        from motorcade.orchestrator.qmpclient import QmpClient

        with QmpClient(rundir.root() / self.name / "qmp.sock", timeout=_STATE_TIMEOUT) as qmp:
            kind, _, number = uri.partition(":")
            if kind == "fd":
                qmp.getfd("incoming", int(number))
                uri = "fd:incoming"
            qmp.execute("migrate-incoming", {"uri": uri})

    def _leave(self) -> int:
        if not self._wish.daemonize:
            return super()._leave()
        lifeline.send(self.line, do="detach")
        return EXIT_OK

    def _stay(self, console: str | None) -> int:
        return super()._stay(console if self._wish.attached else None)
