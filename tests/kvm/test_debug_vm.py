"""vmmctl sidecar debug: the prompt in a sidecar, and what attaches to one."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import diskguest
from harness.vm import DEADLINE, Vm, VmHost, vm_host
from motorcade.core import link
from motorcade.orchestrator import cli
from motorcade.orchestrator.errors import EXIT_ERROR, EXIT_NOT_FOUND

pytestmark = pytest.mark.kvm


@pytest.fixture
def host(tmp_path: Path) -> Iterator[VmHost]:
    """Where the VMs of the test live."""
    with vm_host(tmp_path) as h:
        yield h


class Person:
    """Somebody at the prompt."""

    def __init__(self, vm: Vm, device: str = "root") -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(DEADLINE)
        self.sock.connect(str(vm.run_dir / f"debug-{device}.sock"))

    def __enter__(self) -> Person:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def read(self) -> str:
        """Up to the next prompt."""
        data = b""
        while not data.endswith((b">>> ", b"... ")):
            more = self.sock.recv(4096)
            assert more, data
            data += more
        return data.decode()

    def ask(self, line: str) -> str:
        self.sock.sendall(line.encode() + b"\n")
        return self.read().removesuffix(">>> ").removesuffix("... ")


def test_a_prompt_in_a_disk_s_sidecar(host: VmHost, guest: Path, tmp_path: Path) -> None:
    vm = host.start(diskguest.machine(tmp_path, guest, "ww", debug=True))
    with Person(vm) as person:
        assert "in the sidecar of root. device: the BlkDevice" in person.read()
        assert person.ask("device.engine") in ("'io_uring'\n", "'sync'\n")
        assert diskguest.do(vm) == 0  # it works meanwhile
        assert person.ask("device.stats().queues[0].requests") == "1\n"
        assert person.ask("for n in range(2):") == ""
        assert person.ask("    print(n)") == ""
        assert person.ask("") == "0\n1\n"
        assert person.ask("1 / 0").splitlines()[-1] == "ZeroDivisionError: division by zero"
        assert person.ask("1 +").splitlines()[-1] == "SyntaxError: invalid syntax"
        assert "was not imported before" in person.ask("import tkinter")
        assert "no file is opened any more" in person.ask("open('/etc/passwd')")
        with socket.socket(socket.AF_UNIX) as second:
            second.settimeout(DEADLINE)
            second.connect(str(vm.run_dir / "debug-root.sock"))
            assert b"somebody is at this prompt already" in second.recv(4096)
        person.sock.sendall(b"sidecar.prompt.say('begun '); [0 for _ in iter(int, 1)]\n")
        assert person.sock.recv(4096) == b"begun "
        os.kill(vm.sidecar_pid("root"), signal.SIGINT)
        assert "KeyboardInterrupt" in person.read()
    with Person(vm) as again:
        assert "device: the BlkDevice" in again.read()
        again.sock.sendall(b"exit()\n")
        while again.sock.recv(4096):
            pass
    assert diskguest.do(vm) == 0
    assert (vm.run_dir / "debug-root.sock").stat().st_mode & 0o777 == 0o600


def test_a_held_prompt_is_not_taken_for_a_hang(
    host: VmHost, guest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "PING_MS", 100)  # the core is forked from here
    monkeypatch.setattr("motorcade.core.machine.PING_SECONDS", 0.1)
    fields = diskguest.machine(tmp_path, guest, "w", debug=True)
    # Both: the serial port's sidecar is not to be killed for its silence on a busy machine.
    vm = host.start(fields | {"consoles": [{"id": "ttyS0", "type": "uart", "debug": True}]})
    with Person(vm) as person:
        person.read()
        person.sock.sendall(b"import time; sidecar.prompt.say('begun '); time.sleep(1e6)\n")
        assert person.sock.recv(4096) == b"begun "
        with vm.qmp() as qmp:
            while "at its prompt" not in (vm.run_dir / "log" / "core.log").read_text():
                qmp.execute("query-status")
        os.kill(vm.sidecar_pid("root"), signal.SIGINT)
        assert "KeyboardInterrupt" in person.read()
    assert diskguest.do(vm) == 0


def test_a_script_on_standard_input(
    host: VmHost, guest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    host.start(diskguest.machine(tmp_path, guest, "w", debug=True))
    receiver, sender = os.pipe()
    os.write(sender, b"6 * 7\n")
    os.close(sender)
    with os.fdopen(receiver) as script:
        monkeypatch.setattr("sys.stdin", script)
        assert cli.main(["sidecar", "debug", "web", "root"]) == 0
    assert ">>> 42\n" in capfd.readouterr().out


def test_what_is_not_there(
    host: VmHost, guest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    host.start(diskguest.machine(tmp_path, guest, "w"))

    def fails(*args: str, status: int = EXIT_ERROR) -> str:
        assert cli.main(["sidecar", "debug", *args]) == status
        return capsys.readouterr().err

    assert "root has no prompt: give it `debug: true` in machine.yaml" in fails("web", "root")
    assert "web has no device rot" in fails("web", "rot", status=EXIT_NOT_FOUND)
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    assert "gdb is not installed (apt install gdb)" in fails("web", "root", "--gdb")
    assert "py-spy is not installed (pip install py-spy)" in fails("web", "root", "--py-spy")


@pytest.mark.skipif(shutil.which("gdb") is None, reason="gdb is not installed")
def test_gdb_attaches_and_lets_go(host: VmHost, guest: Path, tmp_path: Path) -> None:
    vm = host.start(diskguest.machine(tmp_path, guest, "w"))
    done = subprocess.run(
        [sys.executable, "-m", "motorcade.orchestrator.cli", "sidecar", "debug", "web", "root", "--gdb",
         "-batch", "-nx", "-ex", "info threads"],
        capture_output=True, text=True, timeout=DEADLINE, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"LWP {vm.sidecar_pid('root')}" in done.stdout, done.stdout + done.stderr
    assert diskguest.do(vm) == 0


