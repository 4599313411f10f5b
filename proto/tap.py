"""Control messages as they pass the core, decoded, into a ring that others can read (proto/watch.py).

The core writes, and only while somebody looks: off, a message costs one look at a word. A message is text (JSON) of any
length, cut into slots of the ring; a reader that was lapped goes on at the next message's first slot.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from motorcade.proto import watch

if TYPE_CHECKING:
    from motorcade.proto.messages import Message

SLOT_SIZE = 256
SLOTS = watch.EVENTS * watch.EVENT_SIZE // SLOT_SIZE
MAX_TEXT = 32 << 10  # bytes of JSON; far more than any message that is summed up has
_HEAD = struct.Struct("<QQHHHH")  # number from 1, CLOCK_MONOTONIC in ns, part, parts, bytes of text here, 0
_ROOM = SLOT_SIZE - _HEAD.size
_MAX_PARTS = -(-MAX_TEXT // _ROOM)
_ELEMENTS, _BYTES = 16, 32  # of a list, of a blob, that are shown
_ON_AT, _NEXT_AT = 4, 64


class Tap:
    """The writer: the core."""

    def __init__(self, fd: int | None) -> None:
        """``fd`` (None: nobody can look) stays the caller's."""
        self._mapping = watch.map_or_make(fd)
        self._on = memoryview(self._mapping)[_ON_AT : _ON_AT + 4].cast("I")
        self._next = memoryview(self._mapping)[_NEXT_AT : _NEXT_AT + 8].cast("Q")

    def __call__(self, to_sidecar: bool, device_id: str, message: Message) -> None:
        """Records a message, if somebody wants to see it."""
        if not self._on[0]:
            return
        said = {
            "device": device_id,
            "to": to_sidecar,
            "id": message.id,
            "type": type(message.body).__name__,
            "body": summary(message.body),
        }
        text = json.dumps(said, separators=(",", ":")).encode()[:MAX_TEXT]
        parts = -(-len(text) // _ROOM)
        now = time.monotonic_ns()
        for part in range(parts):
            piece = text[part * _ROOM : (part + 1) * _ROOM]
            number = self._next[0]
            at = watch.RING_AT + number % SLOTS * SLOT_SIZE
            # In this order; x86 keeps the stores so. A reader checks the number in the slot against its place.
            self._next[0] = number + 1
            _HEAD.pack_into(self._mapping, at, 0, now, part, parts, len(piece), 0)
            self._mapping[at + _HEAD.size : at + _HEAD.size + len(piece)] = piece
            struct.pack_into("<Q", self._mapping, at, number + 1)


def summary(value: Any) -> Any:
    """A message's body as JSON has it, long lists and blobs cut."""
    if dataclasses.is_dataclass(value):
        return {f.name: summary(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, bytes):
        return {"bytes": len(value), "hex": value[:_BYTES].hex()}
    if isinstance(value, tuple):
        shown = [summary(v) for v in value[:_ELEMENTS]]
        return shown if len(value) <= _ELEMENTS else [*shown, f"... {len(value) - _ELEMENTS} more"]
    return value


@dataclass(frozen=True, slots=True)
class Said:
    """A control message: when (CLOCK_MONOTONIC in ns), whose, in which direction, and what."""

    ns: int
    device: str
    to_sidecar: bool
    id: int
    type: str
    body: dict[str, Any]


class Joiner:
    """Puts messages together from slots, which may come from a core that lies."""

    def __init__(self) -> None:
        self.unreadable = 0  # slots that belong to no whole message
        self._parts: list[bytes] = []
        self._expected = -1

    def add(self, first: int, data: bytes) -> Iterator[Said]:
        """Slots in order, as Ring.read gave them."""
        for i in range(len(data) // SLOT_SIZE):
            slot = data[i * SLOT_SIZE : (i + 1) * SLOT_SIZE]
            seq, ns, part, parts, length, _ = _HEAD.unpack_from(slot)
            number = first + i
            if seq != number + 1 or part >= parts or parts > _MAX_PARTS or length > _ROOM:
                self._drop(1)
                continue
            if part != len(self._parts) or (part and number != self._expected):
                self._drop(0)
                if part:
                    self._drop(1)
                    continue
            self._parts.append(slot[_HEAD.size : _HEAD.size + length])
            self._expected = number + 1
            if len(self._parts) == parts:
                text, self._parts = b"".join(self._parts), []
                said = _parse(ns, text)
                if said is None:
                    self.unreadable += parts
                else:
                    yield said


    def _drop(self, more: int) -> None:
        self.unreadable += len(self._parts) + more
        self._parts = []


def _parse(ns: int, text: bytes) -> Said | None:
    try:
        value = json.loads(text)
        body = value["body"]
        if not isinstance(body, dict):
            return None
        return Said(ns, str(value["device"]), bool(value["to"]), int(value["id"]), str(value["type"]), body)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
