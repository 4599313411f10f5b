"""One QMP connection: bytes in, commands run in order, answers and events out, and never a wait."""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import selectors
import socket
from collections.abc import Callable

import msgspec

from motorcade.core.qmp.descriptors import Received
from motorcade.core.qmp.errors import QmpError
from motorcade.core.qmp.parser import Bad, Splitter
from motorcade.core.qmp.registry import Context, Deferred, Then

log = logging.getLogger(__name__)

READ = 16 << 10
"""Bytes read at a time, so that one client's flood leaves the loop its other work."""
PAUSE_READING = 256 << 10
"""Bytes of unread answers after which a client's next commands wait."""
MAX_OUTPUT = 4 << 20
"""Bytes of unread answers and events after which a client is dropped."""
MAX_HELD = 256
"""Events kept for a client that has not said anything yet."""

_MEMBERS = msgspec.json.Decoder(dict[str, msgspec.Raw])


def _members(item: bytes | Bad) -> dict[str, msgspec.Raw]:
    """The members of a request as they were written. Raises QmpError."""
    if isinstance(item, Bad):
        raise QmpError(item.reason)
    if not item.startswith(b"{"):
        raise QmpError("QMP input must be a JSON object")
    try:
        # Decoded whole first: that tells whether it is JSON all through, which keeping members as written does not.
        msgspec.json.decode(item)
        # No decoder of msgspec's minds a key that comes twice.
        json.loads(item, object_pairs_hook=_unique, parse_int=str, parse_float=str)
        return _MEMBERS.decode(item)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise QmpError(f"JSON parse error, {e}") from None


def _unique(pairs: list[tuple[str, object]]) -> None:
    """An object's members, which are not kept. Raises QmpError."""
    seen = set()
    for name, _ in pairs:
        if name in seen:
            raise QmpError(f"JSON parse error, duplicate key '{name}'")
        seen.add(name)


def _echo(raw: msgspec.Raw) -> object:
    """An id as it goes back: a number to the digit as it came, anything else on one line."""
    value = msgspec.json.decode(raw)
    return raw if isinstance(value, int | float) and not isinstance(value, bool) else value


def _request(members: dict[str, msgspec.Raw]) -> tuple[str, msgspec.Raw | None]:
    """The command's name and its arguments. Raises QmpError."""
    if "execute" not in members:
        raise QmpError("QMP input lacks member 'execute'")
    name = msgspec.json.decode(members.pop("execute"))
    if not isinstance(name, str):
        raise QmpError("QMP input member 'execute' must be a string")
    arguments = members.pop("arguments", None)
    if members:
        raise QmpError(f"QMP input member '{next(iter(members))}' is unexpected")
    return name, arguments


class Client:
    """A connection. Owns its socket. ``closed`` is called once, when it ends."""

    def __init__(
        self,
        sock: socket.socket,
        selector: selectors.BaseSelector,
        context: Context,
        greeting: bytes,
        closed: Callable[[Client], None],
    ) -> None:
        self._sock = sock
        self._selector = selector
        self._received = Received()
        self._context = dataclasses.replace(context, received=self._received)
        self._closed = closed
        self._mask = 0  # what the selector watches for us
        self._splitter = Splitter()
        self._input: collections.deque[bytes | Bad] = collections.deque()
        self._busy = False  # a command's answer is outstanding, or is being made
        self._running = False
        self._eof = False
        self._output = bytearray()
        self._held: collections.deque[bytes] | None = collections.deque(maxlen=MAX_HELD)
        self.open = True
        sock.setblocking(False)
        self._write(greeting)

    @property
    def holds(self) -> bool:
        """Whether events wait here for the client's first words."""
        return bool(self._held)

    def send_event(self, line: bytes) -> None:
        """Queues an event.

        Until the client has spoken, events are held: QEMU's clients take whatever follows the greeting for the
        answer to their qmp_capabilities.
        """
        if self._held is not None:
            self._held.append(line)
        else:
            self._write(line)

    def release(self) -> None:
        """Sends the held events, and later ones at once."""
        held, self._held = self._held, None
        for line in held or ():
            self._write(line)

    def close(self) -> None:
        """Ends the connection; what was not sent is lost."""
        if not self.open:
            return
        self.open = False
        self._watch(0)
        self._sock.close()
        self._received.close()
        self._closed(self)

    def fileno(self) -> int:
        """The socket's, which stays ours."""
        return self._sock.fileno()

    @property
    def unsent(self) -> int:
        """Bytes that the client has yet to take."""
        return len(self._output)

    def _ready(self, mask: int) -> None:
        if not self.open:  # closed by what another descriptor of the same round brought
            return
        if mask & selectors.EVENT_WRITE:
            self.flush()
        if self.open and mask & selectors.EVENT_READ:
            self._read()
        self._run()

    def _read(self) -> None:
        try:
            data = self._received.read(self._sock, READ)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as e:
            log.info("QMP client lost: %s", e.strerror)
            self.close()
            return
        if data:
            self._input.extend(self._splitter.feed(data))
        else:
            self._eof = True

    def _run(self) -> None:
        """Runs what has arrived, until a command has to wait or the client has to read first."""
        if self._running:  # a Deferred that was finished at once: the loop below us goes on
            return
        self._running = True
        ran = False
        try:
            while self.open and self._input and not self._busy and len(self._output) < PAUSE_READING:
                self._execute(self._input.popleft())
                ran = True
        finally:
            self._running = False
        if ran and not self._input and not self._splitter.pending:
            # No request that they came with is left. What came beside white space alone, as qemu.qmp sends it, waits.
            self._received.close()
        if self.open and self._eof and not self._input and not self._busy and not self._output:
            self.close()
        self._update()

    def _execute(self, item: bytes | Bad) -> None:
        request_id: msgspec.Raw | None = None
        self._busy = True
        try:
            members = _members(item)
            request_id = members.pop("id", None)
            name, raw_arguments = _request(members)
            if name != "qmp_capabilities":
                self.release()  # a client that does not negotiate: its events precede the answer from now on
            outcome = self._context.registry.find(name).call(self._context, raw_arguments)
        except QmpError as e:
            self._answer(request_id, e)
            return
        except Exception as e:
            log.exception("a QMP command failed in a way that it should not")
            self._answer(request_id, QmpError(f"internal error: {type(e).__name__}: {e}"))
            return
        if isinstance(outcome, Deferred):
            outcome.on_done(lambda result: self._answer_later(request_id, result))
        elif isinstance(outcome, Then):
            self._answer(request_id, outcome.value)
            outcome.action()
        else:
            self._answer(request_id, outcome)

    def _answer_later(self, request_id: msgspec.Raw | None, outcome: object) -> None:
        if not self.open:
            return
        self._answer(request_id, outcome)
        self._run()

    def _answer(self, request_id: msgspec.Raw | None, outcome: object) -> None:
        answer: dict[str, object]
        if isinstance(outcome, QmpError):
            answer = {"error": {"class": outcome.error_class, "desc": outcome.desc}}
        else:
            answer = {"return": outcome}
        if request_id is not None:
            answer["id"] = _echo(request_id)
        self._busy = False
        self._write(msgspec.json.encode(answer) + b"\r\n")
        if self._held is not None:
            self.release()

    def _write(self, line: bytes) -> None:
        if not self.open:
            return
        self._output += line
        self.flush()
        if self.open and len(self._output) > MAX_OUTPUT:
            log.warning("QMP client dropped: it left %d bytes unread", len(self._output))
            self.close()

    def flush(self) -> None:
        """Sends what the client takes now."""
        if self._output:
            try:
                sent = self._sock.send(self._output, socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError as e:
                log.info("QMP client lost: %s", e.strerror)
                self.close()
                return
            del self._output[:sent]
        self._update()

    def _update(self) -> None:
        """Watches for what can be used now."""
        if not self.open:
            return
        mask = selectors.EVENT_WRITE if self._output else 0
        if not self._eof and not self._busy and not self._input and len(self._output) < PAUSE_READING:
            mask |= selectors.EVENT_READ
        self._watch(mask)

    def _watch(self, mask: int) -> None:
        if mask == self._mask:
            return
        if not mask:
            self._selector.unregister(self._sock)
        elif not self._mask:
            self._selector.register(self._sock, mask, self._ready)
        else:
            self._selector.modify(self._sock, mask, self._ready)
        self._mask = mask
