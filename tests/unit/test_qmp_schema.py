"""query-qmp-schema against the commands themselves, and the document against both."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from harness.qmp import QmpClient, qmp_host
from harness.qmpschema import Schema
from motorcade.core.qmp import manual, schema
from motorcade.core.qmp.events import EVENTS
from motorcade.core.qmp.registry import Arguments, Command, Empty, NoArguments, Result, registry

DOCUMENT = Path(__file__).parents[2] / "docs" / "qmp.md"


@pytest.fixture
def client(tmp_path: Path) -> Iterator[QmpClient]:
    with qmp_host(tmp_path / "q") as host, host.connect() as client:
        yield client


def test_it_is_whole_and_has_every_command_and_event(client: QmpClient) -> None:
    whole = Schema(client.ask("query-qmp-schema")["return"])
    assert whole.commands.keys() == {c["name"] for c in client.ask("query-commands")["return"]} == {*registry.names()}
    assert whole.events.keys() == {e["name"] for e in client.ask("query-events")["return"]} == EVENTS.keys()


def test_it_describes_itself(client: QmpClient) -> None:
    answer = client.ask("query-qmp-schema")["return"]
    whole = Schema(answer)
    whole.check(answer, whole.commands["query-qmp-schema"]["ret-type"], "schema")


def test_entries_have_qemus_form(client: QmpClient) -> None:
    whole = Schema(client.ask("query-qmp-schema")["return"])
    assert whole.types["str"] == {"name": "str", "meta-type": "builtin", "json-type": "string"}
    stop = whole.commands["stop"]
    assert stop["meta-type"] == "command"
    assert stop["arg-type"] == stop["ret-type"]
    assert whole.types[stop["arg-type"]]["members"] == []
    migrate = whole.types[whole.commands["migrate"]["arg-type"]]
    assert {"name": "uri", "type": "str"} in migrate["members"]  # required
    assert {"name": "detach", "type": "bool", "default": None} in migrate["members"]  # optional
    status = whole.types[whole.commands["query-status"]["ret-type"]]
    values = whole.types[next(m["type"] for m in status["members"] if m["name"] == "status")]
    assert values["meta-type"] == "enum"
    assert {m["name"] for m in values["members"]} == {*values["values"]}
    assert {"prelaunch", "running", "paused", "inmigrate", "postmigrate", "shutdown", "internal-error"} <= {
        *values["values"]
    }
    names = whole.commands["query-commands"]["ret-type"]
    assert whole.types[names] == {"name": names, "meta-type": "array", "element-type": names[1:-1]}


def test_arguments_that_the_schema_knows_are_those_that_are_taken(client: QmpClient) -> None:
    """Each without its required arguments is refused for the first of them, and each argument is known."""
    whole = Schema(client.ask("query-qmp-schema")["return"])
    for name, entry in whole.commands.items():
        members = whole.types[entry["arg-type"]].get("members", [])
        required = [m["name"] for m in members if "default" not in m]
        if required:
            answer = client.ask(name)
            assert answer["error"]["desc"] == f"Parameter '{required[0]}' is missing"
        for member in members:
            # A value of no type that any argument has: refused for that, and not for its name.
            client.send(json.dumps({"execute": name, "arguments": {member["name"]: [[[]]]}}).encode())
            desc = client.read()["error"]["desc"]
            assert "unexpected" not in desc, (name, member)


class Either(Arguments, frozen=True):
    """Something of each kind."""

    value: str | int
    some: list[list[float]] | None = None


class Left(Result, frozen=True, tag_field="side", tag="left"):
    a: int


class Right(Result, frozen=True, tag_field="side", tag="right"):
    a: int
    b: dict[str, int]


def made(arguments: type[Arguments], returns: Any) -> Schema:
    one: Command[Any] = Command("x", lambda _ctx, _args: Empty(), arguments, returns, None)
    return Schema(msgspec.to_builtins(schema.schema([one], {})))


def test_alternates_lists_of_lists_and_variants() -> None:
    whole = made(Either, Left | Right)
    name = whole.commands["x"]["arg-type"]
    whole.check({"value": 1}, name, "")
    whole.check({"value": "1", "some": [[1.5], []]}, name, "")
    for bad in ({"value": True}, {"value": []}, {"some": []}, {"value": 1, "some": [1]}):
        with pytest.raises(AssertionError):
            whole.check(bad, name, "")
    name = whole.commands["x"]["ret-type"]
    whole.check({"side": "left", "a": 1}, name, "")
    whole.check({"side": "right", "a": 1, "b": {"any": "thing"}}, name, "")
    for bad in ({"side": "left", "a": 1, "b": {}}, {"side": "up", "a": 1}, {"side": "right", "a": 1}):
        with pytest.raises(AssertionError):
            whole.check(bad, name, "")


def test_what_qapi_cannot_say_is_refused() -> None:
    with pytest.raises(TypeError, match="has no form"):
        made(NoArguments, bytes)
    with pytest.raises(TypeError, match="tells"):
        made(NoArguments, Empty | Left)


def test_the_document_has_what_the_definitions_say() -> None:
    text = DOCUMENT.read_text()
    assert manual.filled(text) == text, "docs/qmp.md is not up to date: python -m motorcade.core.qmp.manual docs/qmp.md"
