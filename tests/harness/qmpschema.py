"""What a server says of itself (query-qmp-schema), and whether what it answers is so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Entry = Mapping[str, Any]
_JSON = {"string": str, "int": int, "number": (int, float), "boolean": bool, "null": type(None)}


class Schema:
    """A schema that is whole: every type that is referred to is there, and none twice. AssertionError otherwise."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.commands = {e["name"]: e for e in entries if e["meta-type"] == "command"}
        self.events = {e["name"]: e for e in entries if e["meta-type"] == "event"}
        types = [e for e in entries if e["meta-type"] not in ("command", "event")]
        self.types = {e["name"]: e for e in types}
        assert len(self.types) == len(types), "a type is there twice"
        assert len(self.commands) + len(self.events) + len(types) == len(entries), "a command or event is there twice"
        named = [name for entry in entries for name in self._names(entry)]
        assert set(named) <= self.types.keys(), f"types that are not there: {set(named) - self.types.keys()}"
        assert set(named) == self.types.keys(), f"types that nobody names: {self.types.keys() - set(named)}"

    @staticmethod
    def _names(entry: Entry) -> list[str]:
        names = [entry[key] for key in ("arg-type", "ret-type", "element-type") if key in entry]
        if entry["meta-type"] in ("object", "alternate"):
            names += [member["type"] for member in entry["members"]]
        return names + [variant["type"] for variant in entry.get("variants", ())]

    def check(self, value: Any, name: str, where: str) -> None:
        """AssertionError where ``value`` is not of the type ``name``."""
        entry = self.types[name]
        kind = entry["meta-type"]
        if kind == "builtin":
            wanted = _JSON.get(entry["json-type"], object)
            assert isinstance(value, wanted), f"{where}: {value!r} is no {name}"  # type: ignore[arg-type]
            assert name == "bool" or name == "any" or not isinstance(value, bool), f"{where}: {value!r} is no {name}"
        elif kind == "enum":
            assert value in entry["values"], f"{where}: {value!r} is none of {entry['values']}"
        elif kind == "array":
            assert isinstance(value, list), f"{where}: {value!r} is no list"
            for n, element in enumerate(value):
                self.check(element, entry["element-type"], f"{where}[{n}]")
        elif kind == "alternate":
            assert any(self._fits(value, member["type"]) for member in entry["members"]), f"{where}: {value!r}"
        else:
            self._check_object(value, entry, where)

    def _fits(self, value: Any, name: str) -> bool:
        try:
            self.check(value, name, "")
        except AssertionError:
            return False
        return True

    def _check_object(self, value: Any, entry: Entry, where: str) -> None:
        assert isinstance(value, dict), f"{where}: {value!r} is no object"
        members = list(entry["members"])
        if "tag" in entry:
            case = value[entry["tag"]]
            variant = next((v["type"] for v in entry["variants"] if v["case"] == case), None)
            members += self.types[variant]["members"] if variant is not None else []
        known = {member["name"]: member for member in members}
        assert not value.keys() - known.keys(), f"{where}: unknown members {value.keys() - known.keys()}"
        for name, member in known.items():
            if name in value:
                self.check(value[name], member["type"], f"{where}.{name}")
            else:
                assert "default" in member, f"{where}: lacks {name}"
