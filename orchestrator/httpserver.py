"""GET /metrics over HTTP/1.1, for one scraper after the other, in the supervisor's one thread.

No client can hold the supervisor up: a request is short and comes within five seconds, an answer is taken within five
more, there are 16 connections at most, and each gets one answer. The text is made once a second at most, however many
ask.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

log = logging.getLogger("motorcade.supervisor")

MAX_CLIENTS = 16
REQUEST_MAX = 8192
SECONDS = 5.0
_FRESH = 1.0  # seconds for which a text may be given again


@dataclass
class _Client:
    sock: socket.socket
    deadline: float
    received: bytes = b""
    unsent: bytes = b""


class HttpServer:
    """Owns its sockets until ``close``. Nothing that a client does raises out of a method."""

    def __init__(self, selector: selectors.BaseSelector, text: Callable[[], str], content_type: str) -> None:
        """``text()``: the metrics now."""
        self._selector, self._text, self._type = selector, text, content_type
        self._listeners: list[socket.socket] = []
        self._clients: list[_Client] = []
        self._cached = (-_FRESH, b"")

    def add(self, listener: socket.socket) -> None:
        """Serves this listening socket too, non-blocking, from now on ours."""
        self._listeners.append(listener)
        self._selector.register(listener, selectors.EVENT_READ, lambda: self._accept(listener))

    @property
    def due(self) -> float | None:
        """When ``work`` has something to do, in time.monotonic() seconds."""
        return min((c.deadline for c in self._clients), default=None)

    def work(self) -> None:
        """Hangs up on those that were too slow."""
        now = time.monotonic()
        for client in [c for c in self._clients if c.deadline <= now]:
            self._drop(client)

    def close(self) -> None:
        """Lets go of everything."""
        for client in list(self._clients):
            self._drop(client)
        for listener in self._listeners:
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(listener)
            listener.close()
        self._listeners.clear()

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError as e:
            log.debug("metrics: %s", e)
            return
        sock.setblocking(False)
        if len(self._clients) >= MAX_CLIENTS:
            self._drop(min(self._clients, key=lambda c: c.deadline))  # the one that has taken longest
        client = _Client(sock, time.monotonic() + SECONDS)
        self._clients.append(client)
        self._selector.register(sock, selectors.EVENT_READ, lambda: self._ready(client))

    def _drop(self, client: _Client) -> None:
        if client in self._clients:
            self._clients.remove(client)
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(client.sock)
            client.sock.close()

    def _ready(self, client: _Client) -> None:
        if client not in self._clients:
            return  # an event of a round in which it was dropped
        try:
            if client.unsent:
                self._send(client)
            else:
                self._receive(client)
        except BlockingIOError:
            pass
        except OSError as e:
            log.debug("a client of the metrics: %s", e)
            self._drop(client)
        except Exception:
            log.exception("a client of the metrics")
            self._drop(client)

    def _receive(self, client: _Client) -> None:
        data = client.sock.recv(REQUEST_MAX)
        if not data:
            self._drop(client)
            return
        client.received += data
        if b"\r\n\r\n" not in client.received and b"\n\n" not in client.received:
            if len(client.received) > REQUEST_MAX:
                self._answer(client, "431 Request Header Fields Too Large", b"a request is short\n")
            return
        words = client.received.split(b"\n", 1)[0].split()
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            self._answer(client, "400 Bad Request", b"not HTTP/1.1\n")
        elif words[0] not in (b"GET", b"HEAD"):
            self._answer(client, "405 Method Not Allowed", b"GET /metrics\n")
        elif words[1].partition(b"?")[0] != b"/metrics":
            self._answer(client, "404 Not Found", b"there is /metrics\n")
        else:
            self._answer(client, "200 OK", self._body(), head=words[0] == b"HEAD")

    def _body(self) -> bytes:
        made, body = self._cached
        now = time.monotonic()
        if now - made >= _FRESH:
            body = self._text().encode()
            self._cached = (now, body)
        return body

    def _answer(self, client: _Client, status: str, body: bytes, *, head: bool = False) -> None:
        kind = self._type if status.startswith("200") else "text/plain"
        lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body)}", "Connection: close"]
        client.unsent = "\r\n".join([*lines, "", ""]).encode() + (b"" if head else body)
        client.deadline = time.monotonic() + SECONDS
        # Not for reading: what it says from now on is nobody's business.
        self._selector.modify(client.sock, selectors.EVENT_WRITE, lambda: self._ready(client))
        self._send(client)

    def _send(self, client: _Client) -> None:
        client.unsent = client.unsent[client.sock.send(client.unsent) :]
        if not client.unsent:
            with contextlib.suppress(OSError):
                client.sock.shutdown(socket.SHUT_WR)
            self._drop(client)
