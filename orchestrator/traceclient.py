"""vmmctl's end of ``watch.sock`` (watchserver.py): what was recorded, taken apart.

What comes from a sidecar's ring was written by a process that may be hostile: an event is numbers, which are shown as
they are, and a slot that holds none is counted.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from motorcade.orchestrator.errors import UserError
from motorcade.proto import tap, watch

_FRAME = struct.Struct("<IHHQ")
_HEADER, _EVENTS, _CONTROL, _LOST, _NOTE = range(5)
_CORE = 0xFFFF
_MAX_FRAME = 64 << 20


@dataclass(frozen=True, slots=True)
class Happened:
    """An event of a sidecar's queues."""

    device: str
    event: watch.Event


@dataclass(frozen=True, slots=True)
class Lost:
    """So many events of a device (or control messages, of "core") are missing here."""

    device: str
    count: int


@dataclass(frozen=True, slots=True)
class Note:
    """Something happened to a process; ``ns`` as everywhere."""

    device: str
    ns: int
    text: str


Item: TypeAlias = Happened | Lost | Note | tap.Said


def connect(path: Path) -> socket.socket:
    """A connection, the caller's. Errors: UserError."""
    from motorcade.orchestrator.qmpclient import _connect

    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(10.0)
    try:
        _connect(sock, str(path))
    except OSError as e:
        sock.close()
        raise UserError(f"{path}: {e.strerror or e}") from None
    return sock


def status(path: Path) -> dict[str, Any]:
    """What the supervisor knows of its processes and their queues. Errors: UserError."""
    with connect(path) as sock:
        data = b""
        try:
            sock.sendall(b'{"do":"status"}\n')
            while not data.endswith(b"\n") and (more := sock.recv(1 << 20)):
                data += more
            answer = json.loads(data)
        except OSError as e:
            raise UserError(f"{path}: {e.strerror or e}") from None
        except ValueError:
            raise UserError(f"{path}: no answer that makes sense") from None
    if not isinstance(answer, dict) or "error" in answer:
        raise UserError(f"{path}: {answer}")
    return answer


class Trace:
    """A trace from now on. Use as a context manager."""

    def __init__(
        self, path: Path, devices: Sequence[str], *, kinds: int = watch.ALL_KINDS, control: bool = True
    ) -> None:
        """Errors: UserError."""
        self.devices = list(devices)
        self.lost = 0  # events and messages that were overwritten before they were read, or are none
        self._joiner = tap.Joiner()
        self._buffer = bytearray()
        self._sock = connect(path)
        try:
            request = {"do": "trace", "devices": self.devices, "kinds": kinds, "control": control}
            self._sock.sendall(json.dumps(request).encode() + b"\n")
            what, _, _, data = self._frame(time.monotonic() + 10.0)
            header = json.loads(data)
            if what != _HEADER:
                raise UserError("the supervisor does not speak our language")
            self.start = int(header["start"])  # CLOCK_MONOTONIC in ns
        except TimeoutError:
            self._sock.close()
            raise UserError("the supervisor does not answer") from None
        except (OSError, ValueError, EOFError) as e:
            self._sock.close()
            raise UserError(f"{path}: {e}") from None
        except BaseException:
            self._sock.close()
            raise

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def read(self, until: float | None) -> Iterator[Item]:
        """Items of each device in order, until the moment ``until`` (time.monotonic(); None: for ever) or the VM's end,
        after which EOFError is raised."""
        while True:
            try:
                frame = self._frame(until)
            except TimeoutError:
                return
            yield from self._items(*frame)

    def _items(self, what: int, index: int, number: int, data: bytes) -> Iterator[Item]:
        device = "core" if index == _CORE else self.devices[index] if index < len(self.devices) else "?"
        if what == _EVENTS:
            found, torn = watch.events(number, data)
            if torn:
                yield self._missing(device, torn)
            for event in found:
                yield Happened(device, event)
        elif what == _CONTROL:
            before = self._joiner.unreadable
            yield from self._joiner.add(number, data)
            if self._joiner.unreadable != before:
                yield self._missing(device, self._joiner.unreadable - before)
        elif what == _LOST:
            yield self._missing(device, number)
        elif what == _NOTE:
            said = json.loads(data)
            yield Note(said["device"], said["ns"], said["text"])

    def _missing(self, device: str, count: int) -> Lost:
        self.lost += count
        return Lost(device, count)

    def _frame(self, until: float | None) -> tuple[int, int, int, bytes]:
        """The next one. Errors: TimeoutError; EOFError at the VM's end."""
        while True:
            if self._buffer.startswith(b"{"):  # a refusal, which is a line of text
                raise UserError(json.loads(self._buffer.partition(b"\n")[0]).get("error", "refused"))
            if len(self._buffer) >= _FRAME.size:
                size, what, index, number = _FRAME.unpack_from(self._buffer)
                if size > _MAX_FRAME:
                    raise UserError("the supervisor sent a frame of absurd length")
                if len(self._buffer) >= _FRAME.size + size:
                    data = bytes(self._buffer[_FRAME.size : _FRAME.size + size])
                    del self._buffer[: _FRAME.size + size]
                    return what, index, number, data
            left = None if until is None else max(0.0, until - time.monotonic())
            if not select.select([self._sock], [], [], left)[0]:
                raise TimeoutError
            more = self._sock.recv(1 << 20)
            if not more:
                raise EOFError("the VM is over")
            self._buffer += more
