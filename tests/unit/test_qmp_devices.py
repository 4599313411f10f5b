"""Dumps, states of devices, and descriptors in their places, by QMP."""

from __future__ import annotations

import contextlib
import json
import os
import socket
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


def send(client: QmpClient, command: str, **arguments: object) -> None:
    client.send(json.dumps({"execute": command, "arguments": arguments}).encode())


def busy(host: QmpHost, client: QmpClient) -> None:
    """Another client is answered; then what this one asked has been heard."""
    with host.connect() as other:
        other.ask("query-name")


def end(host: QmpHost, report: Report) -> None:
    """Of the snapshot that began last."""
    then = host.machine.thens.pop()
    assert then is not None
    host.call(lambda: then(report))


@contextlib.contextmanager
def named(client: QmpClient, name: str) -> Iterator[int]:
    """The reading end of a pipe whose writing end has this name."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        request = {"execute": "getfd", "arguments": {"fdname": name}}
        socket.send_fds(client.sock, [json.dumps(request).encode()], [writer])
        os.close(writer)
        assert client.read() == {"return": {}}
        yield reader
    finally:
        os.close(reader)


DUMP = ("dump-guest-memory", {"protocol": "file:/d", "paging": False}, Plan("file:/d", what="dump"))
COMMANDS = [
    DUMP,
    ("save-devices-state", {"filename": "/d"}, Plan("file:/d", what="devices")),
    ("save-devices-state", {"filename": "./a:b"}, Plan("file:./a:b", what="devices")),
    ("xen-save-devices-state", {"filename": "/d", "live": False}, Plan("file:/d", what="devices")),
]


@pytest.mark.parametrize(("command", "arguments", "plan"), COMMANDS)
def test_the_answer_comes_at_the_end(
    host: QmpHost, client: QmpClient, command: str, arguments: dict[str, Any], plan: Plan
) -> None:
    send(client, command, **arguments)
    busy(host, client)
    assert host.machine.plans == [plan]
    end(host, Report(Status.COMPLETED))
    assert client.read() == {"return": {}}
    send(client, command, **arguments)
    busy(host, client)
    end(host, Report(Status.FAILED, "no space left"))
    assert client.read()["error"]["desc"] == "no space left"
    send(client, command, **arguments)
    busy(host, client)
    end(host, Report(Status.CANCELLED))
    assert client.read()["error"]["desc"] == "it was cancelled"


def test_a_detached_dump_is_asked_after(host: QmpHost, client: QmpClient) -> None:
    assert client.ask("query-dump") == {"return": {"status": "none", "completed": 0, "total": 0}}
    assert client.ask("dump-guest-memory", protocol="file:/d", paging=False, detach=True) == {"return": {}}
    host.machine.dump_report = Report(Status.ACTIVE, ram_total=9, ram_remaining=4)
    assert client.ask("query-dump") == {"return": {"status": "active", "completed": 5, "total": 9}}
    host.machine.dump_report = Report(Status.CANCELLED, ram_total=9, ram_remaining=4)
    assert client.ask("query-dump")["return"]["status"] == "failed"
    assert client.ask("query-dump-guest-memory-capability") == {"return": {"formats": ["elf"]}}


@pytest.mark.parametrize(
    ("command", "arguments", "desc"),
    [
        ("dump-guest-memory", {"protocol": "/d", "paging": False}, "no place for a dump"),
        ("dump-guest-memory", {"protocol": "file:", "paging": False}, "no place for a dump"),
        ("dump-guest-memory", {"protocol": "file:/d", "paging": True}, "'paging' must be false"),
        ("dump-guest-memory", {"protocol": "file:/d", "paging": False, "begin": 0}, "not supported"),
        ("dump-guest-memory", {"protocol": "file:/d", "paging": False, "length": 1}, "not supported"),
        ("dump-guest-memory", {"protocol": "file:/d", "paging": False, "format": "kdump-zlib"}, "it can be: elf"),
        ("dump-guest-memory", {"protocol": "file:/d"}, "Parameter 'paging' is missing"),
        ("save-devices-state", {"filename": "tcp:x"}, "must begin with / or ./"),
        ("xen-load-devices-state", {"filename": "exec:cat"}, "must begin with / or ./"),
        ("save-devices-state", {"filename": "fd:x"}, "named 'x' not found"),
        ("load-devices-state", {"filename": "fd:x"}, "named 'x' not found"),
        ("dump-guest-memory", {"protocol": "fd:x", "paging": False}, "named 'x' not found"),
    ],
)
def test_what_cannot_be(host: QmpHost, client: QmpClient, command: str, arguments: dict[str, Any], desc: str) -> None:
    host.machine.run_state = RunState.PAUSED
    assert desc in client.ask(command, **arguments)["error"]["desc"]
    assert host.machine.plans == []
    assert host.machine.incoming == []


def test_a_state_is_loaded_into_a_machine_that_is_stopped(host: QmpHost, client: QmpClient) -> None:
    assert "state 'running'" in client.ask("load-devices-state", filename="/d")["error"]["desc"]
    host.machine.run_state = RunState.PAUSED
    for name in ("load-devices-state", "xen-load-devices-state"):
        send(client, name, filename="/d")
        busy(host, client)
        uri, done = host.machine.incoming.pop()
        assert uri == "file:/d"
        host.call(lambda done=done: done(QmpError("it is another machine's")))  # type: ignore[misc]
        assert client.read()["error"]["desc"] == "it is another machine's"


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("migrate", {"uri": "fd:x"}),
        ("save-devices-state", {"filename": "fd:x"}),
        ("load-devices-state", {"filename": "fd:x"}),
        ("migrate-incoming", {"uri": "fd:x"}),
        ("dump-guest-memory", {"protocol": "fd:x", "paging": False}),
    ],
)
def test_a_named_descriptor_is_used_up(
    host: QmpHost, client: QmpClient, command: str, arguments: dict[str, Any]
) -> None:
    """The machine gets it, or it is closed; the name is free in every case."""
    host.machine.run_state = RunState.PAUSED
    client.ask("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])
    with named(client, "x") as reader:
        send(client, command, **arguments)
        busy(host, client)
        os.write(host.machine.taken[0], b"here")
        os.close(host.machine.taken.pop())
        assert os.read(reader, 9) == b"here"
    with host.connect() as other:
        assert "not found" in other.ask("closefd", fdname="x")["error"]["desc"]
        if command == "migrate-incoming":
            return
        host.machine.failure = QmpError("not now")
        with named(other, "x") as reader:
            assert other.ask(command, **arguments)["error"]["desc"] == "not now"
            assert os.read(reader, 9) == b""
