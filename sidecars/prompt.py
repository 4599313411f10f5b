"""A Python prompt inside a sidecar that machine.yaml says may be debugged (``debug: true``), on a unix socket.

It is served by the main thread, between the other events of its loop: what is typed may call the device's methods as
the runtime does, and nothing else happens meanwhile; the data thread goes on. Whoever can connect can do all that the
sidecar can: the socket is the user's own, in the run directory, and only there where it was asked for.
"""

from __future__ import annotations

import code
import contextlib
import io
import logging
import selectors
import signal
import socket
import sys
import traceback
from typing import TYPE_CHECKING, Any

from motorcade.sidecars.sandbox.calls import allow

if TYPE_CHECKING:
    from types import FrameType

    from motorcade.sidecars.sidecar import Sidecar

log = logging.getLogger("motorcade.sidecar")

SYSTEM_CALLS = allow("whoever comes to its prompt", "accept4", "accept")

_LINE_MAX = 64 << 10
_SEND_SECONDS = 2.0  # for a client to take what it asked for; a debugged device may wait so long
_BANNER = """\
Python {version} in the sidecar of {name}. device: the {kind}; sidecar: what runs it; ffi, lib: its C part.
Its main thread is yours while a command runs; Ctrl-C interrupts one, Ctrl-D leaves.
"""


class _Console(code.InteractiveConsole):
    """Shows errors to whoever is at the prompt: the process's own hooks have them in the log (sandbox.stay_inside)."""

    def showtraceback(self) -> None:
        _, value, where = sys.exc_info()
        assert value is not None
        # Without the frame of runcode().
        lines = traceback.format_exception(type(value), value, where.tb_next if where is not None else None)
        self.write("".join(lines))

    def showsyntaxerror(self, filename: str | None = None) -> None:
        _, value, _ = sys.exc_info()
        assert value is not None
        self.write("".join(traceback.format_exception_only(type(value), value)))


class Prompt:
    """One client at a time. Everything on the main thread."""

    def __init__(self, listener: int, sidecar: Sidecar, selector: selectors.BaseSelector) -> None:
        """``listener``: a listening unix socket, taken over."""
        self._listener = socket.socket(fileno=listener)
        self._listener.setblocking(False)
        self._sidecar, self._selector = sidecar, selector
        self._client: socket.socket | None = None
        self._console: _Console | None = None
        self._received = b""
        self._running = False
        selector.register(self._listener, selectors.EVENT_READ, self._accept)
        signal.signal(signal.SIGINT, self._interrupt)
        log.warning("debug: whoever may connect to its prompt can do all that this sidecar can")

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        """Ctrl-C of vmmctl sidecar debug; at any other time it is the terminal's, and vmmctl's business."""
        if self._running:
            raise KeyboardInterrupt

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError as e:
            log.warning("debug: %s", e)
            return
        if self._client is not None:
            with contextlib.suppress(OSError):
                client.sendall(b"somebody is at this prompt already\n")
            client.close()
            return
        client.settimeout(_SEND_SECONDS)
        self._client, self._received = client, b""
        device = self._sidecar.device
        names: dict[str, Any] = {"__name__": "__debug__", "device": device, "sidecar": self._sidecar}
        names |= {"ffi": device.ffi, "lib": device.lib}
        self._console = _Console(names, "<debug>")
        self._selector.register(client, selectors.EVENT_READ, self._readable)
        log.warning("debug: somebody is at the prompt")
        version = sys.version.partition(" ")[0]
        name = getattr(device.boot.role, "device_id", "?")
        self.say(_BANNER.format(version=version, name=name, kind=type(device).__name__) + ">>> ")

    def _readable(self) -> None:
        assert self._client is not None
        try:
            data = self._client.recv(_LINE_MAX)
        except OSError:
            data = b""
        if not data:
            self._leave()
            return
        self._received += data
        if len(self._received) > _LINE_MAX and b"\n" not in self._received:
            self.say("a line is too long\n")
            self._leave()
        while self._client is not None and b"\n" in self._received:
            line, _, self._received = self._received.partition(b"\n")
            self._run(line.decode(errors="replace").rstrip("\r"))

    def _run(self, line: str) -> None:
        assert self._console is not None
        said = io.StringIO()
        more = False
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                self._running = True
                try:
                    more = self._console.push(line)
                finally:
                    self._running = False
            except KeyboardInterrupt:
                self._console.resetbuffer()
                said.write("\nKeyboardInterrupt\n")
            except SystemExit:
                self._leave()
                return
        self.say(said.getvalue() + ("... " if more else ">>> "))

    def say(self, text: str) -> None:
        """To whoever is at the prompt, at once; also for what runs there."""
        if self._client is None:
            return
        try:
            self._client.sendall(text.encode(errors="replace"))
        except OSError:
            self._leave()

    def _leave(self) -> None:
        if self._client is not None:
            self._selector.unregister(self._client)
            self._client.close()
            self._client = self._console = None
            log.warning("debug: the prompt was left")
