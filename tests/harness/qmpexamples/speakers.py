"""The two kinds of client: one that sees every byte, and QEMU's own library."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections import deque
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from qemu.qmp import EventListener, ExecuteError, QMPClient
from qemu.qmp.message import Message

from harness.vm import DEADLINE

T = TypeVar("T")


class Refused(Exception):
    """An error answer."""

    def __init__(self, error_class: str, desc: str) -> None:
        super().__init__(f"{error_class}: {desc}")
        self.error_class, self.desc = error_class, desc


class Speaker(Protocol):
    """A client. ``ask`` raises Refused."""

    events: deque[dict[str, Any]]
    """Those that have come; after ``ask``, those before its answer (and for the library, perhaps some after it)."""
    exact: bool
    """Whether ``events`` are known to be just those before the answer."""

    def ask(self, command: str, arguments: Mapping[str, object], fd: int | None) -> Any: ...

    def event(self) -> dict[str, Any]:
        """The next event, waited for."""

    def close(self) -> None: ...


class Raw:
    """Bytes on a socket, as StratoVirt's users send them: no qmp_capabilities, an id with everything."""

    exact = True

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(DEADLINE)
        self._sock.connect(str(path))
        self._lines = self._sock.makefile("rb")
        self.events: deque[dict[str, Any]] = deque()
        self._id = 0
        assert self._read().keys() == {"QMP"}

    def _read(self) -> dict[str, Any]:
        line = self._lines.readline()
        assert line.endswith(b"\r\n"), line
        message = json.loads(line)
        assert isinstance(message, dict)
        return message

    def ask(self, command: str, arguments: Mapping[str, object], fd: int | None) -> Any:
        self._id += 1
        request = {"execute": command, "arguments": arguments, "id": self._id}
        if not arguments:
            del request["arguments"]
        socket.send_fds(self._sock, [json.dumps(request).encode()], [] if fd is None else [fd])
        while "event" in (answer := self._read()):
            self.events.append(self._checked(answer))
        assert answer.pop("id") == self._id
        if answer.keys() == {"error"}:
            assert answer["error"].keys() == {"class", "desc"}
            raise Refused(answer["error"]["class"], answer["error"]["desc"])
        assert answer.keys() == {"return"}
        return answer["return"]

    def event(self) -> dict[str, Any]:
        return self.events.popleft() if self.events else self._checked(self._read())

    @staticmethod
    def _checked(event: dict[str, Any]) -> dict[str, Any]:
        assert {"event", "timestamp"} <= event.keys() <= {"event", "timestamp", "data"}, event
        assert event["timestamp"].keys() == {"seconds", "microseconds"}
        assert 0 <= event["timestamp"]["microseconds"] < 1_000_000
        return event

    def close(self) -> None:
        self._lines.close()
        self._sock.close()


class Library:
    """QEMU's own client."""

    exact = False

    def __init__(self, path: Path) -> None:
        self._loop = asyncio.new_event_loop()
        self._client = QMPClient("examples")
        self._listener = EventListener()
        self._client.register_listener(self._listener)
        self.events: deque[dict[str, Any]] = deque()
        self._run(self._client.connect(str(path)))

    def _run(self, what: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(asyncio.wait_for(what, DEADLINE))

    def ask(self, command: str, arguments: Mapping[str, object], fd: int | None) -> Any:
        if fd is not None:
            # Beside the request's first byte, as the library says; it has no name for both in one.
            self._run(self._send_fd(fd))
        try:
            return self._run(self._client.execute(command, dict(arguments) or None))
        except ExecuteError as e:
            raise Refused(e.error_class, str(e)) from None
        finally:
            self.events.extend(self._plain(m) for m in self._listener.clear())

    async def _send_fd(self, fd: int) -> None:
        self._client.send_fd_scm(fd)

    def event(self) -> dict[str, Any]:
        if self.events:
            return self.events.popleft()
        return self._plain(self._run(self._listener.get()))

    @staticmethod
    def _plain(message: Message) -> dict[str, Any]:
        return dict(message)

    def close(self) -> None:
        with contextlib.suppress(EOFError, ConnectionError):  # the VM may be gone
            self._run(self._client.disconnect())
        self._loop.close()


SPEAKERS: Mapping[str, type[Raw] | type[Library]] = {"raw": Raw, "qemu.qmp": Library}


@contextlib.contextmanager
def opened(path: Path | None) -> Any:
    """A descriptor of ``path``, made when missing; None for None."""
    if path is None:
        yield None
        return
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)
