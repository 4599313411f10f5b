"""The core's talk with its supervisor: Life messages, with descriptors beside some."""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar, cast

from motorcade.core.task import Future
from motorcade.proto import boot as bootlink
from motorcade.proto import messages

Received: TypeAlias = tuple[messages.Life, list[int]]
L = TypeVar("L")


class LifeLink:
    """The core's end. Owns neither the socket nor, once handed over, the descriptors."""

    def __init__(self, sock: socket.socket, on_message: Callable[[messages.Life], None]) -> None:
        """``on_message`` gets what nobody asked for. Call ``process`` when ``fileno()`` is readable."""
        self._sock = sock
        self._on_message = on_message
        self._expected: dict[type, Future[Received]] = {}
        self._received: deque[Received] = deque()
        self._closed = False

    def fileno(self) -> int:
        """The socket's."""
        return self._sock.fileno()

    def send(self, life: messages.Life, fds: Sequence[int] = ()) -> None:
        """Says something. That nobody hears it any more, ``process`` finds out."""
        bootlink.send_life(self._sock, life, fds)

    def ask(self, question: messages.Life, answer: type[L], fds: Sequence[int] = ()) -> Future[tuple[L, list[int]]]:
        """Says ``question``, with ``fds``; the next message of type ``answer`` is its answer, with descriptors that
        become the caller's. One question of a kind at a time. The supervisor answers each."""
        future: Future[Received] = Future()
        if self._closed:
            future.fail(ConnectionError("the VM is over"))
        else:
            self._expected[answer] = future
            self.send(question, fds)
        return cast(Future[tuple[L, list[int]]], future)

    def process(self) -> bool:
        """Takes what has arrived; False when the supervisor is gone. Malformed: end the process."""
        received, alive = bootlink.drain_life_fds(self._sock)
        # A message may have us wait for something in a nested loop, which comes here and goes on where we are.
        self._received.extend(received)
        while self._received:
            life, fds = self._received.popleft()
            expected = self._expected.pop(type(life), None)
            if expected is not None:
                expected.set((life, fds))
                continue
            for fd in fds:
                os.close(fd)
            self._on_message(life)
        return alive

    def close(self) -> None:
        """Answers are not waited for any more: who does gets a ConnectionError."""
        self._closed = True
        expected, self._expected = self._expected, {}
        for future in expected.values():
            future.fail(ConnectionError("the VM is over"))
