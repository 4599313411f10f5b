"""The tables of commands and events in docs/qmp.md, from their definitions.

    python -m motorcade.core.qmp.manual docs/qmp.md     puts them there, between their marks
"""

from __future__ import annotations

import enum
import re
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec

from motorcade.core.qmp import server  # noqa: F401  (defines the commands)
from motorcade.core.qmp.events import EVENTS
from motorcade.core.qmp.machine import RunState
from motorcade.core.qmp.registry import Command, registry
from motorcade.core.qmp.schema import plain

_MARKED = "<!-- {0}: made by python -m motorcade.core.qmp.manual -->\n{1}<!-- end of {0} -->"


def filled(text: str) -> str:
    """``text`` with its tables as they should be. ValueError where a mark is missing."""
    for name, table in (("commands", commands()), ("events", events())):
        pattern = re.escape(_MARKED).replace(r"\{0\}", name).replace(r"\{1\}", ".*?")
        new = _MARKED.format(name, table)
        text, found = re.subn(pattern, lambda _match, new=new: new, text, flags=re.DOTALL)  # type: ignore[misc]
        if found != 1:
            raise ValueError(f"{found} places are marked for {name}")
    return text


def commands() -> str:
    """All commands as a Markdown table."""
    rows = ["| command | arguments | what it does |\n| --- | --- | --- |\n"]
    for name in registry.names():
        one = registry.find(name)
        rows.append(f"| `{name}` | {_members(one.arguments)} | {_what(one)} |\n")
    return "".join(rows)


def events() -> str:
    """All events as a Markdown table."""
    rows = ["| event | data | when |\n| --- | --- | --- |\n"]
    for name, kind in sorted(EVENTS.items()):
        rows.append(f"| `{name}` | {_members(kind)} | {_first_line(kind.__doc__)} |\n")
    return "".join(rows)


def _what(one: Command[Any]) -> str:
    # That a machine which is over takes no orders goes without saying.
    there = {*RunState} - {RunState.SHUTDOWN, RunState.INTERNAL_ERROR}
    refused = sorted(there - one.states) if one.states is not None else []
    where = f" Not while {', '.join(f'`{state}`' for state in refused)}." if refused else ""
    return _first_line(one.handler.__doc__) + where


def _first_line(text: str | None) -> str:
    lines = (text or "").strip().split("\n\n")[0].split("\n")
    return " ".join(line.strip() for line in lines).replace("``", "`").replace("|", "\\|")


def _members(kind: type[msgspec.Struct]) -> str:
    return ", ".join(
        f"`{f.encode_name}{'' if f.required else '?'}` {_type(f.type)}" for f in msgspec.structs.fields(kind)
    )


def _type(kind: Any) -> str:
    kind = plain(kind)
    names = {str: "text", int: "integer", float: "number", bool: "true or false", object: "anything"}
    if kind in names:
        return names[kind]
    if get_origin(kind) is list:
        return f"list of {_type(get_args(kind)[0])}"
    if get_origin(kind) is Literal:
        return " \\| ".join(f"`{value}`" for value in get_args(kind))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return " \\| ".join(f"`{member.value}`" for member in kind)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return "{" + _members(kind) + "}"
    return " or ".join(_type(a) for a in get_args(kind))


def main(path: str) -> None:
    """Puts the tables into the file."""
    file = Path(path)
    file.write_text(filled(file.read_text()))


if __name__ == "__main__":
    main(*sys.argv[1:])
