"""vmmctl without a VM: help, errors, exit statuses, start-up time, and talking QMP to a made-up VM."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.vmmctl import Host, write_machine
from motorcade import __version__
from motorcade.orchestrator import cli, rundir
from motorcade.orchestrator.commands import qmp
from motorcade.orchestrator.errors import UserError
from motorcade.orchestrator.qmpclient import QmpClient, QmpError


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as h:
        yield h


def test_help_and_version(host: Host) -> None:
    assert host.vmmctl("--version").stdout == f"vmmctl {__version__}\n"
    help_text = host.vmmctl("--help").stdout
    daily = ("up", "run", "down", "ps", "status", "console", "logs")
    for command in (*daily, "qmp", "sidecar", "schema", "doctor", "box"):
        assert f"\n    {command} " in help_text
    assert "examples:" in help_text
    assert "exit status:" in help_text


@pytest.mark.parametrize("command", ["up", "run", "down", "qmp", "schema", "doctor"])
def test_help_teaches(host: Host, command: str) -> None:
    text = host.vmmctl(command, "--help").stdout
    assert "exit status" in text or "example" in text or "editor" in text


def test_help_imports_nothing_slow() -> None:
    """What it may not import costs more than the rest of --help together."""
    slow = {"yaml", "msgspec", "zmq", "capnp", "cffi", "asyncio", "subprocess", "multiprocessing"}
    code = "import sys; from motorcade.orchestrator import cli; cli.parser(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert slow & set(done.stdout.split()) == set()


def test_what_is_mistyped_is_told_with_what_is_near(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a newcomer who types nothing, or help, sees what there is."""
    assert "commands:" in host.vmmctl(check=2).stderr
    assert "--detach" in host.vmmctl("help", "up").stdout
    said = "vmmctl: there is no command snapshto; did you mean snapshot?\nvmmctl --help says more\n"
    assert host.vmmctl("snapshto", check=2).stderr.endswith(said)
    monkeypatch.chdir(tmp_path)
    assert host.vmmctl("up", check=2).stderr.startswith("vmmctl: there is no machine.yaml here: vmmctl up FILE")
    assert host.vmmctl("clone", "no", check=1).stderr == f"vmmctl: {tmp_path}/no: no such directory\n"


def test_errors_are_one_line(host: Host, tmp_path: Path) -> None:
    for args, status, text in [
        (("up", str(tmp_path / "no.yaml")), 1, f"vmmctl: {tmp_path}/no.yaml: No such file or directory\n"),
        (("status", "web"), 3, "vmmctl: no VM is called web\n"),
        (("down", "web"), 3, "vmmctl: no VM is called web\n"),
        (("console", "web"), 3, "vmmctl: no VM is called web\n"),
        (("logs", "web"), 3, "vmmctl: no VM is called web\n"),
        (("qmp", "web", "stop"), 3, "vmmctl: no VM is called web\n"),
        (("sidecar", "ls", "web"), 3, "vmmctl: no VM is called web\n"),
    ]:
        assert host.vmmctl(*args, check=status).stderr == text


def test_debug_shows_the_traceback(host: Host) -> None:
    assert "Traceback" in host.vmmctl("--debug", "status", "web", check=1).stderr


def test_config_errors(host: Host, tmp_path: Path) -> None:
    file = write_machine(tmp_path, "web", "/nonexistent", cpus="two", extra=1)
    done = host.vmmctl("up", str(file), check=2)
    assert done.stderr.startswith(f"vmmctl: {file}:1:")
    assert "Traceback" not in done.stderr
    file = write_machine(tmp_path, "web", "/nonexistent")
    assert "kernel.image: no such file: /nonexistent" in host.vmmctl("up", str(file), check=2).stderr
    assert host.names() == []


def test_a_bug_is_named_so(host: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(rundir, "vms", lambda **_: 1 / 0)
    assert cli.main(["ps"]) == 1
    assert "ZeroDivisionError: division by zero (a bug?" in capsys.readouterr().err


def test_schema_is_json(host: Host) -> None:
    schema = json.loads(host.vmmctl("schema").stdout)
    assert schema["$schema"].startswith("https://json-schema.org/")


def test_ps_of_nothing(host: Host) -> None:
    assert host.vmmctl("ps").stdout.splitlines() == ["NAME  STATUS  PID  CPUS  MEMORY  ACCEL  UP"]
    assert json.loads(host.vmmctl("ps", "--json").stdout) == []


def test_a_closed_pipe_is_no_error(host: Host) -> None:
    with host.running("schema") as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(timeout=60) == 0
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_leftovers_are_shown_and_cleared(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    left = host.run_dir / "web"
    (left / "log").mkdir(parents=True)
    (left / "lock").touch()
    (left / "log" / "core.log").write_text("last words\n")
    (left / "state.json").write_text(json.dumps({"name": "web", "status": "running", "pid": 2**22, "start": 1}))
    assert "web   killed" in host.vmmctl("ps").stdout
    assert host.vmmctl("logs", "web", "core").stdout == "last words\n"
    assert "its leftovers are removed" in host.vmmctl("down", "web").stdout
    assert host.names() == []
    assert "killed" in host.vmmctl("status", "web").stdout
    assert "web does not run" in host.vmmctl("down", "web", check=3).stderr
    assert host.vmmctl("logs", "web").stdout == "last words\n"
    assert "did you mean web?" in host.vmmctl("status", "wep", check=3).stderr


# Requests from words.


@pytest.mark.parametrize(
    ("words", "request_"),
    [
        (["stop"], {"execute": "stop"}),
        (["x", "id=disk1", "n=5", "t=true", "s=\"5\"", "e="],
         {"execute": "x", "arguments": {"id": "disk1", "n": 5, "t": True, "s": "5", "e": ""}}),
        (["x", '{"a": {"b": 1}}', "c=d"], {"execute": "x", "arguments": {"a": {"b": 1}, "c": "d"}}),
        (['{"execute": "stop", "id": 7}'], {"execute": "stop", "id": 7}),
    ],
)  # fmt: skip
def test_qmp_words(words: list[str], request_: dict[str, Any]) -> None:
    assert qmp.parse(words[0], words[1:]) == request_


@pytest.mark.parametrize("words", [["x", "y"], ["x", "=1"], ["x", "{"], ["{"], ["{}"], ['{"execute": "a"}', "b=c"]])
def test_qmp_words_that_make_no_request(words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        qmp.parse(words[0], words[1:])
    assert caught.value.status == 2


class FakeVm:
    """Answers QMP on a socket with what it is told to, and notes what it was asked."""

    def __init__(self, path: Path, answers: list[bytes]) -> None:
        self.asked: list[bytes] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._answers = answers
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        with self._listener, self._listener.accept()[0] as sock:
            sock.sendall(b'{"QMP": {"version": {}, "capabilities": []}}\r\n')
            for answer in self._answers:
                self.asked.append(sock.recv(65536))
                sock.sendall(answer)
            sock.recv(1)


OK = b'{"return": {}}\r\n'


def test_qmp_client(host: Host) -> None:
    """Events between, answers in pieces and together, errors with the VM's words."""
    path = host.run_dir / "qmp.sock"
    two = b'{"event": "STOP", "data": {}}\r\n{"return": 5}\r\n'
    vm = FakeVm(path, [OK, two, b'{"error": {"class": "C", "desc": "no"}}\n'])
    with QmpClient(path) as client:
        assert client.execute("stop", {"a": 1}) == 5
        assert client.wait_event(0) == {"event": "STOP", "data": {}}
        assert client.wait_event(0) is None
        with pytest.raises(QmpError, match="bad: no") as caught:
            client.execute("bad")
        assert caught.value.error == {"class": "C", "desc": "no"}
    vm.thread.join()
    assert json.loads(vm.asked[1]) == {"execute": "stop", "arguments": {"a": 1}}


@pytest.mark.parametrize("greeting", [b"hello\r\n", b"[]\n", b'{"return": {}}\n', b""])
def test_qmp_client_of_something_else(host: Host, greeting: bytes) -> None:
    path = host.run_dir / "qmp.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with listener.accept()[0] as sock:
                sock.sendall(greeting)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(QmpError):
            QmpClient(path)
        thread.join()


def test_qmp_client_of_a_silent_one(host: Host) -> None:
    path = host.run_dir / "qmp.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(QmpError, match="no answer"):
            QmpClient(path, timeout=0.05)
    with pytest.raises(QmpError, match="no answer"):
        QmpClient(path, timeout=0.05)
