"""`vmmctl up` and `vmmctl console` on a person's terminal, with a micro-guest at the other end of the serial line."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import termios
import time
from pathlib import Path
from typing import Any

import pytest

from harness.vmmctl import DEADLINE, Host, gone, write_machine

pytestmark = pytest.mark.kvm

POWER_OFF = "out=1540:52"  # to the ACPI sleep control register (core/pm.py)
LEAVE = b"\x1d"


class Terminal:
    """A pty with vmmctl on it."""

    def __init__(self, host: Host, *args: str) -> None:
        self.master, self.slave = os.openpty()
        self.modes = termios.tcgetattr(self.slave)
        self.seen = b""
        self.process = subprocess.Popen(
            host.command(*args), env=host.env, stdin=self.slave, stdout=self.slave, stderr=self.slave
        )

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)

    def wait_for(self, text: bytes) -> None:
        """Until ``text`` has been shown since the last wait."""
        end = time.monotonic() + DEADLINE
        while text not in self.seen:
            left = max(0.0, end - time.monotonic())
            assert select.select([self.master], [], [], left)[0], f"no {text!r} in {self.seen!r}"
            self.seen += os.read(self.master, 65536)
        self.seen = self.seen[self.seen.index(text) + len(text) :]

    def type(self, data: bytes) -> None:
        os.write(self.master, data)

    def ended(self) -> int:
        """The exit status, with the terminal's modes as they were."""
        status = self.process.wait(DEADLINE)
        assert termios.tcgetattr(self.slave) == self.modes
        return status


def test_up_in_a_terminal_leave_and_come_back(host: Host, guest: Path, tmp_path: Path) -> None:
    file = write_machine(tmp_path, "web", guest, cmdline=f"print=login: echo=6 print=bye {POWER_OFF}")
    with Terminal(host, "up", str(file)) as up:
        up.wait_for(b"serial-ttyS0")  # the table of processes
        up.wait_for(b"Ctrl-] leaves]\r\n")
        up.wait_for(b"login:")
        up.type(b"ab\n")
        up.wait_for(b"ab\n")
        up.type(LEAVE)
        up.wait_for(b"runs in the background")
        assert up.ended() == 0
    pids = host.live_pids("web")
    assert pids
    with Terminal(host, "console", "web") as console:
        console.wait_for(b"login:\nab\n")
        console.type(LEAVE)
        assert console.ended() == 0
    with Terminal(host, "console", "web", "ttyS0") as again:
        again.wait_for(b"login:\nab\n")
        again.type(b"cd\n")
        again.wait_for(b"cd\nbye\n")
        assert again.ended() == 0
    gone(pids)


def test_two_consoles_see_the_same(host: Host, guest: Path, tmp_path: Path) -> None:
    file = write_machine(tmp_path, "web", guest, cmdline=f"print=login: echo=2 print=bye {POWER_OFF}")
    host.vmmctl("up", "-d", str(file))
    with Terminal(host, "console", "web") as a, Terminal(host, "console", "web") as b:
        a.wait_for(b"login:\n")
        b.wait_for(b"login:\n")
        a.type(b"1")
        b.wait_for(b"1")
        b.type(b"2")
        a.wait_for(b"12bye\n")
        b.wait_for(b"2bye\n")
        assert (a.ended(), b.ended()) == (0, 0)


def backend_machine(folder: Path, guest: Path, backend: Any, cmdline: str) -> Path:
    return write_machine(
        folder, "web", guest, cmdline=cmdline, consoles=[{"id": "ttyS0", "type": "uart", "backend": backend}]
    )


def test_pty(host: Host, guest: Path, tmp_path: Path) -> None:
    host.vmmctl("up", "-d", str(backend_machine(tmp_path, guest, "pty", f"print=hello echo=3 {POWER_OFF}")))
    pids = host.live_pids("web")
    tty = os.open(host.run_dir / "web" / "pty-ttyS0", os.O_RDWR | os.O_NOCTTY)
    try:
        data = b""
        os.write(tty, b"xyz")
        while not data.endswith(b"hello\nxyz"):
            assert select.select([tty], [], [], DEADLINE)[0], data
            data += os.read(tty, 4096)
        gone(pids)
    finally:
        os.close(tty)


def test_socket_and_file(host: Host, guest: Path, tmp_path: Path) -> None:
    path = host.run_dir / "serial.sock"
    host.vmmctl(
        "up", "-d", str(backend_machine(tmp_path, guest, {"socket": str(path)}, f"print=hi echo=2 {POWER_OFF}"))
    )
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(DEADLINE)
        peer.connect(str(path))
        peer.sendall(b"ok")
        data = b""
        while piece := peer.recv(4096):
            data += piece
        assert data == b"hi\nok"
    host.wait_for("the VM's end", lambda: "ended" in host.state("web"))
    log = tmp_path / "console.log"
    log.write_text("before\n")
    host.vmmctl("up", str(backend_machine(tmp_path, guest, {"file": str(log)}, f"fill=5000 print=end {POWER_OFF}")))
    text = log.read_text()
    pattern = "0123456789abcdefghijklmnopqrstuvwxyz"
    assert text == "before\n" + (pattern * 139)[:5000] + "end\n"
