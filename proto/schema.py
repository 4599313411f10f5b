"""The messages of messages.py to Cap'n Proto and back; the only user of pycapnp (capnplib.py imports it, lightly).

No capnp object leaves this module. pycapnp on hostile bytes is safe only when a message is opened by
``from_bytes`` with a traversal limit and read by named field; ``repr``, ``total_size``, ``as_builder``,
``to_dict`` and the packed forms abort the process on crafted input (measured), so nothing else is used. Each
field is copied once, into a dataclass whose annotation says its bound.

Importing this costs some 50 ms (pycapnp): import it late, or before the fork.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_args, get_origin, get_type_hints

from motorcade.proto.capnplib import capnp
from motorcade.proto.memory import Region
from motorcade.proto.messages import (
    MAX_CONFIG,
    MAX_QUEUES,
    NO_QUEUE,
    Activate,
    Answer,
    BlkBoot,
    Body,
    Boot,
    ConfigChanged,
    ConfigWrite,
    CoreBoot,
    Counter,
    Ended,
    Error,
    ErrorCode,
    Failed,
    Hello,
    Id,
    Json,
    KillSidecar,
    Life,
    Line,
    Malformed,
    Max,
    Message,
    NeedsReset,
    NetBoot,
    Notice,
    Ok,
    Ping,
    Queue,
    QueueStats,
    Ready,
    Request,
    Reset,
    Role,
    Running,
    SerialBoot,
    Shutdown,
    ShutdownVm,
    SidecarDied,
    Slot,
    StatsReport,
    StatsRequest,
    Welcome,
    Word,
)

__all__ = [
    "MAX_BOOT_BYTES",
    "MAX_CONFIG",
    "MAX_CONTROL_BYTES",
    "MAX_LIFE_BYTES",
    "MAX_QUEUES",
    "NO_QUEUE",
    "Activate",
    "Answer",
    "BlkBoot",
    "Body",
    "Boot",
    "ConfigChanged",
    "ConfigWrite",
    "CoreBoot",
    "Counter",
    "Ended",
    "Error",
    "ErrorCode",
    "Failed",
    "Hello",
    "Id",
    "Json",
    "KillSidecar",
    "Life",
    "Line",
    "Malformed",
    "Max",
    "Message",
    "NeedsReset",
    "NetBoot",
    "Notice",
    "Ok",
    "Ping",
    "Queue",
    "QueueStats",
    "Ready",
    "Region",
    "Request",
    "Reset",
    "Role",
    "Running",
    "SerialBoot",
    "Shutdown",
    "ShutdownVm",
    "SidecarDied",
    "Slot",
    "StatsReport",
    "StatsRequest",
    "Welcome",
    "Word",
    "decode",
    "decode_boot",
    "decode_life",
    "encode",
    "encode_boot",
    "encode_life",
]

MAX_CONTROL_BYTES = 64 << 10
"""Longest encoded control message, in bytes."""
MAX_BOOT_BYTES = 4 << 20
"""Longest encoded Boot, in bytes."""
MAX_LIFE_BYTES = 64 << 10
"""Longest encoded Life, in bytes."""

_HERE = Path(__file__).resolve().parent
_control: Any = capnp.load(str(_HERE / "control.capnp"))
_boot: Any = capnp.load(str(_HERE / "boot.capnp"))

_BODIES: dict[str, type[Any]] = {
    "hello": Hello,
    "activate": Activate,
    "reset": Reset,
    "configWrite": ConfigWrite,
    "stats": StatsRequest,
    "ping": Ping,
    "shutdown": Shutdown,
    "ok": Ok,
    "error": Error,
    "welcome": Welcome,
    "statsReport": StatsReport,
    "configChanged": ConfigChanged,
    "needsReset": NeedsReset,
}
_ROLES: dict[str, type[Any]] = {"core": CoreBoot, "blk": BlkBoot, "net": NetBoot, "serial": SerialBoot}
_LIVES: dict[str, type[Any]] = {
    "ready": Ready,
    "failed": Failed,
    "running": Running,
    "ended": Ended,
    "sidecarDied": SidecarDied,
    "shutdown": ShutdownVm,
    "killSidecar": KillSidecar,
}
_TEXT_ONLY = {Failed, KillSidecar}  # the union's member is a Text, not a struct

_CODES = tuple(ErrorCode(n) for n, _ in sorted(_control.Error.Code.schema.enumerants.items(), key=lambda e: e[1]))

_T = TypeVar("_T")


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(word.title() for word in rest)


def _read_code(number: int) -> ErrorCode:
    if number >= len(_CODES):
        raise Malformed(f"error code {number} is not one that we know")
    return _CODES[number]


_tables: dict[type[Any], tuple[tuple[str, str, Any], ...]] = {}


def _fields(cls: type[Any]) -> tuple[tuple[str, str, Any], ...]:
    """(attribute, field of the schema, annotation) of every field that the two share by name."""
    table = _tables.get(cls)
    if table is None:
        hints = get_type_hints(cls, include_extras=True)
        names = [f.name for f in dataclasses.fields(cls) if f.name != "role"]
        table = _tables[cls] = tuple((n, _camel(n), hints[n]) for n in names)
    return table


def _bound(annotation: Any) -> tuple[Any, int | None]:
    if get_origin(annotation) is Annotated:
        inner, limit = get_args(annotation)
        return inner, limit.n
    return annotation, None


def _check_len(length: int, limit: int | None, name: str) -> None:
    if limit is None or length > limit:
        raise Malformed(f"{name} has {length} elements or bytes, at most {limit} are allowed")


def _read_value(value: Any, annotation: Any, name: str) -> Any:
    kind, limit = _bound(annotation)
    if kind is int or kind is bool:
        return kind(value)
    if kind is str:
        # The bytes, not the characters, are what a bound is about; a Text of pycapnp is already decoded.
        _check_len(len(value.encode()), limit, name)
        return str(value)
    if kind is bytes:
        _check_len(len(value), limit, name)
        return bytes(value)
    if kind is ErrorCode:
        # By number: asking pycapnp for the name of an enumerant from a newer schema is an error of its own.
        return _read_code(int(value.raw))
    if get_origin(kind) is tuple:
        _check_len(len(value), limit, name)  # before the walk: a list of empty elements costs its sender nothing
        element = get_args(kind)[0]
        return tuple(_read_value(v, element, name) for v in value)
    return _read_struct(value, kind)


def _read_struct(reader: Any, cls: type[_T], **extra: Any) -> _T:
    values = {attr: _read_value(getattr(reader, field), ann, field) for attr, field, ann in _fields(cls)}
    result = cls(**values, **extra)
    check = getattr(result, "check", None)
    if check is not None:
        check()
    return result


def _write_struct(builder: Any, value: Any) -> None:
    check = getattr(value, "check", None)
    if check is not None:
        check()
    for attr, field, annotation in _fields(type(value)):
        _write_value(builder, field, getattr(value, attr), annotation)


def _write_value(builder: Any, field: str, value: Any, annotation: Any) -> None:
    kind, limit = _bound(annotation)
    if kind is str:
        _check_len(len(value.encode()), limit, field)
    elif kind is bytes or get_origin(kind) is tuple:
        _check_len(len(value), limit, field)
    if kind is ErrorCode:
        setattr(builder, field, value.value)
    elif get_origin(kind) is tuple:
        element = get_args(kind)[0]
        items = builder.init(field, len(value))
        inner, inner_limit = _bound(element)
        for i, item in enumerate(value):
            if inner is str:
                _check_len(len(item.encode()), inner_limit, field)
                items[i] = item
            elif inner is int:
                items[i] = item
            else:
                _write_struct(items[i], item)
    else:
        setattr(builder, field, value)


def _read_union(reader: Any, members: dict[str, type[Any]]) -> Any:
    tag = str(reader.which())
    cls = members.get(tag)
    if cls is None:
        raise Malformed(f"unknown union member {tag}")
    if cls in _TEXT_ONLY:
        ((attr, _, annotation),) = _fields(cls)
        return cls(**{attr: _read_value(getattr(reader, tag), annotation, tag)})
    if not _fields(cls):
        return cls()
    return _read_struct(getattr(reader, tag), cls)


def _write_union(builder: Any, members: dict[str, type[Any]], value: Any) -> None:
    tag = next((t for t, cls in members.items() if cls is type(value)), None)
    if tag is None:
        raise ValueError(f"{type(value).__name__} is not one of {', '.join(members)}")
    if type(value) in _TEXT_ONLY:
        ((attr, _, annotation),) = _fields(type(value))
        _write_value(builder, tag, getattr(value, attr), annotation)
    elif not _fields(type(value)):
        setattr(builder, tag, None)
    else:
        _write_struct(builder.init(tag), value)


def _decode(struct: Any, data: bytes, most: int, read: Callable[[Any], Any]) -> Any:
    if len(data) > most:
        raise Malformed(f"{len(data)} bytes, at most {most} are allowed")
    try:
        # The limit counts words each time they are reached: without one, pointers that share a target make
        # a few hundred bytes cost a second (measured).
        with struct.from_bytes(bytes(data), traversal_limit_in_words=len(data) // 8 * 4 + 64) as reader:
            return read(reader)
    except Malformed:
        raise
    except (capnp.KjException, ValueError) as e:  # ValueError covers UnicodeDecodeError and odd lengths
        raise Malformed(_first_line(e)) from None


def _first_line(error: Exception) -> str:
    # A KjException's text ends in a stack of addresses.
    return str(error).split("\n", 1)[0][:200]


def _encode(struct: Any, most: int, write: Callable[[Any], None]) -> bytes:
    builder = struct.new_message()
    try:
        write(builder)
    except (capnp.KjException, OverflowError) as e:
        raise ValueError(_first_line(e)) from None
    data = cast(bytes, builder.to_bytes())
    if len(data) > most:
        raise ValueError(f"the message has {len(data)} bytes, at most {most} are allowed")
    return data


def encode(message: Message) -> bytes:
    """``message`` as one frame. ValueError where a field is out of its bounds: our own mistake, not a peer's."""

    def write(b: Any) -> None:
        b.id = message.id
        b.deadlineMs = message.deadline_ms
        _write_union(b, _BODIES, message.body)

    return _encode(_control.Message, MAX_CONTROL_BYTES, write)


def decode(data: bytes) -> Message:
    """The message in ``data``, which may be anything. Raises Malformed and nothing else."""

    def read(r: Any) -> Message:
        return Message(int(r.id), int(r.deadlineMs), _read_union(r, _BODIES))

    return cast(Message, _decode(_control.Message, data, MAX_CONTROL_BYTES, read))


def encode_boot(boot: Boot) -> bytes:
    """``boot`` in bytes. ValueError where a field is out of its bounds."""

    def write(b: Any) -> None:
        _write_struct(b, boot)
        _write_union(b.role, _ROLES, boot.role)

    return _encode(_boot.Boot, MAX_BOOT_BYTES, write)


def decode_boot(data: bytes) -> Boot:
    """The Boot in ``data``. Raises Malformed and nothing else."""

    def read(r: Any) -> Boot:
        return _read_struct(r, Boot, role=_read_union(r.role, _ROLES))

    return cast(Boot, _decode(_boot.Boot, data, MAX_BOOT_BYTES, read))


def encode_life(life: Life) -> bytes:
    """``life`` in bytes. ValueError where a field is out of its bounds."""
    return _encode(_boot.Life, MAX_LIFE_BYTES, lambda b: _write_union(b, _LIVES, life))


def decode_life(data: bytes) -> Life:
    """The Life message in ``data``. Raises Malformed and nothing else."""
    return cast(Life, _decode(_boot.Life, data, MAX_LIFE_BYTES, lambda r: _read_union(r, _LIVES)))
