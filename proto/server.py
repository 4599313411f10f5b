"""The core's end of the control plane; framing.py says how the two ends meet and why so."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import zmq

from motorcade.proto import schema, versions
from motorcade.proto.schema import Answer, Error, ErrorCode, Hello, Malformed, Message, Notice, Request
from motorcade.proto.wire import HWM, Refusals, Wait, endpoint, readable, receive

BATCH = 64  # messages per process() call, so that a chatty peer does not keep the loop's other work waiting

_ANSWERS: dict[type[Request], type[Answer]] = {
    schema.StatsRequest: schema.StatsReport,
    schema.Save: schema.Saved,
    schema.Command: schema.CommandResult,
}
"""What is answered to a request by something else than Ok."""


@dataclass(frozen=True, slots=True)
class Timeout:
    """Instead of an answer: none came before the deadline, or none can come since the peer has no connection.

    Its process may still run and use guest memory."""

    deadline_ms: int
    unconnected: bool = False


@dataclass(frozen=True, slots=True)
class Gone:
    """Instead of an answer: the sidecar was forgotten, which is to say that its process has ended."""


Outcome: TypeAlias = Answer | Timeout | Gone
OnAnswer: TypeAlias = Callable[[Outcome], None]


@dataclass(slots=True)
class _Pending:
    due: float
    deadline_ms: int
    wanted: type[Answer]  # the answer that fits, besides Error
    on_answer: OnAnswer


@dataclass(slots=True)
class _Peer:
    device_id: str
    pid: int
    uid: int
    token: str = ""
    route: bytes | None = None  # set by an accepted hello
    hello_id: int = 0  # of the hello still to be answered
    pending: dict[int, _Pending] = field(default_factory=dict)


class ControlServer:
    """The core's end. One thread only. Nothing that a peer sends makes a method raise."""

    def __init__(self, handler: Callable[[str, Message], None] | None = None) -> None:
        """``handler(device_id, message)`` gets each accepted Hello, to be answered by answer(), and each notice.

        It may be set later, before the first process(); what it raises comes out of process().
        """
        self.handler = handler
        self.tap: Callable[[bool, str, Message], None] | None = None
        """Is told of every message that passes: whether it goes to the sidecar, whose it is."""
        self.refusals = Refusals()
        self._peers: dict[str, _Peer] = {}
        self._by_token: dict[str, _Peer] = {}
        self._serial = 0
        self._last_id = 0
        self._deferred: list[tuple[OnAnswer, Outcome]] = []
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._zap = self._context.socket(zmq.REP)
        self._zap.bind("inproc://zeromq.zap.01")  # before the ROUTER: RFC 27 wants the handler to be there first
        self._router = self._context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.MAXMSGSIZE, schema.MAX_CONTROL_BYTES),
            (zmq.ROUTER_MANDATORY, 1),
            (zmq.RCVHWM, HWM),
            (zmq.SNDHWM, HWM),
        ):
            self._router.setsockopt(option, value)
        self._router.setsockopt(zmq.ZAP_DOMAIN, b"motorcade")
        self._wait = Wait(self._router, self._zap)
        self._path = ""

    def bind(self, path: str, fd: int = -1) -> None:
        """Listens at ``path`` with mode 0600. Changes the umask for a moment: do it before starting threads.

        ``fd``: a socket that listens there already, taken over; its file stays the caller's to remove, and was its to
        protect.

        PermissionError where others may enter the directory; ValueError where the path is too long;
        zmq.ZMQError where the kernel refuses.
        """
        address = endpoint(path)
        if fd >= 0:
            self._router.setsockopt(zmq.USE_FD, fd)
            self._router.bind(address)
            return
        parent = Path(path).parent
        if stat.S_IMODE(parent.stat().st_mode) & 0o077:
            raise PermissionError(
                f"{parent} can be entered by others; the control socket needs a directory of mode 0700"
            )
        old = os.umask(0o177)
        try:
            self._router.bind(address)
        finally:
            os.umask(old)
        self._path = path

    def expect(self, device_id: str, pid: int, uid: int | None = None) -> None:
        """Lets process ``pid`` (of ``uid``, by default ours) connect once, as ``device_id``.

        Replaces what was expected of the device before; see forget().
        """
        self.forget(device_id)
        self._peers[device_id] = _Peer(device_id, pid, os.geteuid() if uid is None else uid)

    def forget(self, device_id: str) -> None:
        """The process of ``device_id`` has ended: its messages count no more, its open requests get Gone."""
        peer = self._peers.pop(device_id, None)
        if peer is None:
            return
        self._by_token.pop(peer.token, None)
        for pending in peer.pending.values():
            self._defer(pending.on_answer, Gone())
        peer.pending.clear()

    def connected(self, device_id: str) -> bool:
        """Whether the device's hello was accepted."""
        peer = self._peers.get(device_id)
        return peer is not None and peer.route is not None

    def request(self, device_id: str, body: Request, deadline_ms: int, on_answer: OnAnswer) -> None:
        """Asks ``device_id``; ``on_answer`` is called exactly once, later, from process() or expire().

        Gone where the device is not expected; Timeout, and soon, where it has no connection.
        ValueError where ``body`` is out of bounds.
        """
        if deadline_ms <= 0:
            raise ValueError("a request needs a deadline")
        self._last_id += 1
        message = Message(self._last_id, deadline_ms, body)
        data = schema.encode(message)
        peer = self._peers.get(device_id)
        if peer is None:
            self._defer(on_answer, Gone())
            return
        if peer.route is None:
            self._defer(on_answer, Timeout(deadline_ms, unconnected=True))
            return
        try:
            self._send(peer.route, data)
        except zmq.Again:
            # Kept open: the peer may yet read, but it will not have seen this, and the deadline says so.
            self.refusals.note(device_id, "to read its messages: its queue is full, lost", type(body).__name__)
        except zmq.ZMQError as e:
            if e.errno != zmq.EHOSTUNREACH:
                raise
            self._defer(on_answer, Timeout(deadline_ms, unconnected=True))
            return
        if self.tap is not None:
            self.tap(True, device_id, message)
        due = time.monotonic() + deadline_ms / 1000
        peer.pending[self._last_id] = _Pending(due, deadline_ms, _ANSWERS.get(type(body), schema.Ok), on_answer)

    def answer(self, device_id: str, request_id: int, body: Answer) -> None:
        """Answers the Hello with ``request_id``; does nothing where that sidecar is gone meanwhile."""
        peer = self._peers.get(device_id)
        if peer is None or peer.route is None or peer.hello_id != request_id:
            return
        peer.hello_id = 0
        self._answer(peer, peer.route, request_id, body)

    def fileno(self) -> int:
        """Readable when process() has something to do. Owned by this object."""
        return self._wait.fileno()

    def process(self) -> None:
        """Handles what has arrived, without waiting."""
        self._wait.clear()
        for _ in range(BATCH):
            admitted = self._serve_zap()
            if not self._serve_message() and not admitted:
                break
        else:
            self._wait.wake()
        deferred, self._deferred = self._deferred, []
        for on_answer, outcome in deferred:
            on_answer(outcome)

    def next_deadline(self) -> float | None:
        """When expire() has something to do, in time.monotonic() seconds."""
        return min((p.due for peer in self._peers.values() for p in peer.pending.values()), default=None)

    def expire(self, now: float) -> None:
        """Ends the requests that were due by ``now`` with Timeout."""
        for peer in list(self._peers.values()):
            for request_id, pending in list(peer.pending.items()):
                if pending.due <= now and peer.pending.pop(request_id, None) is not None:
                    pending.on_answer(Timeout(pending.deadline_ms))

    def close(self) -> None:
        """Closes the socket and removes its file; open requests are dropped without an outcome."""
        self._wait.close()
        self._context.destroy(linger=0)
        if self._path:
            Path(self._path).unlink(missing_ok=True)

    def _defer(self, on_answer: OnAnswer, outcome: Outcome) -> None:
        self._deferred.append((on_answer, outcome))
        self._wait.wake()

    def _send(self, route: bytes, data: bytes) -> None:
        self._router.send_multipart([route, data], zmq.NOBLOCK)
        # Sending runs the socket's internal commands, which may have been the news of a message.
        if readable(self._router):
            self._wait.wake()

    def _answer(self, peer: _Peer, route: bytes, request_id: int, body: Answer) -> None:
        message = Message(request_id, 0, body)
        if self.tap is not None:
            self.tap(True, peer.device_id, message)
        try:
            self._send(route, schema.encode(message))
        except zmq.ZMQError as e:
            self.refusals.note(peer.device_id, f"to take an answer ({e.strerror}), lost", type(body).__name__)

    def _serve_zap(self) -> bool:
        """Decides about one new connection (RFC 27)."""
        try:
            request = self._zap.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return False
        address = request[3].decode(errors="replace")
        peer = self._admit(address)
        status = [b"200", b"OK", peer.token.encode()] if peer else [b"400", b"not expected", b""]
        self._zap.send_multipart([request[0], request[1], *status, b""])
        return True

    def _admit(self, address: str) -> _Peer | None:
        try:
            uid, _, pid = (int(part) for part in address.rsplit(":", 3)[1:])
        except ValueError:
            self.refusals.note("?", "a connection from", address)
            return None
        for peer in self._peers.values():
            if peer.pid != pid:
                continue
            if peer.uid != uid:
                self.refusals.note(peer.device_id, "a connection by another user", address)
                return None
            if peer.token:
                self.refusals.note(peer.device_id, "a second connection", address)
                return None
            self._serial += 1
            peer.token = str(self._serial)
            self._by_token[peer.token] = peer
            return peer
        self.refusals.note("?", "a connection by a process that is no sidecar", address)
        return None

    def _serve_message(self) -> bool:
        parts = receive(self._router, 2)
        if parts is None:
            return False
        if not parts:
            self.refusals.note("?", "a message that is not one frame")
            return True
        token = parts[1].get("User-Id")
        peer = self._by_token.get(token) if isinstance(token, str) else None
        if peer is None:
            self.refusals.note("?", "a message of a forgotten sidecar")
            return True
        try:
            message = schema.decode(parts[1].bytes)
        except Malformed as e:
            self.refusals.note(peer.device_id, "a malformed message", str(e))
            return True
        if self.tap is not None:
            self.tap(False, peer.device_id, message)
        if isinstance(message.body, Hello):
            self._serve_hello(peer, parts[0].bytes, message, message.body)
        elif peer.route is None:
            self.refusals.note(peer.device_id, "a message before its hello", type(message.body).__name__)
        elif isinstance(message.body, Answer):
            self._serve_answer(peer, message, message.body)
        elif isinstance(message.body, Notice) and message.id == 0:
            self._deliver(peer, message)
        else:
            self.refusals.note(peer.device_id, "a message that sidecars do not send", type(message.body).__name__)
        return True

    def _serve_hello(self, peer: _Peer, route: bytes, message: Message, hello: Hello) -> None:
        if message.id == 0 or peer.route is not None:
            self.refusals.note(peer.device_id, "a second hello" if message.id else "a hello without an id")
            return
        if (hello.device_id, hello.pid) != (peer.device_id, peer.pid):
            self.refusals.note(peer.device_id, "a hello with another name", (hello.device_id, hello.pid))
            self._answer(peer, route, message.id, Error(ErrorCode.INVALID, f"you are {peer.device_id}, {peer.pid}"))
            return
        try:
            versions.negotiate(hello.protocol_version)
        except versions.VersionMismatch as e:
            self.refusals.note(peer.device_id, "a hello", str(e))
            self._answer(peer, route, message.id, Error(ErrorCode.VERSION, str(e)))
            return
        peer.route = route
        peer.hello_id = message.id
        self._deliver(peer, message)

    def _serve_answer(self, peer: _Peer, message: Message, body: Answer) -> None:
        pending = peer.pending.get(message.id)
        if pending is None:
            late = 0 < message.id <= self._last_id
            self.refusals.note(
                peer.device_id, "a late or second answer" if late else "an answer to nothing", message.id
            )
            return
        if not isinstance(body, Error | pending.wanted):
            # The request stays open: a wrong answer must not spare the peer its deadline.
            self.refusals.note(peer.device_id, "an answer of the wrong kind", type(body).__name__)
            return
        del peer.pending[message.id]
        pending.on_answer(body)

    def _deliver(self, peer: _Peer, message: Message) -> None:
        if self.handler is None:
            raise RuntimeError("ControlServer.handler was never set")
        self.handler(peer.device_id, message)
