"""vmmctl top and metrics on a live micro-guest, in a pipe and in a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path

import pytest

from harness import diskguest
from harness.vm import DEADLINE, VmHost, vm_host
from harness.vmmctl import Host, write_machine
from motorcade.orchestrator import cli
from motorcade.orchestrator.errors import EXIT_NOT_FOUND

pytestmark = pytest.mark.kvm


@pytest.fixture
def vms(tmp_path: Path) -> Iterator[VmHost]:
    """Where the VMs of the test live."""
    with vm_host(tmp_path) as h:
        yield h


def test_one_look(vms: VmHost, guest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vm = vms.start(diskguest.machine(tmp_path, guest, "w"))
    assert diskguest.do(vm) == 0
    assert cli.main(["top", "--once", "-i", "0.1"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^web: running, 1 vCPU, 32.0M RAM; \d+% CPU, [\d.]+M PSS$", out, re.MULTILINE)
    assert re.search(rf"^  blk-root +{vm.sidecar_pid('root')}  running +[\d.]+ +[\d.]+M +0 ", out, re.MULTILINE)
    assert cli.main(["top", "--once", "--json", "-i", "0.1", "web"]) == 0
    [web] = json.loads(capsys.readouterr().out)["vms"]
    by_role = {p["role"]: p for p in web["processes"]}
    assert by_role.keys() == {"supervisor", "core", "blk-root", "serial-ttyS0"}
    assert all(p["pss"] > 1 << 20 and p["cpu"] is not None for p in by_role.values())
    assert (by_role["blk-root"]["in_flight"], by_role["core"]["in_flight"]) == (0, None)
    assert cli.main(["top", "--once", "wob"]) == EXIT_NOT_FOUND


def test_metrics(vms: VmHost, guest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    vm = vms.start(diskguest.machine(tmp_path, guest, "wr") | {"metrics": f"127.0.0.1:{port}"})
    assert [diskguest.do(vm), diskguest.do(vm)] == [0, 0]
    assert cli.main(["metrics", "web"]) == 0
    text = capsys.readouterr().out
    labels = '{vm="web",device="root",queue="0"}'
    assert f"motorcade_queue_requests_total{labels} 2\n" in text
    assert f"motorcade_queue_to_guest_bytes_total{labels} 512\n" in text
    assert f"motorcade_queue_latency_seconds_count{labels} 2\n" in text
    assert 'motorcade_process_up{vm="web",role="core"} 1\n' in text
    os.kill(vm.sidecar_pid("root"), signal.SIGSTOP)  # neither a sidecar nor the core is asked
    with socket.create_connection(("127.0.0.1", port), DEADLINE) as sock:
        sock.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        answer = b""
        while more := sock.recv(65536):
            answer += more
    os.kill(vm.sidecar_pid("root"), signal.SIGCONT)
    assert f"motorcade_queue_requests_total{labels} 2\n".encode() in answer
    assert cli.main(["metrics", "wob"]) == EXIT_NOT_FOUND


def test_a_metrics_port_that_is_taken(host: Host, guest: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = host.vmmctl("up", "-d", str(write_machine(tmp_path, "web", guest, metrics=address)), check=1)
    assert f"metrics: {address}: Address already in use" in done.stderr
    assert host.names() == []


class Terminal:
    """vmmctl top in a terminal of its own."""

    def __init__(self, host: Host, columns: int = 130) -> None:
        self.master, self._slave = pty.openpty()
        self.resize(columns)
        self.before = termios.tcgetattr(self._slave)
        self.process = subprocess.Popen(
            host.command("top", "-i", "0.2"), env=host.env, stdin=self._slave, stdout=self._slave,
            stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self.said = b""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()
        os.close(self.master)
        os.close(self._slave)

    def resize(self, columns: int) -> None:
        ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def wait_for(self, text: bytes) -> bytes:
        """All that came up to it; it must be new."""
        end = time.monotonic() + DEADLINE
        while text not in self.said:
            assert select.select([self.master], [], [], max(0.0, end - time.monotonic()))[0], self.said
            self.said += os.read(self.master, 65536)
        seen, _, self.said = self.said.partition(text)
        return seen

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def end(self) -> int:
        """Its status. The terminal is as it was."""
        self.wait_for(b"\x1b[?25h\x1b[?1049l")
        status = self.process.wait(DEADLINE)
        assert termios.tcgetattr(self._slave) == self.before
        assert self.process.stderr is not None
        assert self.process.stderr.read() == b""
        return status


@pytest.mark.parametrize("how", ["q", "ctrl-c", "SIGTERM"])
def test_in_a_terminal(host: Host, guest: Path, tmp_path: Path, how: str) -> None:
    """It redraws, sorts, follows the terminal's size, and gives it back whatever ends it."""
    host.vmmctl("up", "-d", str(write_machine(tmp_path, "web", guest)))
    with Terminal(host) as terminal:
        terminal.wait_for(b"\x1b[?1049h\x1b[?25l")
        terminal.wait_for(b"serial-ttyS0")
        terminal.wait_for(b"sorted by cpu")
        terminal.type(b"n")
        frame = terminal.wait_for(b"sorted by name")
        assert b"RESTARTS" in frame or b"RESTARTS" in terminal.wait_for(b"sorted by name")
        terminal.resize(40)
        os.kill(terminal.process.pid, signal.SIGWINCH)
        terminal.wait_for(b"sorted by name")
        frame = terminal.wait_for(b"sorted by name")
        rows = [re.sub(rb"\x1b\[[?0-9]*[A-Za-z]", b"", row) for row in frame.split(b"\r\n")]
        assert max(len(row) for row in rows[1:]) <= 40
        if how == "q":
            terminal.type(b"q")
            assert terminal.end() == 0
        elif how == "ctrl-c":
            os.kill(terminal.process.pid, signal.SIGINT)
            assert terminal.end() == 0
        else:
            terminal.process.terminate()
            assert terminal.end() == 128 + signal.SIGTERM
    host.vmmctl("down", "--force", "web")
