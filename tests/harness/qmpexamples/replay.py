"""Replaying groups of examples to one VM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from harness.qmpexamples import GROUPS
from harness.qmpexamples.example import Event, Example, Group, Place, unlike
from harness.qmpexamples.speakers import SPEAKERS, Refused, Speaker, opened
from harness.qmpschema import Schema
from harness.vm import VmHost


def replay_all(host: VmHost, folder: Path, machine: dict[str, Any], guest: str, speaker: str) -> list[str]:
    """Every group for this kind of ``guest``, on VMs of ``machine`` and what the groups need; the commands replayed.

    ``speaker`` is a name of SPEAKERS.
    """
    groups = [group for group in GROUPS if guest in group.guests]
    for group in groups:
        machine = _merged(machine, group.machine(folder))
    shared: Place | None = None
    done: list[str] = []
    for group in groups:
        if group.start is not None:
            start = {k: v(folder) if callable(v) else v for k, v in group.start.items()}
            place = Place(folder, host.start({**machine, "name": group.name}, **start))
        else:
            shared = place = shared or Place(folder, host.start(machine))
        done += _replay(group, place, speaker)
    return done


def _merged(machine: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    merged = dict(machine)
    for key, value in more.items():
        merged[key] = [*merged.get(key, []), *value] if isinstance(value, list) else value
    return merged


def _replay(group: Group, place: Place, speaker: str) -> Iterator[str]:
    group.prepare(place)
    client = SPEAKERS[speaker](place.vm.run_dir / "qmp.sock")
    try:
        schema = Schema(client.ask("query-qmp-schema", {}, None))
        for n, example in enumerate(group.examples):
            where = f"{group.name} {n}: {example.command}"
            try:
                _one(example, place, client, schema)
            except Exception as e:
                raise AssertionError(f"{where}: {e}") from e
            yield example.command
    finally:
        client.close()


def _one(example: Example, place: Place, client: Speaker, schema: Schema) -> None:
    arguments = example.arguments(place) if callable(example.arguments) else example.arguments
    if not example.error:
        schema.check(arguments, schema.commands[example.command]["arg-type"], "arguments")
    client.events.clear()
    bad = ""
    with opened(example.fd(place) if example.fd else None) as fd:
        try:
            answer = client.ask(example.command, arguments, fd)
        except Refused as e:
            assert e.error_class == example.error, f"refused: {e}"
            assert example.desc in e.desc, e.desc
        else:
            assert not example.error, f"it was not refused: {answer!r}"
            bad = unlike(answer, example.answer)
            schema.check(answer, schema.commands[example.command]["ret-type"], "answer")
    assert not bad, bad
    _compare(list(client.events)[: len(example.events)], example.events)
    if client.exact:
        extra = [e["event"] for e in list(client.events)[len(example.events) :]]
        assert not extra, f"events before the answer that the example has not: {extra}"
    for event in client.events:
        schema.check(event.get("data", {}), schema.events[event["event"]]["arg-type"], event["event"])
    for _ in example.events:
        client.events.popleft()
    for wanted in example.after:
        while (event := client.event())["event"] != wanted[0] or unlike(event.get("data"), wanted[1]):
            assert event["event"] == wanted[0], f"{event} instead of {wanted}"


def _compare(seen: Sequence[dict[str, Any]], wanted: Sequence[Event]) -> None:
    names = [event["event"] for event in seen]
    assert names == [name for name, _ in wanted], f"events before the answer: {names}"
    for event, (name, shape) in zip(seen, wanted, strict=True):
        bad = unlike(event.get("data"), shape, name)
        assert not bad, bad
