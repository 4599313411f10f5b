"""How a QMP command is defined: one typed definition, from which its checks and its description follow."""

from __future__ import annotations

import enum
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar, get_args

import msgspec

from motorcade.core.qmp.descriptors import Named, Received
from motorcade.core.qmp.errors import CommandNotFound, QmpError
from motorcade.core.qmp.machine import MachineControl, RunState


class Arguments(msgspec.Struct, forbid_unknown_fields=True, rename="kebab", frozen=True):
    """Base of a command's arguments; a field ``node_name`` is the argument ``node-name``."""


class NoArguments(Arguments, frozen=True):
    """Of a command that takes none."""


class Result(msgspec.Struct, rename="kebab", frozen=True, omit_defaults=True):
    """Base of what a command returns; a field that equals its default (None, say) is left out."""


class Empty(Result, frozen=True):
    """The answer ``{}``."""


class Deferred:
    """Returned by a command whose answer comes later; the client's next command waits for it."""

    def __init__(self) -> None:
        self._outcome: object | QmpError = None
        self._done = False
        self._callback: Callable[[object | QmpError], None] | None = None

    def finish(self, outcome: object | QmpError) -> None:
        """Answers with a result, or with an error. Once, on the core's main thread."""
        if self._done:
            raise RuntimeError("this command has been answered already")
        self._outcome = outcome
        self._done = True
        if self._callback is not None:
            self._callback(outcome)

    def on_done(self, callback: Callable[[object | QmpError], None]) -> None:
        """Has ``callback`` called with the outcome, at once where there is one. For the server."""
        self._callback = callback
        if self._done:
            callback(self._outcome)


@dataclass(frozen=True, slots=True)
class Then:
    """Returned by a command whose effect must come after its answer has been queued (``quit``)."""

    value: object
    action: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Context:
    """What a handler works on."""

    machine: MachineControl
    registry: Registry
    capabilities: set[str] = field(default_factory=set)
    """Of migration, which are the machine's and not the connection's."""
    descriptors: Named = field(default_factory=Named)
    received: Received = field(default_factory=Received)
    """What came with the request: this alone is the connection's."""
    now: Callable[[], float] = time.monotonic


_A = TypeVar("_A", bound=Arguments)
Handler: TypeAlias = Callable[[Context, _A], object]


@dataclass(frozen=True, slots=True)
class Command(Generic[_A]):
    """A definition. ``states``: where it is legal, None for everywhere. ``returns``: the type of its answer."""

    name: str
    handler: Handler[_A]
    arguments: type[_A]
    returns: Any
    states: frozenset[RunState] | None

    def call(self, context: Context, raw_arguments: msgspec.Raw | None) -> object:
        """Checks and runs it. Raises QmpError."""
        arguments = self._convert(raw_arguments)
        state = context.machine.run_state
        if self.states is not None and state not in self.states:
            raise QmpError(f"The command {self.name} is not permitted while the machine is in state '{state.value}'")
        return self.handler(context, arguments)

    def _convert(self, raw: msgspec.Raw | None) -> _A:
        try:
            given = msgspec.json.decode(raw or b"{}", type=dict[str, msgspec.Raw])
        except msgspec.ValidationError:
            raise QmpError("QMP input member 'arguments' must be an object") from None
        fields = {f.encode_name: f for f in msgspec.structs.fields(self.arguments)}
        for name in given:
            if name not in fields:
                raise QmpError(f"Parameter '{name}' is unexpected")
        for name, info in fields.items():
            if info.required and name not in given:
                raise QmpError(f"Parameter '{name}' is missing")
        try:
            return msgspec.json.decode(raw or b"{}", type=self.arguments)
        except msgspec.ValidationError as e:
            raise QmpError(_parameter_error(str(e), self.arguments)) from None


def _parameter_error(text: str, arguments: type[Arguments]) -> str:
    """msgspec's ``Expected `str`, got `int` - at `$.x``` in QMP's words."""
    match = re.fullmatch(r"(?P<what>.*) - at `\$\.?(?P<path>.*)`", text, re.DOTALL)
    if match is None:
        return f"Invalid parameters: {text}"
    what = match["what"].replace("`", "")
    if what.startswith("Invalid enum value") and (choices := _choices(arguments, match["path"])):
        what += f"; it can be: {', '.join(choices)}"
    return f"Invalid parameter '{match['path']}': {what}"


def _choices(kind: Any, path: str) -> list[str]:
    """The values that the enumeration at msgspec's ``path`` in the arguments has; none where it is not to be found."""
    for step in re.findall(r"[^.\[]+|\[[^\]]*\]", path):
        # Bounds, and what may be None, are of no interest here.
        kinds = [k for k in (get_args(kind) or (kind,)) if k is not type(None)]
        kind = kinds[0]
        if step.startswith("["):
            continue
        fields = msgspec.structs.fields(kind) if hasattr(kind, "__struct_fields__") else ()
        kind = next((f.type for f in fields if f.encode_name == step), None)
    kinds = [k for k in (get_args(kind) or (kind,)) if k is not type(None)]
    if len(kinds) == 1 and isinstance(kinds[0], type) and issubclass(kinds[0], enum.Enum):
        return [str(member.value) for member in kinds[0]]
    return [k for k in kinds if isinstance(k, str)]  # of a Literal


class Registry:
    """The commands by name."""

    def __init__(self) -> None:
        self._commands: dict[str, Command[Any]] = {}

    def command(
        self,
        name: str,
        *,
        arguments: type[_A],
        returns: Any = Empty,
        states: Iterable[RunState] | None = None,
    ) -> Callable[[Handler[_A]], Handler[_A]]:
        """Defines a command: the decorated function gets a Context and the checked arguments.

        It returns the answer (of type ``returns``), a Deferred or a Then, and raises QmpError.
        """

        def define(handler: Handler[_A]) -> Handler[_A]:
            if name in self._commands:
                raise ValueError(f"{name} is defined twice")
            where = None if states is None else frozenset(states)
            self._commands[name] = Command(name, handler, arguments, returns, where)
            return handler

        return define

    def find(self, name: str) -> Command[Any]:
        """The command ``name``. Raises CommandNotFound."""
        try:
            return self._commands[name]
        except KeyError:
            raise CommandNotFound(f"The command {name} has not been found") from None

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._commands)


registry = Registry()
"""The commands of the core."""
command = registry.command
