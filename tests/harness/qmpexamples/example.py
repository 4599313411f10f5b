"""What an example says: a request, and what has to come back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.vm import Vm


@dataclass(frozen=True)
class Place:
    """Where the examples are replayed: a folder of the test's own, for files, and the VM."""

    folder: Path
    vm: Vm


Shape = Any
"""What a value must be like: a type (its instance; bool is no int here), a function (that says True of it), Each (a
list of such), a list (of as many values, each like its own), a mapping (with these members, and no other but those
named "?x", which may be missing), or anything else (equal)."""


@dataclass(frozen=True)
class Each:
    """A list with at least one element, all like ``shape``."""

    shape: Shape


Event = tuple[str, Shape]
"""Its name, and what its data are like; None where it has none."""


@dataclass(frozen=True)
class Example:
    """One request. ``arguments``: a mapping, or a function of the Place that gives one.

    ``answer`` is what the return is like, or ``error`` the class of the error and ``desc`` a part of its text.
    ``events`` come before the answer, all of them and no others; ``after`` are waited for when the answer is there.
    ``fd``: the file (a function of the Place) whose descriptor goes along, opened for reading and writing.
    """

    command: str
    arguments: Mapping[str, object] | Callable[[Place], Mapping[str, object]] = field(default_factory=dict)
    answer: Shape = field(default_factory=dict)
    error: str = ""
    desc: str = ""
    events: Sequence[Event] = ()
    after: Sequence[Event] = ()
    fd: Callable[[Place], Path] | None = None


@dataclass(frozen=True)
class Group:
    """Examples that belong together, in their order; see the package's docstring.

    ``machine``: what it needs of machine.yaml, lists being added to those of others. ``prepare`` is called before the
    first example, with the VM running. ``start``: a VM of its own, started with these options (of harness.vm.Vm).
    """

    name: str
    examples: Sequence[Example]
    machine: Callable[[Path], dict[str, Any]] = lambda _folder: {}
    prepare: Callable[[Place], None] = lambda _place: None
    guests: Sequence[str] = ("micro", "linux")
    start: Mapping[str, object] | None = None


def unlike(value: object, shape: Shape, where: str = "answer") -> str:
    """What is wrong with ``value``; empty where it is like ``shape``."""
    if isinstance(shape, type):
        right = isinstance(value, shape) and not (shape is int and isinstance(value, bool))
        return "" if right else f"{where}: {value!r} is no {shape.__name__}"
    if isinstance(shape, Each):
        if not isinstance(value, list) or not value:
            return f"{where}: {value!r} is no list with something in it"
        return next((bad for n, v in enumerate(value) if (bad := unlike(v, shape.shape, f"{where}[{n}]"))), "")
    if isinstance(shape, list):
        if not isinstance(value, list) or len(value) != len(shape):
            return f"{where}: {value!r} is no list of {len(shape)}"
        pairs = enumerate(zip(value, shape, strict=True))
        return next((bad for n, (v, s) in pairs if (bad := unlike(v, s, f"{where}[{n}]"))), "")
    if isinstance(shape, Mapping):
        return _unlike_members(value, shape, where)
    if callable(shape):
        return "" if shape(value) else f"{where}: {value!r} is not as it must be"
    right = type(value) is type(shape) and value == shape
    return "" if right else f"{where}: {value!r} is not {shape!r}"


def _unlike_members(value: object, shape: Mapping[str, Shape], where: str) -> str:
    if not isinstance(value, dict):
        return f"{where}: {value!r} is no object"
    known = {name.removeprefix("?"): s for name, s in shape.items()}
    if extra := value.keys() - known.keys():
        return f"{where}: members that must not be there: {sorted(extra)}"
    if missing := {name for name in shape if not name.startswith("?")} - value.keys():
        return f"{where}: members are missing: {sorted(missing)}"
    return next((bad for name, v in value.items() if (bad := unlike(v, known[name], f"{where}.{name}"))), "")
