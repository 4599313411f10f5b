"""Hypothesis strategies for every message, from the same annotations that bound them; shared by unit and fuzz tests."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from hypothesis import strategies as st

from motorcade.proto import messages as m

# The width of an integer is the schema's to say; a field that is not here has 64 bits.
_BITS = {
    16: {
        "protocol_version",
        "index",
        "size@Queue",
        "queue",
        "cpus",
        "queues",
        "queue_pairs",
        "mtu",
        "last_avail",
        "used_idx",
        "error@Queue",
        "error@QueueState",
        "version",
        "layers",
        "parents",
    },
    32: {"pid", "virtio_type", "deadline_ms", "offset@ConfigWrite", "scrollback", "count@Inject", "delay_ms"},
    8: {"status"},
}
_SPECIAL: dict[str, st.SearchStrategy[Any]] = {
    "Hello.queue_sizes": st.lists(st.sampled_from([1 << n for n in range(16)]), max_size=8).map(tuple),
    "Hello.config": st.binary(min_size=4, max_size=64),
    "Hello.config_kinds": st.lists(st.integers(0, 2), max_size=4).map(bytes),
    "Queue.size": st.sampled_from([1 << n for n in range(16)]),
    "NetBoot.mac": st.binary(min_size=6, max_size=6),
}


def _bits(cls: type, name: str) -> int:
    for bits, names in _BITS.items():
        if name in names or f"{name}@{cls.__name__}" in names:
            return bits
    return 64


def _text(limit: int) -> st.SearchStrategy[str]:
    # UTF-8 has no surrogates, and a character takes up to 4 bytes.
    return st.text(st.characters(exclude_categories=["Cs"]), max_size=min(limit // 4, 40))


def _value(cls: type, name: str, annotation: Any) -> st.SearchStrategy[Any]:
    if (special := _SPECIAL.get(f"{cls.__name__}.{name}")) is not None:
        return special
    kind, limit = annotation, 0
    if get_origin(annotation) is Annotated:
        kind, limit = get_args(annotation)[0], get_args(annotation)[1].n
    if kind is int:
        return st.integers(0, (1 << _bits(cls, name)) - 1)
    if kind is bool:
        return st.booleans()
    if kind is str:
        return _text(limit)
    if kind is bytes:
        return st.binary(max_size=min(limit, 64))
    if kind is m.ErrorCode:
        return st.sampled_from(m.ErrorCode)
    if get_origin(kind) is tuple:
        return st.lists(_value(cls, name + "[]", get_args(kind)[0]), max_size=4).map(tuple)
    return struct(kind)


def struct(cls: type[Any]) -> st.SearchStrategy[Any]:
    """Any legal value of a message dataclass."""
    hints = get_type_hints(cls, include_extras=True)
    values = {f.name: _value(cls, f.name, hints[f.name]) for f in dataclasses.fields(cls) if f.name != "role"}
    if any(f.name == "role" for f in dataclasses.fields(cls)):
        values["role"] = st.one_of([struct(c) for c in get_args(m.Role)])
    return st.builds(cls, **values)


BODIES = st.one_of([struct(c) for c in get_args(m.Body)])
MESSAGES = st.builds(m.Message, st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 32) - 1), BODIES)
BOOTS = struct(m.Boot)
LIVES = st.one_of([struct(c) for c in get_args(m.Life)])
