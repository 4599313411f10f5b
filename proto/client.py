"""A sidecar's end of the control plane; see framing.py for how the two meet."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import zmq

from motorcade.proto import schema
from motorcade.proto.schema import Answer, Error, Hello, Malformed, Message, Notice, Request, Welcome
from motorcade.proto.wire import HWM, Refusals, Wait, endpoint, readable, receive

_HELLO_ID = 1
_LOST = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL


class Refused(ConnectionError):
    """The core did not let this sidecar in."""


class ControlClient:
    """A sidecar's end. One thread only. Starts ZeroMQ's I/O thread: fork, and drop privileges, before it."""

    def __init__(self) -> None:
        """Knows nobody yet."""
        self.device_id = ""
        self.refusals = Refusals()
        self.connected = True  # until the connection is known to be lost
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._dealer = self._context.socket(zmq.DEALER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.MAXMSGSIZE, schema.MAX_CONTROL_BYTES),
            (zmq.RCVHWM, HWM),
            (zmq.SNDHWM, HWM),
            # The socket listens before there is any sidecar; should it not, look again soon and then less often. (Where
            # the core is gone that goes on to the end, and the sandbox refuses it the socket.)
            (zmq.RECONNECT_IVL, 2),
            (zmq.RECONNECT_IVL_MAX, 500),
        ):
            self._dealer.setsockopt(option, value)
        self._monitor = self._dealer.get_monitor_socket(_LOST | zmq.EVENT_CONNECTED)
        self._wait = Wait(self._dealer, self._monitor)

    def connect(self, path: str, device_id: str) -> None:
        """Connects to the core's socket at ``path``, once, in the background. ValueError where the path is too long."""
        self.device_id = device_id
        self._dealer.connect(endpoint(path))
        self._wait.wake()

    def wait_connected(self, timeout: float) -> None:
        """Waits until the core's socket has taken the connection, after which no file is needed any more. TimeoutError,
        also where there is none."""
        due = time.monotonic() + timeout
        while not self._look():
            self._wait.clear()
            left = due - time.monotonic()
            if left <= 0 or not self.connected:
                raise TimeoutError("there is no core to connect to")
            self._wait.poll(left)
        self._wait.wake()

    def hello(self, hello: Hello, timeout: float) -> Welcome:
        """Introduces this sidecar and waits up to ``timeout`` seconds for the core's answer.

        Raises Refused (with the core's words), TimeoutError, or ConnectionError where the core is gone. Requests that
        arrive together with the answer are handed to the first process().
        """
        due = time.monotonic() + timeout
        self._send(Message(_HELLO_ID, max(1, int(timeout * 1000)), hello))
        while True:
            self._wait.clear()
            while (message := self._next()) is not None:
                if isinstance(message.body, Welcome):
                    self._wait.wake()
                    return message.body
                if isinstance(message.body, Error):
                    raise Refused(f"{message.body.code.value}: {message.body.text}")
                self.refusals.note(self.device_id, "a request before the welcome", type(message.body).__name__)
            if not self.connected:
                raise Refused("the core ended the connection: this process is not the one that it expects")
            left = due - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"the core did not answer the hello within {timeout:g} s")
            self._wait.poll(left)

    def answer(self, request_id: int, body: Answer) -> None:
        """Answers the core's request ``request_id``. ConnectionError where the core does not read or is gone."""
        self._send(Message(request_id, 0, body))

    def notify(self, notice: Notice) -> None:
        """Tells the core. ConnectionError where the core does not read or is gone."""
        self._send(Message(0, 0, notice))

    def fileno(self) -> int:
        """Readable when process() has something to do. Owned by this object."""
        return self._wait.fileno()

    def process(self, handler: Callable[[Message], None]) -> bool:
        """Hands each request that has arrived to ``handler``, without waiting. False: the core is gone."""
        self._wait.clear()
        while (message := self._next()) is not None:
            if isinstance(message.body, Request) and not isinstance(message.body, Hello) and message.id != 0:
                handler(message)
            else:
                self.refusals.note(self.device_id, "a message that the core does not send now", message.id)
        return self.connected

    def close(self, linger: float = 0.0) -> None:
        """Closes the sockets and ends the I/O thread, after at most ``linger`` seconds for what was sent to go out."""
        self._wait.close()
        self._dealer.disable_monitor()
        self._context.destroy(linger=int(linger * 1000))

    def _send(self, message: Message) -> None:
        try:
            self._dealer.send(schema.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            raise ConnectionError("the core does not read its control messages") from None
        # Sending runs the socket's internal commands, which may have been the news of a message.
        if readable(self._dealer):
            self._wait.wake()

    def _look(self) -> bool:
        """Takes note of what became of the connection. Whether it was just made."""
        made = False
        while readable(self._monitor):
            # A number of 16 bits, another, an address. (zmq.utils.monitor would import asyncio.)
            event = int.from_bytes(self._monitor.recv_multipart(zmq.NOBLOCK)[0][:2], sys.byteorder)
            made |= event == zmq.EVENT_CONNECTED
            self.connected &= not event & _LOST
        return made

    def _next(self) -> Message | None:
        """The next message that can be read; None when there is none now."""
        self._look()
        while True:
            parts = receive(self._dealer, 1)
            if parts is None:
                return None
            if not parts:
                self.refusals.note(self.device_id, "a message that is not one frame")
                continue
            try:
                return schema.decode(parts[0].bytes)
            except Malformed as e:
                self.refusals.note(self.device_id, "a malformed message", str(e))
