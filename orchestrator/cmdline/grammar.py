"""How QEMU's options are written (qemu(1); QEMU's util/qemu-option.c): ``-option key=value,key=value``, the first key
left out where it is clear, a comma in a value doubled, a key alone for ``key=on`` and ``nokey`` for ``key=off``.
StratoVirt's are the same.

A table says which keys an option has and what each value may be. What it does not have is refused by name.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Check = Callable[[str], object]
"""A value's text as what it means. Errors: Wrong."""

_UNITS = {"b": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_TRUE, _FALSE = {"on", "yes", "true", "y"}, {"off", "no", "false", "n"}


class Wrong(ValueError):
    """A value that cannot be; the text says why."""


class Note(Exception):
    """A value that can be, with a word about it for the person. Holds the value."""

    def __init__(self, value: object, text: str) -> None:
        super().__init__(text)
        self.value = value


@dataclass(frozen=True)
class Option:
    """One option of the command line, as typed."""

    name: str  # without its dashes
    value: str | None
    typed: str
    shown: str = ""  # for people, where ``value`` is not what was typed

    def __str__(self) -> str:
        return self.shown or (f"{self.typed} {self.value}" if self.value is not None else self.typed)

    def reworded(self, value: str) -> Option:
        """The same option, its value put in other words."""
        return dataclasses.replace(self, value=value, shown=str(self))


@dataclass(frozen=True)
class Problem:
    """What is wrong, and with what."""

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class Problems:
    """All that is wrong with a command line, and what is worth a word though it is not wrong."""

    def __init__(self) -> None:
        self.found: list[Problem] = []
        self.notes: list[str] = []

    def add(self, where: object, message: str) -> None:
        """Notes that ``where``, an option as typed or a part of one, is wrong."""
        self.found.append(Problem(str(where), message))

    def note(self, where: object, message: str) -> None:
        """A word to the person."""
        self.notes.append(f"{where}: {message}")


def pairs(text: str, implied: str = "") -> list[tuple[str, str | None]]:
    """``text`` as keys and values; a value of None where a key stands alone. ``implied``: the first one's key where
    it has none, and empty where there is no such thing."""
    result: list[tuple[str, str | None]] = []
    for n, piece in enumerate(re.findall(r"((?:[^,]|,,)*)(?:,|\Z)", text)[:-1]):
        piece = piece.replace(",,", ",")
        key, equals, value = piece.partition("=")
        if n == 0 and implied and (not equals or not re.fullmatch(r"[-_.A-Za-z0-9]+", key)):
            result.append((implied, piece))
        elif equals:
            result.append((key, value))
        else:
            result.append((piece, None))
    return result


def parse(option: Option, table: Mapping[str, Check], problems: Problems, *, implied: str = "") -> dict[str, Any]:
    """The keys of ``option`` with what their values mean, by ``table``. Those that are wrong are left out."""
    result: dict[str, Any] = {}
    for key, text in pairs(option.value or "", implied):
        if text is None:  # a key alone
            if key not in table and key.startswith("no") and key[2:] in table:
                key, text = key[2:], "off"
            else:
                text = "on"
        where = f"{option}: {key}={text}" if (key, text) != (implied, option.value) else str(option)
        if key not in table:
            problems.add(option, f"{key}: {unknown(key, table, 'no such key')}")
        elif key in result:
            problems.add(option, f"{key} is there twice")
        else:
            read(key, text, table[key], where, result, problems)
    return result


def read(key: str, text: str, check: Check, where: str, result: dict[str, Any], problems: Problems) -> None:
    """Puts what ``text`` means into ``result``, or what is wrong with it into ``problems``."""
    try:
        result[key] = check(text)
    except Note as e:
        result[key] = e.value
        problems.note(where, str(e))
    except Wrong as e:
        problems.add(where, str(e))


def unknown(name: str, known: Iterable[str], what: str) -> str:
    """That there is no ``name``, with the nearest that there is, or all where they are few."""
    names = list(known)
    close = difflib.get_close_matches(name, names, 1, 0.7)
    if close:
        return f"{what}; did you mean {close[0]}?"
    return f"{what} (there are: {', '.join(sorted(names))})" if 0 < len(names) <= 24 else what


# What a value may be.


def text(value: str) -> str:
    """Anything but nothing."""
    if not value:
        raise Wrong("empty")
    return value


def flag(value: str) -> bool:
    """QEMU's and StratoVirt's booleans."""
    if value in _TRUE or value in _FALSE:
        return value in _TRUE
    raise Wrong("on or off (yes, no, true, false) is wanted")


def number(low: int = 0, high: int = (1 << 63) - 1) -> Check:
    """A whole number, decimal or 0x..."""

    def check(value: str) -> int:
        if not re.fullmatch(r"[0-9]+|0[xX][0-9a-fA-F]+", value):
            raise Wrong("a whole number is wanted")
        n = int(value, 16 if value[:2] in ("0x", "0X") else 10)
        if not low <= n <= high:
            raise Wrong(f"{n} is too {'small' if n < low else 'large'} (from {low} to {high})")
        return n

    return check


def size(unit: str) -> Check:
    """Bytes, from a number with K, M, G or T behind it; ``unit`` (b, m) where there is none."""

    def check(value: str) -> object:
        match = re.fullmatch(r"([0-9]+)(?:\.([0-9]+))?([bkmgtBKMGT]?)", value)
        if not match:
            raise Wrong("a size such as 512M or 2G is wanted")
        whole, part, letter = match.groups()
        shift = _UNITS[(letter or unit).lower()]
        part = part or "0"
        fraction, rest = divmod(int(part) << shift, 10 ** len(part))
        if rest:
            raise Wrong("not a whole number of bytes")
        return (int(whole) << shift) + int(fraction)

    return check


def choice(meanings: Mapping[str, object]) -> Check:
    """One of these words; what stands behind each may be a Wrong or a Note, which is then raised."""

    def check(value: str) -> object:
        if value not in meanings:
            good = [word for word, meaning in meanings.items() if not isinstance(meaning, Wrong)]
            raise Wrong(f"{value} is not one of {', '.join(good)}")
        meaning = meanings[value]
        if isinstance(meaning, Wrong | Note):
            raise meaning
        return meaning

    return check


def only(*values: str, why: str) -> Check:
    """Accepted where it asks for what is so anyway; ``why`` anything else cannot be."""

    def check(value: str) -> str:
        if value not in values:
            raise Wrong(why)
        return value

    return check


def is_on(why: str) -> Check:
    """A flag that is always on."""
    return _is(True, why)


def is_off(why: str) -> Check:
    """A flag that is always off."""
    return _is(False, why)


def _is(wanted: bool, why: str) -> Check:
    def check(value: str) -> bool:
        if flag(value) is not wanted:
            raise Wrong(why)
        return wanted

    return check


def noted(check: Check, word: str, *, when: object = None) -> Check:
    """As ``check``, with a ``word`` to the person where the value is ``when`` (None: any)."""

    def noting(value: str) -> object:
        result = check(value)
        if when is None or result == when:
            raise Note(result, word)
        return result

    return noting


def refused(why: str) -> Check:
    """Known, and not to be had."""

    def check(value: str) -> object:
        raise Wrong(why)

    return check
