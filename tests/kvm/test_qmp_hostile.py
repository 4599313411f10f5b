"""A live machine whose QMP clients send whatever the schema lets them, and what it does not."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.qmp import QmpClient
from harness.qmpschema import Schema
from harness.vm import VmHost, vm_host
from harness.wholevm import hear

pytestmark = pytest.mark.kvm
PLACES = ("", "fd:none", "file:", "file:/nowhere/at/all", "/nowhere/at/all", "file:/\0")
TEXTS = (*PLACES, "%s%n", "é\U0001f600", "/" + "x" * 70_000)
NUMBERS = (0, -1, 1, 2**31, 2**63 - 1, -(2**63), 2**64, 10**30)
OTHER = (None, [], {}, 1.5, [[]], {"": {}})
ENDS = {"quit"}


@pytest.fixture
def host(tmp_path: Path) -> Iterator[VmHost]:
    with vm_host(tmp_path) as h:
        yield h


def values(schema: Schema, name: str) -> list[Any]:
    """Some of a type, and some that are not."""
    entry = schema.types[name]
    if name == "str":
        return [*TEXTS, 0, None]
    if name == "int":
        return [*NUMBERS, "0", 1.5]
    if name == "bool":
        return [True, False, 0, "yes"]
    if entry["meta-type"] == "enum":
        return [*entry["values"], "nonsense", None]
    if entry["meta-type"] == "array":
        return [[], {}, *([v] for v in values(schema, entry["element-type"])), [None] * 1000]
    if entry["meta-type"] == "object":
        return [{}, [], *objects(schema, name)]
    return list(OTHER)


def objects(schema: Schema, name: str) -> list[dict[str, Any]]:
    """As many as the member with the most values has; each member goes round its own."""
    members = {m["name"]: values(schema, m["type"]) for m in schema.types[name]["members"]}
    rounds = max((len(v) for v in members.values()), default=0)
    wholes = [{m: v[n % len(v)] for m, v in members.items()} for n in range(rounds)]
    required = {m["name"] for m in schema.types[name]["members"] if "default" not in m}
    return wholes + [{m: v for m, v in whole.items() if m in required} for whole in wholes]


def test_whatever_the_arguments_the_answer_is_one_and_the_machine_lives(
    host: VmHost, guest: Path, tmp_path: Path
) -> None:
    """Each command with values of its arguments' types and of others: an answer as the schema says, or an error that is
    no failure of ours."""
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    disk = {"id": "vda", "path": str(tmp_path / "disk.img")}
    kernel = {"image": str(guest), "cmdline": "serve=0:0"}
    vm = host.start({"name": "hostile", "memory": "32M", "kernel": kernel, "disks": [disk]})
    with QmpClient(str(vm.run_dir / "qmp.sock")) as client:
        client.read()
        schema = Schema(client.ask("query-qmp-schema")["return"])
        sent = 0
        for name, entry in sorted(schema.commands.items()):
            if name in ENDS:
                continue
            for arguments in itertools.chain([{}], objects(schema, entry["arg-type"])):
                client.send(json.dumps({"execute": name, "arguments": arguments, "id": name}).encode())
                while "event" in (answer := client.read()):
                    pass
                sent += 1
                assert answer["id"] == name
                if "return" in answer:
                    schema.check(answer["return"], entry["ret-type"], name)
                else:
                    assert not answer["error"]["desc"].startswith("internal error"), (name, arguments, answer)
        assert sent > 300
        client.send(b'{"execute":"cont"}{"execute":"query-status","id":1}')
        while (answer := client.read()).get("id") != 1:
            pass
        assert answer["return"]["status"] == "running"
    with vm.attach() as uart:
        uart.sendall(b"?")
        hear(uart, b"pong")


def test_a_thousand_orders_at_once_are_carried_out_in_their_order(host: VmHost, guest: Path, tmp_path: Path) -> None:
    kernel = {"image": str(guest), "cmdline": "serve=0:0"}
    vm = host.start({"name": "pipelined", "memory": "32M", "kernel": kernel})
    with QmpClient(str(vm.run_dir / "qmp.sock")) as client:
        client.read()
        client.send(b'{"execute":"stop"}{"execute":"query-status"}{"execute":"cont"}{"execute":"query-status"}' * 250)
        for _ in range(250):
            assert client.read()["event"] == "STOP"
            assert client.read() == {"return": {}}
            assert client.read()["return"]["status"] == "paused"
            assert client.read()["event"] == "RESUME"
            assert client.read() == {"return": {}}
            assert client.read()["return"]["status"] == "running"
    with vm.attach() as uart:
        uart.sendall(b"?")
        hear(uart, b"pong")


@pytest.mark.parametrize("command", ["stop", "cont", "system_reset", "migrate", "query-vcpu-reg", "save-devices-state"])
def test_a_machine_that_waits_for_its_template_says_so(
    host: VmHost, guest: Path, tmp_path: Path, command: str
) -> None:
    arguments = {
        "migrate": {"uri": f"file:{tmp_path / 't'}"},
        "query-vcpu-reg": {"addr": "rip", "vcpu": 0},
        "save-devices-state": {"filename": str(tmp_path / "d")},
    }.get(command, {})
    kernel = {"image": str(guest), "cmdline": "serve=0:0"}
    vm = host.start({"name": "waiting", "memory": "32M", "kernel": kernel}, defer=True)
    with QmpClient(str(vm.run_dir / "qmp.sock")) as client:
        client.read()
        answer = client.ask(command, **arguments)
        assert answer["error"]["class"] == "GenericError"
        assert "waits for its template" in answer["error"]["desc"] or "'inmigrate'" in answer["error"]["desc"]
        assert client.ask("query-status")["return"]["status"] == "inmigrate"
