"""Cuts a byte stream into JSON objects, however its packets fall, with bounds on size and depth.

QMP puts requests back to back, with or without white space between them, so the end of an object is where its
brackets close. Only brackets and strings are looked at here; whether what lies between is JSON is for the decoder.
The work per byte is a regular expression's; after a bound is passed nothing is kept until the object ends.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator
from dataclasses import dataclass

MAX_OBJECT = 1 << 20
"""Longest request, in bytes."""
MAX_DEPTH = 64
"""Deepest nesting of objects and arrays; the decoder is recursive."""

# 0xff is in no UTF-8 text: QEMU's clients send it to put a confused parser back to its start.
_STRUCTURE = re.compile(rb'["{}\[\]\xff]')
_IN_STRING = re.compile(rb'["\\\xff]')
_SPACE = re.compile(rb"[ \t\r\n]*")
_JUNK_END = re.compile(rb"[\n{\[\xff]")


@dataclass(frozen=True, slots=True)
class Bad:
    """Input that is no object; ``reason`` is for the client."""

    reason: str


class _State(enum.Enum):
    BETWEEN = 0
    JUNK = 1  # something else than an object, up to the next line or object
    OBJECT = 2
    STRING = 3
    ESCAPE = 4


class Splitter:
    """One stream. ``feed`` what arrives; an object or a Bad comes out for each thing that was sent."""

    def __init__(self, max_object: int = MAX_OBJECT, max_depth: int = MAX_DEPTH) -> None:
        self._max_object = max_object
        self._max_depth = max_depth
        self._state = _State.BETWEEN
        self._depth = 0
        self._kept = bytearray()  # of the object under way
        self._dropping = False  # a bound was passed and said so; the rest of the object is not kept

    @property
    def pending(self) -> int:
        """Bytes kept of an object that has not ended."""
        return len(self._kept)

    def feed(self, data: bytes) -> Iterator[bytes | Bad]:
        """Whole objects (or arrays: the caller refuses them) in ``data`` and what was kept from before."""
        pos = 0
        start = 0  # of what ``data`` adds to the object under way
        while pos < len(data):
            if self._state is _State.BETWEEN:
                pos = self._skip_space(data, pos)
                start = pos
                if pos < len(data):
                    self._begin(data[pos])
            elif self._state is _State.JUNK:
                end = _JUNK_END.search(data, pos)
                if end is None:
                    return
                pos = end.end() if end[0] in (b"\n", b"\xff") else end.start()
                self._state = _State.BETWEEN
                yield Bad("JSON parse error, expecting a JSON object")
            else:
                pos, event = self._scan(data, pos)
                # A bound holds within a packet as well as between them.
                if not self._dropping and len(self._kept) + pos - start > self._max_object:
                    yield self._drop(f"the request is longer than {self._max_object} bytes")
                if event is _Event.DEEP and not self._dropping:
                    yield self._drop(f"the request is nested deeper than {self._max_depth}")
                elif event is _Event.ABORT:
                    self._reset()
                    yield Bad("JSON parse error, the request was broken off")
                elif event is _Event.END:
                    whole = bytes(self._kept + data[start:pos])
                    dropped = self._dropping
                    self._reset()
                    if not dropped:
                        yield whole
        if self._state not in (_State.BETWEEN, _State.JUNK) and not self._dropping:
            self._kept += data[start:]

    @staticmethod
    def _skip_space(data: bytes, pos: int) -> int:
        space = _SPACE.match(data, pos)
        return space.end() if space else pos

    def _begin(self, first: int) -> None:
        self._state = _State.OBJECT if first in b"{[" else _State.JUNK

    def _scan(self, data: bytes, pos: int) -> tuple[int, _Event]:
        """Goes on to the next thing that matters: where it ends, and what it means."""
        if self._state is _State.ESCAPE:
            self._state = _State.STRING
            return pos + 1, _Event.ABORT if data[pos] == 0xFF else _Event.NONE
        hit = (_IN_STRING if self._state is _State.STRING else _STRUCTURE).search(data, pos)
        if hit is None:
            return len(data), _Event.NONE
        char = hit[0]
        if char == b"\xff":
            return hit.end(), _Event.ABORT
        if self._state is _State.STRING:
            self._state = _State.OBJECT if char == b'"' else _State.ESCAPE
        elif char == b'"':
            self._state = _State.STRING
        elif char in b"{[":
            self._depth += 1
            if self._depth > self._max_depth:
                return hit.end(), _Event.DEEP
        else:
            self._depth -= 1
            if self._depth == 0:
                return hit.end(), _Event.END
        return hit.end(), _Event.NONE

    def _drop(self, reason: str) -> Bad:
        self._dropping = True
        self._kept.clear()
        return Bad(reason)

    def _reset(self) -> None:
        self._state = _State.BETWEEN
        self._depth = 0
        self._kept.clear()
        self._dropping = False


class _Event(enum.Enum):
    NONE = 0
    DEEP = 1
    ABORT = 2
    END = 3
