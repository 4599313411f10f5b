"""What `vmmctl up` does once the supervisor is forked: tell how the start goes, be the console, tell the end."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import time
from typing import Any

from motorcade.orchestrator import lifeline
from motorcade.orchestrator.commands.common import table, tell
from motorcade.orchestrator.errors import EXIT_ERROR, EXIT_OK, UserError

POWERDOWN_TIMEOUT = 30.0  # seconds for the guest, after SIGINT or SIGTERM, before the VM is ended at once
_SLOW = 1.0  # seconds after which a step of the start is worth a word
_ENDING = 5.0  # seconds between a console's end and the VM's that are nothing strange: disks are flushed meanwhile
_REASONS = {
    "guest-shutdown": "powered off",
    "guest-reset": "rebooted, and on_reboot is exit",
    "host-qmp-quit": "was ended by QMP's quit",
    "host-signal": "was ended",
    "core-died": "lost its core process",
}


class _Signalled(BaseException):
    """SIGINT, SIGTERM or SIGHUP came for vmmctl."""


class Foreground:
    """vmmctl's side of a VM that it started. Owns ``line``, its end of the lifeline."""

    def __init__(self, name: str, pid: int, line: socket.socket, *, detach: bool) -> None:
        self.name, self.pid, self.line, self.detach = name, pid, line, detach
        self._pidfd = lifeline.pidfd(line, pid)  # None: it is gone already
        self.tty = os.isatty(0) and os.isatty(1)
        self.processes: list[dict[str, Any]] = []
        self.is_running = False
        self._signals = 0

    def run(self) -> int:
        """Until the VM ends, or is left. vmmctl's exit status; UserError where the VM did not come to run."""
        try:
            # Nested, so that wherever the second signal comes after the first, it is taken as the second.
            try:
                try:
                    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                        signal.signal(number, self._on_signal)
                    # In the foreground the console is joined before the guest's first word; the start goes on.
                    started = self._await("running" if self.detach else "started")
                    return self._leave() if self.detach else self._stay(started["console"])
                except _Signalled:
                    self._press_button()
                    self._signals = 2  # a second one would change nothing any more
            except _Signalled:
                tell(f"ending {self.name} at once")
            return self._end_at_once()
        finally:
            self.line.close()
            if self._pidfd is not None:
                os.close(self._pidfd)

    def _on_signal(self, *_: object) -> None:
        """The first two count."""
        self._signals += 1
        if self._signals <= 2:
            raise _Signalled

    def _receive(self, timeout: float | None = None) -> dict[str, Any] | None:
        """The supervisor's next message; None after ``timeout`` seconds. A supervisor that died without saying how
        the VM ended is an end, too."""
        self.line.settimeout(timeout)
        try:
            message = lifeline.receive(self.line)
        except TimeoutError:
            return None
        if message is None:
            message = {"event": "ended", "status": EXIT_ERROR, "reason": "supervisor-died",
                       "detail": f"see vmmctl logs {self.name}"}  # fmt: skip
        self.is_running |= message["event"] == "running"
        if message["event"] == "failed":
            self._wait_gone()
            raise UserError(message["message"], message["status"])
        return message

    def _is_alive(self) -> bool:
        """Whether the supervisor still runs."""
        return self._pidfd is not None and not select.select([self._pidfd], [], [], 0)[0]

    def _wait_gone(self) -> None:
        """Until the supervisor, which has said its last word, has ended. It may be a zygote's child and not ours."""
        if self._pidfd is not None:
            select.select([self._pidfd], [], [])

    def _await(self, event: str) -> dict[str, Any]:
        """The start, up to this event, with a word about each step that takes long."""
        step, shown, since = "starting", "", time.monotonic()
        while True:
            message = self._receive(_SLOW)
            if message is None:
                if step != shown:
                    tell(f"{self.name}: {step} ...")
                    shown = step
            elif message["event"] == "progress":
                step = message["text"]
            elif message["event"] == "ended":
                self._wait_gone()
                raise UserError(f"{self.name} ended while it started: {message['reason']}: {message['detail']}")
            else:
                if message["event"] == "started":
                    step, self.processes = "waiting for the processes", message["processes"]
                if message["event"] == event:
                    if shown:
                        tell(f"{self.name}: {event} after {time.monotonic() - since:.1f} s")
                    return message

    def _leave(self) -> int:
        """The VM goes on without us."""
        lifeline.send(self.line, do="detach")
        name = self.name
        print(f"{name} runs in the background; vmmctl console {name} attaches, vmmctl down {name} ends it")
        return EXIT_OK

    def _stay(self, console: str | None) -> int:
        """The console, then the end."""
        if self.tty:
            self._show_processes()
        if console is not None:
            from motorcade.orchestrator.console import LEFT, attach

            stdin = 0 if self.tty or not os.isatty(0) else None  # a terminal behind a redirected output is not ours
            try:
                if attach(console, stdin=stdin, stdout=1) == LEFT:
                    return self._leave()
            except UserError as e:
                if self._is_alive():
                    tell(str(e))  # and go on without; else the next message says why there is none
        return self._await_end()

    def _show_processes(self) -> None:
        rows = [["PROCESS", "PID"], ["supervisor", str(self.pid)]]
        table(rows + [[p["role"], str(p["pid"])] for p in self.processes])

    def _await_end(self) -> int:
        """Its exit status, with a word about how it ended unless that was the guest's own wish."""
        told = False
        while True:
            message = self._receive(None if told else _ENDING)
            if message is None:
                tell(f"{self.name} runs on; Ctrl-C presses its power button")
                told = True
            elif message["event"] == "sidecar-died":
                tell(f"{self.name}: {message['role']} died: {message['reason']}")
            elif message["event"] == "ended":
                self._signals = 2  # they come too late
                self._wait_gone()
                return self._tell_end(message)

    def _tell_end(self, message: dict[str, Any]) -> int:
        status: int = message["status"]
        reason = _REASONS.get(message["reason"], f"ended: {message['reason']}")
        if status != EXIT_OK or self.tty:
            tell(f"{self.name} {reason}")
        if status != EXIT_OK and message["detail"]:
            tell(message["detail"])
            tell(f"more: vmmctl logs {self.name}")
        return status

    def _press_button(self) -> None:
        """After a signal. Returns when the VM has ended or will not by itself."""
        from motorcade.orchestrator import rundir
        from motorcade.orchestrator.commands.down import Ending
        from motorcade.orchestrator.qmpclient import QmpError

        tell(f"powering {self.name} off (once more ends it at once)")
        if self.processes and not self.is_running:
            self._await("running")  # in a moment; the guest's first words may have come before it
        vm = rundir.find(self.name)
        if not (self.is_running and vm is not None and vm.alive):
            return
        ending = Ending(vm)
        try:
            ending.powerdown(POWERDOWN_TIMEOUT)
        except QmpError as e:  # the VM has just ended, or does not answer: its end is next either way
            tell(str(e))
        finally:
            ending.close()

    def _end_at_once(self) -> int:
        """Has the supervisor end the VM if it still runs: the lifeline says that vmmctl is gone."""
        self.line.shutdown(socket.SHUT_WR)
        return self._await_end()


class Reporter(Foreground):
    """`up --report`: the supervisor's messages as JSON lines on standard output, for whoever stands for this VM outside
    the box. SIGUSR1 ends the VM at once."""

    def run(self) -> int:
        """As Foreground's."""
        # The lifeline's end is what tells the supervisor; its answer is awaited as ever.
        signal.signal(signal.SIGUSR1, lambda *_: self.line.shutdown(socket.SHUT_WR))
        try:
            return super().run()
        except UserError as e:
            if not self.told:
                self._tell({"event": "failed", "message": str(e), "status": e.status})
            raise

    told = False

    def _tell(self, message: dict[str, Any]) -> None:
        self.told |= message["event"] in {"failed", "ended"}
        print(json.dumps(message), flush=True)

    def _receive(self, timeout: float | None = None) -> dict[str, Any] | None:
        try:
            message = super()._receive(timeout)
        except UserError as e:
            self._tell({"event": "failed", "message": str(e), "status": e.status})
            raise
        if message is not None:
            self._tell(message)
        return message

    def _stay(self, console: str | None) -> int:
        while True:
            message = self._receive()
            if message is not None and message["event"] == "ended":
                self._wait_gone()
                return self._tell_end(message)

    def _tell_end(self, message: dict[str, Any]) -> int:
        status: int = message["status"]
        return status
