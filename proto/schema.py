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
from typing import Annotated, Any, NamedTuple, TypeVar, cast, get_args, get_origin, get_type_hints

from motorcade.proto.capnplib import capnp
from motorcade.proto.memory import Region
from motorcade.proto.messages import (
    MAX_CONFIG,
    MAX_QUEUES,
    MAX_STATE,
    NO_QUEUE,
    Activate,
    Answer,
    BlkBoot,
    Body,
    Boot,
    CloseTarget,
    Command,
    CommandResult,
    ConfigChanged,
    ConfigWrite,
    CopyDisks,
    CoreBoot,
    Counter,
    Damaged,
    DeviceState,
    DisksCopied,
    Ended,
    Ending,
    Error,
    ErrorCode,
    Failed,
    Go,
    HandOver,
    Hello,
    Hotplug,
    Hotplugged,
    Id,
    Incoming,
    Inject,
    Json,
    KillSidecar,
    KitBoot,
    LazyReady,
    Life,
    Line,
    Load,
    Malformed,
    Mapping,
    Max,
    Message,
    NeedsReset,
    NetBoot,
    Notice,
    Ok,
    OpenIncoming,
    OpenTarget,
    PagerBoot,
    Ping,
    Populate,
    Queue,
    QueueState,
    QueueStats,
    Quiesce,
    Ready,
    Reopen,
    Reopened,
    Request,
    Reset,
    RestartSidecar,
    Resume,
    Role,
    Running,
    Save,
    Saved,
    SerialBoot,
    Serve,
    Shutdown,
    ShutdownVm,
    SidecarDied,
    SidecarReady,
    SidecarReplaced,
    Silent,
    Slot,
    StatsReport,
    StatsRequest,
    Target,
    TargetClosed,
    Welcome,
    Word,
    WorkingSet,
)

__all__ = [
    "MAX_BOOT_BYTES",
    "MAX_CONFIG",
    "MAX_CONTROL_BYTES",
    "MAX_LIFE_BYTES",
    "MAX_QUEUES",
    "MAX_STATE",
    "NO_QUEUE",
    "Activate",
    "Answer",
    "BlkBoot",
    "Body",
    "Boot",
    "CloseTarget",
    "Command",
    "CommandResult",
    "ConfigChanged",
    "ConfigWrite",
    "CopyDisks",
    "CoreBoot",
    "Counter",
    "Damaged",
    "DeviceState",
    "DisksCopied",
    "Ended",
    "Ending",
    "Error",
    "ErrorCode",
    "Failed",
    "Go",
    "HandOver",
    "Hello",
    "Hotplug",
    "Hotplugged",
    "Id",
    "Incoming",
    "Inject",
    "Json",
    "KillSidecar",
    "KitBoot",
    "LazyReady",
    "Life",
    "Line",
    "Load",
    "Malformed",
    "Mapping",
    "Max",
    "Message",
    "NeedsReset",
    "NetBoot",
    "Notice",
    "Ok",
    "OpenIncoming",
    "OpenTarget",
    "PagerBoot",
    "Ping",
    "Populate",
    "Queue",
    "QueueState",
    "QueueStats",
    "Quiesce",
    "Ready",
    "Region",
    "Reopen",
    "Reopened",
    "Request",
    "Reset",
    "RestartSidecar",
    "Resume",
    "Role",
    "Running",
    "Save",
    "Saved",
    "SerialBoot",
    "Serve",
    "Shutdown",
    "ShutdownVm",
    "SidecarDied",
    "SidecarReady",
    "SidecarReplaced",
    "Silent",
    "Slot",
    "StatsReport",
    "StatsRequest",
    "Target",
    "TargetClosed",
    "Welcome",
    "Word",
    "WorkingSet",
    "decode",
    "decode_boot",
    "decode_life",
    "decode_struct",
    "encode",
    "encode_boot",
    "encode_life",
    "encode_struct",
    "load",
]

MAX_CONTROL_BYTES = 640 << 10
"""Longest encoded control message, in bytes."""
MAX_BOOT_BYTES = 4 << 20
"""Longest encoded Boot, in bytes."""
MAX_LIFE_BYTES = 64 << 10
"""Longest encoded Life, in bytes."""

_HERE = Path(__file__).resolve().parent


def load(name: str) -> Any:
    """The schema ``name`` of this folder; its structs are for encode_struct and decode_struct."""
    return capnp.load(str(_HERE / name))


_control: Any = load("control.capnp")
_boot: Any = load("boot.capnp")

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
    "quiesce": Quiesce,
    "save": Save,
    "load": Load,
    "resume": Resume,
    "saved": Saved,
    "populate": Populate,
    "inject": Inject,
    "command": Command,
    "result": CommandResult,
}
_ROLES: dict[str, type[Any]] = {
    "core": CoreBoot,
    "blk": BlkBoot,
    "net": NetBoot,
    "serial": SerialBoot,
    "pager": PagerBoot,
    "kit": KitBoot,
}
_LIVES: dict[str, type[Any]] = {
    "ready": Ready,
    "failed": Failed,
    "running": Running,
    "ended": Ended,
    "sidecarDied": SidecarDied,
    "shutdown": ShutdownVm,
    "killSidecar": KillSidecar,
    "silent": Silent,
    "lazyReady": LazyReady,
    "serve": Serve,
    "workingSet": WorkingSet,
    "damaged": Damaged,
    "openTarget": OpenTarget,
    "target": Target,
    "copyDisks": CopyDisks,
    "disksCopied": DisksCopied,
    "closeTarget": CloseTarget,
    "targetClosed": TargetClosed,
    "openIncoming": OpenIncoming,
    "incoming": Incoming,
    "sidecarReplaced": SidecarReplaced,
    "reopen": Reopen,
    "reopened": Reopened,
    "hotplug": Hotplug,
    "hotplugged": Hotplugged,
    "restartSidecar": RestartSidecar,
    "sidecarReady": SidecarReady,
    "handOver": HandOver,
    "go": Go,
    "ending": Ending,
}
# The union's member is the one field itself (a Text, a Data, a struct of its own), not a struct that holds it.
_BARE = {Failed, KillSidecar, Silent, WorkingSet, Damaged, Load, Saved, CommandResult}

_CODES = tuple(ErrorCode(n) for n, _ in sorted(_control.Error.Code.schema.enumerants.items(), key=lambda e: e[1]))

_T = TypeVar("_T")


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(word.title() for word in rest)


def _read_code(number: int) -> ErrorCode:
    if number >= len(_CODES):
        raise Malformed(f"error code {number} is not one that we know")
    return _CODES[number]


class _Form(NamedTuple):
    """An annotation, taken apart once: asking typing costs more than reading the value."""

    kind: Any  # int, bool, str, bytes, ErrorCode, tuple, or a dataclass
    limit: int | None
    element: _Form | None  # of a tuple


_PLAIN = (int, bool, str, bytes)
_tables: dict[type[Any], tuple[tuple[str, str, _Form], ...]] = {}


def _form(annotation: Any) -> _Form:
    limit = None
    if get_origin(annotation) is Annotated:
        annotation, bound = get_args(annotation)
        limit = bound.n
    if get_origin(annotation) is tuple:
        return _Form(tuple, limit, _form(get_args(annotation)[0]))
    return _Form(annotation, limit, None)


def _fields(cls: type[Any]) -> tuple[tuple[str, str, _Form], ...]:
    """(attribute, field of the schema, form) of every field that the two share by name."""
    table = _tables.get(cls)
    if table is None:
        hints = get_type_hints(cls, include_extras=True)
        names = [f.name for f in dataclasses.fields(cls) if f.name != "role"]
        table = _tables[cls] = tuple((n, _camel(n), _form(hints[n])) for n in names)
    return table


def _check_len(length: int, limit: int | None, name: str) -> None:
    if limit is None or length > limit:
        raise Malformed(f"{name} has {length} elements or bytes, at most {limit} are allowed")


def _read_value(value: Any, form: _Form, name: str) -> Any:
    kind, limit, element = form
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
    if element is not None:
        _check_len(len(value), limit, name)  # before the walk: a list of empty elements costs its sender nothing
        return tuple(_read_value(v, element, name) for v in value)
    return _read_struct(value, kind)


def _read_struct(reader: Any, cls: type[_T], **extra: Any) -> _T:
    values = {attr: _read_value(getattr(reader, field), form, field) for attr, field, form in _fields(cls)}
    result = cls(**values, **extra)
    check = getattr(result, "check", None)
    if check is not None:
        check()
    return result


def _write_struct(builder: Any, value: Any) -> None:
    check = getattr(value, "check", None)
    if check is not None:
        check()
    for attr, field, form in _fields(type(value)):
        _write_value(builder, field, getattr(value, attr), form)


def _write_value(builder: Any, field: str, value: Any, form: _Form) -> None:
    kind, limit, element = form
    if kind is str:
        _check_len(len(value.encode()), limit, field)
    elif kind is bytes or element is not None:
        _check_len(len(value), limit, field)
    if kind is ErrorCode:
        setattr(builder, field, value.value)
    elif element is not None:
        items = builder.init(field, len(value))
        for i, item in enumerate(value):
            if element.kind is str:
                _check_len(len(item.encode()), element.limit, field)
                items[i] = item
            elif element.kind is int:
                items[i] = item
            else:
                _write_struct(items[i], item)
    elif kind in _PLAIN:
        setattr(builder, field, value)
    else:
        _write_struct(builder.init(field), value)


def _read_union(reader: Any, members: dict[str, type[Any]]) -> Any:
    tag = str(reader.which())
    cls = members.get(tag)
    if cls is None:
        raise Malformed(f"unknown union member {tag}")
    if cls in _BARE:
        ((attr, _, form),) = _fields(cls)
        return cls(**{attr: _read_value(getattr(reader, tag), form, tag)})
    if not _fields(cls):
        return cls()
    return _read_struct(getattr(reader, tag), cls)


def _write_union(builder: Any, members: dict[str, type[Any]], value: Any) -> None:
    tag = next((t for t, cls in members.items() if cls is type(value)), None)
    if tag is None:
        raise ValueError(f"{type(value).__name__} is not one of {', '.join(members)}")
    if type(value) in _BARE:
        ((attr, _, form),) = _fields(type(value))
        _write_value(builder, tag, getattr(value, attr), form)
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


def encode_struct(struct: Any, value: Any, most: int) -> bytes:
    """``value``, a dataclass with bounds as in messages.py, as a message of ``struct`` (see load) of at most ``most``
    bytes. ValueError where a field is out of its bounds."""
    return _encode(struct, most, lambda b: _write_struct(b, value))


def decode_struct(struct: Any, cls: type[_T], data: bytes, most: int) -> _T:
    """The ``cls`` in ``data``, which may be anything. Raises Malformed and nothing else."""
    return cast(_T, _decode(struct, data, most, lambda r: _read_struct(r, cls)))
