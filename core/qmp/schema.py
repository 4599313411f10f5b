"""query-qmp-schema (QEMU's qapi/introspect.json): what this server takes and gives, from the definitions alone.

Commands, events and built-in types have their names. Those of the other types are numbers, as QEMU's are: they are no
part of the protocol, and nobody is to rely on them.
"""

from __future__ import annotations

import enum
import functools
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec

from motorcade.core.qmp.events import EVENTS, EventData
from motorcade.core.qmp.registry import Command, Context, NoArguments, Result, command


class JsonType(enum.StrEnum):
    """QEMU's JSONType."""

    STRING = "string"
    NUMBER = "number"
    INT = "int"
    BOOLEAN = "boolean"
    NULL = "null"
    OBJECT = "object"
    ARRAY = "array"
    VALUE = "value"


class EnumMember(Result, frozen=True):
    """One value of an enumeration."""

    name: str


class ObjectMember(Result, frozen=True):
    """``default`` is there, and null, where the member may be left out."""

    name: str
    type: str
    default: object = msgspec.UNSET


class ObjectVariant(Result, frozen=True):
    """What an object has besides where its tag is ``case``."""

    case: str
    type: str


class AlternateMember(Result, frozen=True):
    """One of the types that a value may be of."""

    type: str


class SchemaInfo(Result, frozen=True, tag_field="meta-type"):
    """An entry."""

    name: str


class Builtin(SchemaInfo, frozen=True, tag="builtin"):
    """A type of JSON."""

    json_type: JsonType


class Enumeration(SchemaInfo, frozen=True, tag="enum"):
    """``values`` says the same as ``members``, for older clients."""

    members: list[EnumMember]
    values: list[str]


class Array(SchemaInfo, frozen=True, tag="array"):
    """Any number of values of a type."""

    element_type: str


class Object(SchemaInfo, frozen=True, tag="object"):
    """``tag`` names the member whose value says which of ``variants`` it is."""

    members: list[ObjectMember]
    tag: str | None = None
    variants: list[ObjectVariant] | None = None


class Alternate(SchemaInfo, frozen=True, tag="alternate"):
    """A value of one of several types."""

    members: list[AlternateMember]


class CommandInfo(SchemaInfo, frozen=True, tag="command"):
    """What a command takes, an object, and what it gives."""

    arg_type: str
    ret_type: str


class EventInfo(SchemaInfo, frozen=True, tag="event"):
    """What an event brings along, an object."""

    arg_type: str


Entry = Builtin | Enumeration | Array | Object | Alternate | CommandInfo | EventInfo

_BUILTIN: Mapping[Any, Builtin] = {
    str: Builtin("str", JsonType.STRING),
    int: Builtin("int", JsonType.INT),
    float: Builtin("number", JsonType.NUMBER),
    bool: Builtin("bool", JsonType.BOOLEAN),
    type(None): Builtin("null", JsonType.NULL),
    object: Builtin("any", JsonType.VALUE),
}


class _Schema:
    """The entries so far, and what the types that have one are called."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._names: dict[object, str] = {}
        self._left: list[Callable[[], Entry]] = []

    def entries(self, commands: Iterable[Command[Any]], events: Mapping[str, type[EventData]]) -> list[Entry]:
        """All of them: commands, events, and every type that one of them refers to, directly or not."""
        first: list[Entry] = [
            CommandInfo(c.name, self._name(c.arguments), self._name(c.returns)) for c in commands
        ]  # fmt: skip
        first += [EventInfo(name, self._name(kind)) for name, kind in events.items()]
        while self._left:
            entry = self._left.pop(0)()
            self._entries[entry.name] = entry
        return [*first, *self._entries.values()]

    def _name(self, kind: Any) -> str:
        """Of a type as an annotation has it; its entry is made by and by."""
        kind = plain(kind)
        if (builtin := _BUILTIN.get(kind)) is not None:
            self._entries.setdefault(builtin.name, builtin)
            return builtin.name
        if get_origin(kind) is list:
            (element,) = get_args(kind)
            name = f"[{self._name(element)}]"
            self._entries.setdefault(name, Array(name, name[1:-1]))
            return name
        key = _Empty if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and _is_empty(kind) else kind
        if key not in self._names:
            self._names[key] = name = str(len(self._names))
            self._left.append(lambda: self._entry(name, kind))
        return self._names[key]

    def _entry(self, name: str, kind: Any) -> Entry:
        origin, arguments = get_origin(kind), get_args(kind)
        if origin is Literal:
            return _enumeration(name, arguments)
        if origin in (Union, types.UnionType):
            if all(isinstance(a, type) and issubclass(a, msgspec.Struct) for a in arguments):
                return self._union(name, arguments)
            return Alternate(name, [AlternateMember(self._name(a)) for a in arguments])
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            return _enumeration(name, [member.value for member in kind])
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            return Object(name, self._members(kind))
        raise TypeError(f"{kind!r} has no form in a QMP schema")

    def _members(self, kind: type[msgspec.Struct]) -> list[ObjectMember]:
        # A result that leaves nothing out has all its members, whatever their defaults.
        whole = issubclass(kind, Result) and not kind.__struct_config__.omit_defaults
        return [
            ObjectMember(f.encode_name, self._name(f.type), msgspec.UNSET if f.required or whole else None)
            for f in msgspec.structs.fields(kind)
        ]

    def _union(self, name: str, kinds: tuple[type[msgspec.Struct], ...]) -> Object:
        """Of structs that a member tells apart: what they share, and what each has of its own."""
        members = {kind: self._members(kind) for kind in kinds}
        common = [m for m in members[kinds[0]] if all(m in members[kind] for kind in kinds)]
        tag = kinds[0].__struct_config__.tag_field
        cases = {kind: str(kind.__struct_config__.tag) for kind in kinds}
        if tag is None or any(kind.__struct_config__.tag_field != tag for kind in kinds):
            raise TypeError(f"no member tells {kinds!r} apart")
        variants = []
        for kind in kinds:
            own = [m for m in members[kind] if m not in common]
            self._names[("variant", kind)] = variant = str(len(self._names))
            self._entries[variant] = Object(variant, own)
            variants.append(ObjectVariant(cases[kind], variant))
        self._names["tags", kinds] = tags = str(len(self._names))
        self._entries[tags] = _enumeration(tags, cases.values())
        return Object(name, [*common, ObjectMember(tag, tags)], tag, variants)


class _Empty:
    """Stands for all structs without members: they are one type."""


def _is_empty(kind: type[msgspec.Struct]) -> bool:
    return not kind.__struct_fields__ and kind.__struct_config__.tag is None


def plain(kind: Any) -> Any:
    """Without bounds and without "may be missing", which its member says."""
    if get_origin(kind) is Annotated:
        return plain(get_args(kind)[0])
    if kind is Any or get_origin(kind) is dict:
        return object  # members of any name: QAPI has no word for that but "any"
    if get_origin(kind) in (Union, types.UnionType):
        left = tuple(plain(a) for a in get_args(kind) if a not in (type(None), msgspec.UnsetType))
        return functools.reduce(lambda a, b: a | b, left)
    return kind


def _enumeration(name: str, values: Iterable[object]) -> Enumeration:
    texts = [str(value) for value in values]
    return Enumeration(name, [EnumMember(text) for text in texts], texts)


def schema(commands: Iterable[Command[Any]], events: Mapping[str, type[EventData]]) -> list[Entry]:
    """The answer to query-qmp-schema. TypeError for a definition that it cannot say."""
    return _Schema().entries(commands, events)


@functools.cache
def _encoded(commands: tuple[Command[Any], ...]) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(schema(commands, dict(sorted(EVENTS.items())))))


@command("query-qmp-schema", arguments=NoArguments, returns=list[Entry])
def query_qmp_schema(ctx: Context, _args: NoArguments) -> msgspec.Raw:
    """What each command takes and gives, and each event brings."""
    return _encoded(tuple(ctx.registry.find(name) for name in ctx.registry.names()))
