"""The QMP server over real sockets: wire rules, order of events and answers, slow and rude clients."""

from __future__ import annotations

import contextlib
import json
import logging
import resource
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.qmp import QmpClient, QmpHost, qmp_host
from motorcade import __version__
from motorcade.core.qmp import client as client_module
from motorcade.core.qmp.events import EVENTS
from motorcade.core.qmp.machine import RunState
from motorcade.core.qmp.registry import registry

PIECES = [
    b'{"execute": "stop"}',
    b'{"execute": "quit", "id": [1]}',
    b'{"execute": "x-motorcade-sidecar-stats", "arguments": {"id": "disk0"}}',
    b'{"execute": {"execute": "stop"}, "id": "\\ud800"}',
    b'{"id": 1e999, "execute": "query-name"}',
    b'{"id": -0.0, "execute": "query-name", "arguments": {}}',
    b"{",
    b"}",
    b'"',
    b"\\",
    b"[",
    b"\xff",
    b"\n",
]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[QmpHost]:
    with qmp_host(tmp_path / "qmp.sock") as host:
        yield host


@pytest.fixture
def client(host: QmpHost) -> Iterator[QmpClient]:
    with host.connect() as client:
        assert client.ask("qmp_capabilities") == {"return": {}}
        yield client


def test_greeting_and_line_ends(host: QmpHost) -> None:
    with QmpClient(host.path) as client:
        line = client.line()
        assert line.endswith(b"\r\n")
        greeting = json.loads(line)["QMP"]
        assert greeting["capabilities"] == []
        assert greeting["version"]["package"] == f"motorcade-{__version__}"
        assert set(greeting["version"]["qemu"]) == {"major", "minor", "micro"}
        client.send(b'{"execute":"query-status"}')
        assert client.line() == b'{"return":{"running":true,"singlestep":false,"status":"running"}}\r\n'


def test_tcp_as_well(host: QmpHost) -> None:
    with QmpClient(host.tcp) as client:
        assert "QMP" in client.read()
        assert client.ask("query-name") == {"return": {"name": "fake"}}


@pytest.mark.parametrize(
    ("request_text", "desc", "error_class"),
    [
        ('{"execute": "nonsense"}', "The command nonsense has not been found", "CommandNotFound"),
        ('{"execute": 3}', "QMP input member 'execute' must be a string", "GenericError"),
        ("{}", "QMP input lacks member 'execute'", "GenericError"),
        ("[1]", "QMP input must be a JSON object", "GenericError"),
        ('{"execute": "stop", "extra": 1}', "QMP input member 'extra' is unexpected", "GenericError"),
        ('{"execute": "stop", "arguments": 5}', "QMP input member 'arguments' must be an object", "GenericError"),
        ('{"execute": "stop", "arguments": null}', "QMP input member 'arguments' must be an object", "GenericError"),
        ('{"execute": "stop", "arguments": {"now": true}}', "Parameter 'now' is unexpected", "GenericError"),
        ('{"execute": "x-motorcade-sidecar-stats"}', "Parameter 'id' is missing", "GenericError"),
        (
            '{"execute": "x-motorcade-sidecar-stats", "arguments": {"id": 7}}',
            "Invalid parameter 'id': Expected str, got int",
            "GenericError",
        ),
        (
            '{"execute": "x-motorcade-sidecar-stats", "arguments": {"id": "disk9"}}',
            "Device 'disk9' not found",
            "DeviceNotFound",
        ),
        (
            '{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}',
            "Capability 'oob' is not available: the greeting offers none",
            "GenericError",
        ),
    ],
)
def test_errors(client: QmpClient, request_text: str, desc: str, error_class: str) -> None:
    client.send(request_text.encode())
    assert client.read() == {"error": {"class": error_class, "desc": desc}}


@pytest.mark.parametrize(
    "text", ['{"execute": "stop",}', "{'execute': 'stop'}", '{"a" 1}', '{"a": [1}]', "{\x00}", '{"a": NaN}']
)
def test_broken_json_is_answered_and_the_connection_lives(client: QmpClient, text: str) -> None:
    client.send(text.encode() + b'{"execute": "query-name"}')
    error = client.read()["error"]
    assert error["class"] == "GenericError"
    assert error["desc"].startswith("JSON parse error")
    assert client.read() == {"return": {"name": "fake"}}


def test_invalid_utf8_is_broken_json(client: QmpClient) -> None:
    for text in (b'{"execute": "st\xc3"}', b'{"execute": "stop", "id": "\xe9"}', b'{"\xf0": 1}'):
        client.send(text)
        assert "JSON parse error" in client.read()["error"]["desc"]


@pytest.mark.parametrize("value", [0, -1, 10**40, 1.5, "x", "é\n", None, True, [1, {"a": []}], {"k": "v"}])
def test_any_id_comes_back(client: QmpClient, value: Any) -> None:
    for command, key in (("query-uuid", "return"), ("nonsense", "error")):
        client.send(json.dumps({"id": value, "execute": command}).encode())
        answer = client.read()
        assert answer["id"] == value
        assert key in answer


def test_no_id_no_id(client: QmpClient) -> None:
    assert "id" not in client.ask("query-uuid")


def test_an_answer_is_one_line_whatever_the_id_was_written_like(client: QmpClient) -> None:
    client.send(b'{"id": {\n"a":\r\n 1}, "execute": "query-name"}')
    assert json.loads(client.line())["id"] == {"a": 1}


def test_requests_however_they_arrive(client: QmpClient) -> None:
    request = b'{"execute":"query-kvm","id":%d}'
    client.send(b"".join(request % n for n in range(300)))
    client.send(b"\r\n".join(request % n for n in range(300, 310)))
    for byte in request % 310:
        client.send(bytes([byte]))
    assert [client.read()["id"] for _ in range(311)] == list(range(311))


def test_events_precede_the_answer_but_for_quit(host: QmpHost, client: QmpClient) -> None:
    for command, event, data in (
        ("stop", "STOP", None),
        ("cont", "RESUME", None),
        ("system_reset", "RESET", {"guest": False, "reason": "host-qmp-system-reset"}),
        ("system_powerdown", "POWERDOWN", None),
    ):
        seen = client.ask(command)
        assert seen["event"] == event
        assert seen.get("data") == data
        assert abs(seen["timestamp"]["seconds"] - time.time()) < 60
        assert 0 <= seen["timestamp"]["microseconds"] < 1_000_000
        assert client.read() == {"return": {}}
    assert client.ask("quit") == {"return": {}}
    seen = client.read()
    assert (seen["event"], seen["data"]) == ("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
    assert host.machine.done == ["pause", "resume", "reset", "powerdown", "quit"]


def test_stop_and_cont_are_idempotent(client: QmpClient) -> None:
    assert client.ask("stop")["event"] == "STOP"
    client.read()
    assert client.ask("stop") == {"return": {}}
    assert client.ask("query-status") == {"return": {"running": False, "singlestep": False, "status": "paused"}}
    assert client.ask("cont")["event"] == "RESUME"
    client.read()
    assert client.ask("cont") == {"return": {}}


@pytest.mark.parametrize("command", ["stop", "system_powerdown"])
def test_a_vm_that_is_over_takes_no_orders(host: QmpHost, client: QmpClient, command: str) -> None:
    host.machine.run_state = RunState.INTERNAL_ERROR
    error = client.ask(command)["error"]
    assert error["class"] == "GenericError"
    assert "internal-error" in error["desc"]
    assert host.machine.done == []
    assert client.ask("query-status")["return"]["status"] == "internal-error"


def test_the_queries(client: QmpClient) -> None:
    props = [{"core-id": n, "socket-id": 0, "thread-id": 0} for n in range(2)]
    paths = [f"/machine/unattached/device[{n}]" for n in range(2)]
    assert client.ask("query-cpus")["return"][1] == {
        "CPU": 1, "arch": "x86", "current": False, "halted": False, "props": props[1], "qom_path": paths[1],
        "thread_id": 1002,
    }  # fmt: skip
    assert client.ask("query-cpus-fast")["return"] == [
        {"cpu-index": n, "qom-path": paths[n], "thread-id": 1001 + n, "props": props[n], "target": "x86_64"}
        for n in range(2)
    ]
    assert client.ask("query-hotpluggable-cpus")["return"] == [
        {"props": props[n], "qom-path": paths[n], "type": "host-x86-cpu", "vcpus-count": 1} for n in range(2)
    ]
    assert client.ask("query-kvm") == {"return": {"enabled": True, "present": True}}
    assert client.ask("query-target") == {"return": {"arch": "x86_64"}}
    assert client.ask("query-uuid") == {"return": {"UUID": "7a1f0d7e-3c4b-4a57-9f0e-6f6f3a9d2c11"}}
    assert client.ask("query-chardev")["return"] == [
        {"label": "com1", "filename": "pty:/dev/pts/3", "frontend-open": True}
    ]
    disk, overlay = client.ask("query-block")["return"]
    assert (disk["device"], disk["inserted"]["ro"], disk["inserted"]["drv"]) == ("disk0", True, "raw")
    assert disk["inserted"]["cache"] == {"writeback": True, "direct": True, "no-flush": False}
    assert disk["inserted"]["image"] == {"filename": "/img/a.raw", "format": "raw", "virtual-size": 1 << 30}
    assert (overlay["inserted"]["backing_file"], overlay["inserted"]["backing_file_depth"]) == ("/img/base.raw", 1)
    assert client.ask("x-motorcade-sidecars")["return"] == [
        {"id": "disk0", "kind": "blk", "pid": 4711, "state": "present", "slot": 0},
        {"id": "com1", "kind": "serial", "pid": 4712, "state": "present"},
    ]
    names = {c["name"] for c in client.ask("query-commands")["return"]}
    assert names >= {"qmp_capabilities", "query-version", "query-commands", "quit", "stop", "cont"}
    assert {"name": "STOP"} in client.ask("query-events")["return"]


def test_every_command_that_is_listed_exists(client: QmpClient) -> None:
    for entry in client.ask("query-commands")["return"]:
        answer = client.ask(entry["name"], unlikely=1)
        assert answer["error"]["desc"] == "Parameter 'unlikely' is unexpected"


def test_a_late_answer_keeps_the_order_and_holds_up_no_other(host: QmpHost, client: QmpClient) -> None:
    ask = b'{"execute": "x-motorcade-sidecar-stats", "arguments": {"id": "%s"}, "id": 1}'
    client.send(ask % b"slow" + b'{"execute": "query-name", "id": 2}')
    with host.connect() as other:
        assert other.ask("x-motorcade-sidecar-stats", id="disk0")["return"] == {
            "id": "disk0",
            "queues": [
                {
                    "index": 0, "requests": 5, "bytes-in": 4096, "bytes-out": 512, "errors": 0, "kicks": 3,
                    "kicks-suppressed": 2, "interrupts": 2, "suppressed": 1, "taken": 5, "in-flight": 1,
                    "latency-ns": 700, "latency": [0, 4],
                }
            ],
            "detail": {"merged": 9},
        }  # fmt: skip
    host.call(lambda: host.server.emit("STOP"))
    assert client.read()["event"] == "STOP"  # events do not wait for an answer
    host.call(lambda: host.machine.waiting.pop()(None))
    answer = client.read()
    assert answer["id"] == 1
    assert "no counters" in answer["error"]["desc"]
    assert client.read()["id"] == 2


def test_many_answers_that_come_at_once_need_no_stack(client: QmpClient) -> None:
    request = b'{"execute":"x-motorcade-sidecar-stats","arguments":{"id":"mute"},"id":1}'
    sender = threading.Thread(target=client.send, args=(request * 5000,))
    sender.start()
    assert all("no counters" in client.read()["error"]["desc"] for _ in range(5000))
    sender.join()


def test_a_client_that_leaves_before_its_answer(host: QmpHost) -> None:
    with host.connect() as gone:
        gone.send(b'{"execute": "x-motorcade-sidecar-stats", "arguments": {"id": "slow"}}')
        with host.connect() as other:
            while not host.machine.waiting:
                other.ask("query-name")
    host.call(lambda: host.machine.waiting.pop()(None))
    with host.connect() as other:
        assert "return" in other.ask("query-name")


def test_a_failing_command_is_answered_and_logged(
    host: QmpHost, client: QmpClient, caplog: pytest.LogCaptureFixture
) -> None:
    host.machine.failure = ZeroDivisionError("oops")
    assert client.ask("stop") == {"error": {"class": "GenericError", "desc": "internal error: ZeroDivisionError: oops"}}
    assert "ZeroDivisionError" in caplog.text
    host.machine.failure = None
    assert client.ask("query-name") == {"return": {"name": "fake"}}


def test_events_reach_every_client(host: QmpHost, client: QmpClient) -> None:
    with host.connect() as second:
        second.ask("query-name")
        client.send(b'{"execute": "stop"}')
        assert client.read()["event"] == second.read()["event"] == "STOP"


def test_events_wait_for_the_first_words(host: QmpHost) -> None:
    """qemu.qmp takes what follows the greeting for the answer to its qmp_capabilities."""
    with host.connect() as client:
        host.call(lambda: host.server.emit("STOP"))
        assert client.ask("qmp_capabilities") == {"return": {}}
        assert client.read()["event"] == "STOP"


def test_without_negotiation_the_event_still_precedes(host: QmpHost) -> None:
    with host.connect() as client:
        assert client.ask("stop")["event"] == "STOP"
        assert client.read() == {"return": {}}


def test_one_who_only_listens_gets_events_after_a_while(host: QmpHost) -> None:
    with host.connect() as client:
        host.call(lambda: host.server.emit("STOP"))
        due = host.server.next_deadline()
        assert due is not None
        host.call(lambda: host.server.expire(due - 0.001))
        assert host.server.next_deadline() == due
        host.call(lambda: host.server.expire(due))
        assert client.read()["event"] == "STOP"
        assert host.server.next_deadline() is None
        host.call(lambda: host.server.emit("RESUME"))
        assert client.read()["event"] == "RESUME"


def test_events_are_those_that_are_declared(host: QmpHost) -> None:
    with pytest.raises(ValueError, match="EVENTS"):
        host.server.emit("NONSENSE")
    with pytest.raises(ValueError, match="reason"):
        host.server.emit("RESET", {"guest": True})


@pytest.mark.parametrize("data", [b'{"x": "' + b"y" * (10 << 20) + b'"}', b"[" * 200_000 + b"]" * 200_000])
def test_ten_megabytes_and_deep_nesting_are_refused(host: QmpHost, client: QmpClient, data: bytes) -> None:
    sender = threading.Thread(target=client.send, args=(data + b'{"execute": "query-name"}',))
    sender.start()
    with host.connect() as other:
        assert other.ask("query-name") == {"return": {"name": "fake"}}
    assert client.read()["error"]["class"] == "GenericError"
    assert client.read() == {"return": {"name": "fake"}}
    sender.join()


def test_a_client_that_does_not_read_is_slowed_down_and_nobody_else(host: QmpHost, client: QmpClient) -> None:
    """Its commands wait; none of its answers is lost once it reads."""
    request = b'{"execute":"query-commands"}'
    with host.connect() as lazy:

        def send() -> None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the test hangs up in the middle
                lazy.send(request * 40_000)

        sender = threading.Thread(target=send)
        sender.start()
        unsent: list[int] = []
        for _ in range(50):
            assert client.ask("query-name") == {"return": {"name": "fake"}}
            host.call(lambda: unsent.extend(c.unsent for c in host.server._clients))
        assert max(unsent) < client_module.PAUSE_READING + 10_000  # 28 MB of answers wait to be asked for
        for _ in range(2000):
            assert "return" in lazy.read()
        lazy.sock.shutdown(socket.SHUT_RDWR)
        sender.join(20)
        assert not sender.is_alive()


def test_a_client_that_leaves_events_unread_is_dropped(
    host: QmpHost, client: QmpClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(client_module, "MAX_OUTPUT", 100_000)
    with host.connect() as lazy, caplog.at_level(logging.WARNING):
        lazy.ask("query-name")

        def some() -> None:
            for _ in range(20):
                host.server.emit("RESET", {"guest": True, "reason": "x" * 500})

        rounds = 0
        while host.server.clients == 2:
            host.call(some)
            assert [client.read()["event"] for _ in range(20)] == ["RESET"] * 20
            rounds += 1
            assert rounds < 1000
        assert "left 100" in caplog.text
        assert client.ask("query-name") == {"return": {"name": "fake"}}
        while lazy.line():  # what had been sent is there, then the end
            pass


def test_half_closed_clients_get_their_answers(host: QmpHost) -> None:
    """As of ``echo '{...}' | socat - qmp.sock``."""
    with host.connect() as client:
        client.send(b'{"execute": "query-name"}{"execute": "query-target"}')
        client.sock.shutdown(socket.SHUT_WR)
        assert client.read() == {"return": {"name": "fake"}}
        assert client.read() == {"return": {"arch": "x86_64"}}
        assert client.line() == b""


def test_an_idle_server_sleeps(host: QmpHost, client: QmpClient) -> None:
    client.ask("query-name")
    host.call(lambda: None)
    before = host.rounds
    host.call(lambda: None)
    assert host.rounds - before <= 2


def test_no_descriptors_left_turns_clients_away_without_a_busy_loop(host: QmpHost, client: QmpClient) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare: list[socket.socket] = []
    waiting = socket.socket(socket.AF_UNIX)
    waiting.settimeout(20)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, soft), hard))
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                spare.append(socket.socket())
        waiting.connect(host.path)
        assert waiting.recv(10) == b""  # turned away
        assert client.ask("query-name") == {"return": {"name": "fake"}}
    finally:
        for one in spare:
            one.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        waiting.close()
    with host.connect() as later:
        assert "return" in later.ask("query-name")


def test_closing_lets_the_last_words_out(tmp_path: Path) -> None:
    with qmp_host(tmp_path / "qmp.sock") as host:
        client = host.connect()
        listener = host.connect()  # has never spoken
        client.send(b'{"execute": "quit"}')
        assert client.read() == {"return": {}}
    assert client.read()["event"] == "SHUTDOWN"
    assert client.line() == b""
    assert listener.read()["event"] == "SHUTDOWN"
    client.sock.close()
    listener.sock.close()


def test_closing_waits_for_a_client_that_reads(tmp_path: Path) -> None:
    """More than a socket buffer of events is queued when the VM ends; whoever reads gets all of them."""
    with qmp_host(tmp_path / "qmp.sock") as host:
        client = host.connect()
        client.ask("query-name")

        def many() -> None:
            for _ in range(2000):
                host.server.emit("RESET", {"guest": True, "reason": "x" * 500})
            host.server.emit("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})

        host.call(many)
        lines: list[bytes] = []

        def read() -> None:
            while line := client.line():
                lines.append(line)

        reader = threading.Thread(target=read)
        reader.start()
    reader.join(20)
    assert len(lines) == 2001
    assert b"SHUTDOWN" in lines[-1]
    client.sock.close()


@given(st.lists(st.one_of(st.binary(max_size=60), st.sampled_from(PIECES)), max_size=12))
@settings(deadline=None, max_examples=150)
def test_whatever_is_sent_is_answered_in_json_and_the_server_lives(pieces: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as directory, qmp_host(Path(directory) / "q") as host:
        with host.connect() as client:
            client.send(b"".join(pieces))
            client.sock.shutdown(socket.SHUT_WR)
            while line := client.line():
                assert {"return", "error", "event"} & json.loads(line).keys()
        with host.connect() as after:
            assert after.ask("query-name") == {"return": {"name": "fake"}}


def test_every_command_and_event_says_what_it_is() -> None:
    for name in registry.names():
        assert (registry.find(name).handler.__doc__ or "").strip(), f"{name}: its function has no docstring"
    for name, kind in EVENTS.items():
        assert kind.__doc__, f"{name}: its class has no docstring"
