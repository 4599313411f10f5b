"""Where a command line's machine was said, for messages; and how it looks as machine.yaml."""

from __future__ import annotations

import json
import re
from pathlib import Path as FilePath
from typing import Any

from motorcade.orchestrator.cmdline.translate import Path
from motorcade.orchestrator.config import ConfigError, Problem, Source, field_name
from motorcade.orchestrator.yamlpos import Document

_PLAIN = re.compile(r"[A-Za-z/][-_./A-Za-z0-9=]*( [-_./A-Za-z0-9=]+)*")
_ODD = re.compile(r"[\x7f-\xa0\u2028\u2029\ufeff\ufffe\uffff]")  # not printable to YAML (1.2, section 5.1)
_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}


class CommandLine(Source):
    """As a machine.yaml's Source, but what is wrong is an option."""

    def __init__(self, data: dict[str, Any], places: dict[Path, str]) -> None:
        # Nobody reads the file; its folder is where relative paths start, those of QMP's commands, too.
        super().__init__(FilePath.cwd() / "vmmctl run", Document(data, {}))
        self._places = places

    another_name = "-name gives this one another"

    def called(self, path: Path) -> str:
        """See Source."""
        return self._places.get(path) or field_name(path)

    def problem(self, path: Path, message: str) -> None:
        """Notes that what the value at ``path`` was made of is wrong."""
        at = path
        while at and at not in self._places:
            at = at[:-1]
        rest = field_name(path[len(at) :])
        where = self._places.get(at) or field_name(path)
        self.problems.append(Problem(where, rest if at else "", message))

    def raise_problems(self) -> None:
        """See Source."""
        if self.problems:
            raise ConfigError(self.problems)


def yaml(data: dict[str, Any]) -> str:
    """The text of a machine.yaml that says this. Lists have an entry a line."""
    lines = []
    for key, value in data.items():
        if isinstance(value, list):
            lines += [f"{key}:", *(f"  - {_flow(entry)}" for entry in value)]
        elif isinstance(value, dict):
            lines += [f"{key}:", *(f"  {name}: {_flow(part)}" for name, part in value.items())]
        else:
            lines.append(f"{key}: {_flow(value)}")
    return "\n".join(lines) + "\n"


def _flow(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, str) and (value.lower() in _WORDS or not _PLAIN.fullmatch(value)):
        return _ODD.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(value, ensure_ascii=False))
    return value if isinstance(value, str) else json.dumps(value)
