"""A small QMP client for vmmctl: one connection, blocking, with deadlines."""

from __future__ import annotations

import json
import os
import socket
import time
from collections import deque
from pathlib import Path
from typing import Any

from motorcade.orchestrator.errors import UserError

_MAX_MESSAGE = 64 << 20  # bytes; the core is another process, and may be broken


class QmpError(UserError):
    """The VM refused a command, or does not answer. ``error`` is QMP's error object, if it gave one."""

    def __init__(self, message: str, error: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.error = error


class QmpClient:
    """A connection to a QMP socket, past the greeting. Use as a context manager."""

    def __init__(self, path: str | os.PathLike[str], timeout: float = 10.0) -> None:
        """Connects; ``timeout`` (seconds) also holds for every answer. Errors: QmpError."""
        self.timeout = timeout
        self.events: deque[dict[str, Any]] = deque(maxlen=1000)
        self._buffer = b""
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._sock.settimeout(timeout)
            _connect(self._sock, os.fspath(path))
            greeting = self._receive(time.monotonic() + timeout)
            if "QMP" not in greeting:
                raise QmpError(f"{path} does not speak QMP")
            self.greeting = greeting
            self.execute("qmp_capabilities")
        except OSError as e:
            self._sock.close()
            raise QmpError(f"no answer on {path}: {e.strerror or e}") from None
        except BaseException:
            self._sock.close()
            raise

    def __enter__(self) -> QmpClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def fileno(self) -> int:
        """The socket, to wait for events with."""
        return self._sock.fileno()

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """What ``command`` returns. Events that come meanwhile are kept in ``events``. Errors: QmpError."""
        message: dict[str, Any] = {"execute": command}
        if arguments:
            message["arguments"] = arguments
        return self.send(message, command)

    def getfd(self, name: str, fd: int) -> None:
        """Gives the VM a copy of ``fd``, which its commands then know as fd:NAME. Errors: QmpError."""
        message = json.dumps({"execute": "getfd", "arguments": {"fdname": name}}).encode()
        try:
            socket.send_fds(self._sock, [message], [fd])
        except OSError as e:
            raise QmpError(f"getfd: {e.strerror or e}") from None
        self._answer("getfd")

    def send(self, message: dict[str, Any], name: str = "the command") -> Any:
        """Sends a whole QMP request and returns its answer."""
        try:
            self._sock.sendall(json.dumps(message).encode() + b"\r\n")
        except OSError as e:
            raise QmpError(f"{name}: {e.strerror or e}") from None
        return self._answer(name)

    def _answer(self, name: str) -> Any:
        try:
            end = time.monotonic() + self.timeout
            while True:
                answer = self._receive(end)
                if "event" in answer:
                    self.events.append(answer)
                elif "error" in answer:
                    raise QmpError(f"{name}: {answer['error'].get('desc', answer['error'])}", answer["error"])
                elif "return" in answer:
                    return answer["return"]
        except TimeoutError:
            raise QmpError(f"{name}: no answer within {self.timeout:g} s") from None
        except OSError as e:
            raise QmpError(f"{name}: {e.strerror or e}") from None

    def wait_event(self, timeout: float) -> dict[str, Any] | None:
        """The next event; None after ``timeout`` seconds. Errors: EOFError when the VM is gone."""
        if self.events:
            return self.events.popleft()
        try:
            return self._receive(time.monotonic() + timeout)
        except TimeoutError:
            return None
        except (QmpError, OSError):
            raise EOFError from None

    def _receive(self, end: float) -> dict[str, Any]:
        """The next message; what has arrived already is found even where ``end`` is past. Errors: TimeoutError."""
        while True:
            line, newline, rest = self._buffer.partition(b"\n")
            if newline:
                self._buffer = rest
                if not line.strip():
                    continue
                try:
                    message = json.loads(line)
                except ValueError:
                    message = None
                if not isinstance(message, dict):
                    raise QmpError("the VM answered with something that is not QMP")
                return message
            if len(self._buffer) > _MAX_MESSAGE:
                raise QmpError("the VM's answer is absurdly long")
            self._sock.settimeout(max(end - time.monotonic(), 0.0))
            try:
                data = self._sock.recv(65536)
            except BlockingIOError:  # a timeout of 0 is non-blocking mode
                raise TimeoutError from None
            if not data:
                raise QmpError("the VM closed the connection")
            self._buffer += data


def _connect(sock: socket.socket, path: str) -> None:
    """connect(2), whatever the length of the path: a long one goes through a descriptor of its folder."""
    if len(os.fsencode(path)) <= 107:
        sock.connect(path)
        return
    folder = os.open(Path(path).parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sock.connect(f"/proc/self/fd/{folder}/{Path(path).name}")
    finally:
        os.close(folder)
