"""Snapshots by QMP: QEMU's commands for migration and ours, and what query-migrate says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.qmp import QmpClient, QmpError, QmpHost, qmp_host
from motorcade.core.qmp.machine import RunState
from motorcade.core.snapshot.plan import Plan, Report, Status


@pytest.fixture
def host(tmp_path: Path) -> Iterator[QmpHost]:
    with qmp_host(tmp_path / "qmp.sock") as host:
        yield host


@pytest.fixture
def client(host: QmpHost) -> Iterator[QmpClient]:
    with host.connect() as client:
        assert client.ask("qmp_capabilities") == {"return": {}}
        yield client


def capabilities(client: QmpClient, **states: bool) -> Any:
    wishes = [{"capability": name.replace("_", "-"), "state": state} for name, state in states.items()]
    return client.ask("migrate-set-capabilities", capabilities=wishes)


@pytest.mark.parametrize(
    ("command", "arguments", "plan"),
    [
        ("migrate", {"uri": "file:/t"}, Plan("file:/t")),
        ("migrate", {"uri": "file:/t", "blk": True, "inc": True, "detach": True}, Plan("file:/t")),
        ("x-motorcade-snapshot", {"dir": "/t"}, Plan("file:/t")),
        ("x-motorcade-snapshot", {"dir": "/t", "base": "/b", "live": True}, Plan("file:/t", base="/b", live=True)),
        ("x-motorcade-save", {"file": "/f"}, Plan("file:/f", what="save", rest=True)),
        ("x-motorcade-save", {"file": "/f", "leave-running": True}, Plan("file:/f", what="save")),
    ],
)
def test_what_is_to_be_taken(
    host: QmpHost, client: QmpClient, command: str, arguments: dict[str, Any], plan: Plan
) -> None:
    assert client.ask(command, **arguments)["event"] == "MIGRATION"
    assert client.read() == {"return": {}}
    assert host.machine.plans == [plan]


def test_capabilities_choose(host: QmpHost, client: QmpClient) -> None:
    names = {c["capability"] for c in client.ask("query-migrate-capabilities")["return"]}
    assert names == {"events", "x-ignore-shared", "x-motorcade-live"}
    assert capabilities(client, x_motorcade_live=True) == {"return": {}}
    client.ask("migrate", uri="file:/a")
    client.read()
    assert capabilities(client, x_ignore_shared=True, events=True) == {"return": {}}
    for uri in ("exec:cat > /x", "file:/b"):
        client.ask("migrate", uri=uri)
        client.read()
    assert host.machine.plans == [
        Plan("file:/a", live=True),
        *(Plan(uri, what="state", rest=True) for uri in ("exec:cat > /x", "file:/b")),
    ]
    with host.connect() as other:  # they are the machine's
        found = other.ask("query-migrate-capabilities")["return"]
        assert all(c["state"] for c in found)


@pytest.mark.parametrize(
    ("command", "arguments", "desc"),
    [
        ("migrate", {"uri": "tcp:host:4444"}, "is no place for a snapshot"),
        ("migrate", {"uri": "/t"}, "is no place for a snapshot"),
        ("migrate", {"uri": "file:"}, "is no place for a snapshot"),
        ("migrate", {"uri": "exec:cat"}, "capability x-ignore-shared"),
        ("migrate", {"uri": "fd:x"}, "capability x-ignore-shared"),
        ("migrate", {}, "Parameter 'uri' is missing"),
        ("x-motorcade-snapshot", {"dir": "t"}, "Parameter 'dir' must be an absolute path"),
        ("x-motorcade-snapshot", {"dir": "/t", "base": "b"}, "Parameter 'base' must be an absolute path"),
        ("x-motorcade-save", {"file": "f"}, "Parameter 'file' must be an absolute path"),
        ("migrate-set-capabilities", {"capabilities": [{"capability": "zero", "state": True}]}, "'zero'; it can be: e"),
        ("migrate-set-capabilities", {"capabilities": [{"capability": "events"}]}, "missing required field"),
    ],
)
def test_what_cannot_be(host: QmpHost, client: QmpClient, command: str, arguments: dict[str, Any], desc: str) -> None:
    assert desc in client.ask(command, **arguments)["error"]["desc"]
    assert host.machine.plans == []


def test_a_bad_capability_changes_none(client: QmpClient) -> None:
    assert "error" in capabilities(client, events=True, nonsense=True)
    assert not any(c["state"] for c in client.ask("query-migrate-capabilities")["return"])


def test_a_machine_that_has_not_been_restored_cannot_be_frozen(host: QmpHost, client: QmpClient) -> None:
    host.machine.run_state = RunState.INMIGRATE
    for command, arguments in (("migrate", {"uri": "file:/t"}), ("x-motorcade-snapshot", {"dir": "/t"})):
        assert "state 'inmigrate'" in client.ask(command, **arguments)["error"]["desc"]


def test_the_machines_refusal_is_the_answer(host: QmpHost, client: QmpClient) -> None:
    host.machine.failure = QmpError("a snapshot is being taken already")
    assert client.ask("migrate", uri="file:/t")["error"]["desc"] == "a snapshot is being taken already"


@pytest.mark.parametrize("name", ["migrate_cancel", "migrate-cancel"])
def test_cancel(host: QmpHost, client: QmpClient, name: str) -> None:
    assert client.ask(name) == {"return": {}}
    assert host.machine.done == ["cancel"]


@pytest.mark.parametrize(
    ("report", "answer"),
    [
        (Report(), {"status": "none"}),
        (
            Report(Status.COMPLETED, started=1.0, active=1.25, ended=3.5, downtime=0.125, ram_total=9, transferred=5),
            {
                "status": "completed",
                "ram": {"total": 9, "transferred": 5, "remaining": 0},
                "total-time": 2500,
                "setup-time": 250,
                "downtime": 125,
            },
        ),
        (
            Report(Status.FAILED, "no space left", started=1.0, ended=1.5, ram_total=9, ram_remaining=9),
            {
                "status": "failed",
                "error-desc": "no space left",
                "ram": {"total": 9, "transferred": 0, "remaining": 9},
                "total-time": 500,
                "setup-time": 500,
            },
        ),
    ],
)
def test_query_migrate(host: QmpHost, client: QmpClient, report: Report, answer: dict[str, Any]) -> None:
    host.machine.snapshot_report = report
    assert client.ask("query-migrate") == {"return": answer}


def test_query_migrate_meanwhile(host: QmpHost, client: QmpClient) -> None:
    host.machine.snapshot_report = Report(Status.ACTIVE, started=1.0, active=1.25, ram_total=9, ram_remaining=4)
    answer = client.ask("query-migrate")["return"]
    assert (answer["status"], answer["setup-time"]) == ("active", 250)
    assert answer["total-time"] > 1000
    assert "downtime" not in answer
    assert "cannot be changed" in capabilities(client, events=True)["error"]["desc"]


def test_migrate_incoming_answers_when_the_template_is_there(host: QmpHost, client: QmpClient) -> None:
    client.send(b'{"execute": "migrate-incoming", "arguments": {"uri": "file:/t"}, "id": 1}')
    with host.connect() as other:
        assert other.ask("query-status")["return"]["status"] == "running"
    uri, done = host.machine.incoming.pop()
    assert uri == "file:/t"
    host.call(lambda: done(None))
    assert client.read() == {"return": {}, "id": 1}
    client.send(b'{"execute": "migrate-incoming", "arguments": {"uri": "file:/u"}}')
    client.sock.sendall(b'{"execute": "query-name"}')
    with host.connect() as other:
        other.ask("query-name")
    _, done = host.machine.incoming.pop()
    host.call(lambda: done(QmpError("there is no such template")))
    assert client.read()["error"]["desc"] == "there is no such template"
    assert client.read() == {"return": {"name": "fake"}}
