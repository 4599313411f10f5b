"""Consoles with Debian's own drivers at the guest's end: 8250 and hvc on virtio_console."""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.vm import VmHost
from harness.where import GUEST_UNAME

Machine = Callable[..., dict[str, Any]]


def test_consoles_carry_bytes_unchanged(
    host: VmHost, linux: Machine, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Long lines both ways through both drivers, beside a console that never reads, a file and a pty."""
    vm = host.start(
        linux(
            cpus=2,
            consoles=[
                {"id": "ttyS0", "type": "uart", "backend": {"file": str(tmp_path / "serial.log")}, "scrollback": 0},
                {"id": "hvc0", "type": "virtio", "backend": "pty"},
            ],
        )
    )
    with (
        contextlib.closing(vm.console()) as serial,
        contextlib.closing(vm.console("hvc0")) as hvc,
        socket.socket(socket.AF_UNIX) as stuck,
    ):
        stuck.connect(str(vm.run_dir / "console-hvc0.sock"))
        serial.wait_ready()
        hvc.wait_ready()
        record_property(GUEST_UNAME, serial.check("uname -a"))
        for agent in (serial, hvc):
            # Longer than the tty's 4096 bytes: the driver throttles, and the rest waits in the sidecar and here.
            blob = os.urandom(2200).hex()
            digest = hashlib.sha256(blob.encode() + b"\n").hexdigest()
            assert agent.check(f"echo {blob} | sha256sum").split()[0] == digest
            text, printed = agent.check(
                "head -c 1500 /dev/urandom | base64 -w0 > /tmp/f; cat /tmp/f; echo; sha256sum /tmp/f"
            ).split("\n")
            assert hashlib.sha256(text.encode()).hexdigest() == printed.split()[0]
        tty = os.open(vm.run_dir / "pty-hvc0", os.O_RDWR | os.O_NOCTTY)
        try:
            data = b""
            os.write(tty, b"p1 echo from the $((1 + 1))nd way in\n")
            while b"from the 2nd way in" not in data:
                assert select.select([tty], [], [], 60)[0], data[-500:]
                data += os.read(tty, 65536)
        finally:
            os.close(tty)
        assert b"agent: ready on hvc0" in data, "the pty's first reader sees what came before it"
        serial.send("poweroff -f")
        ended = vm.wait_end()
    assert (ended["status"], ended["reason"]) == (0, "guest-shutdown")
    assert b"agent: ready on ttyS0" in (tmp_path / "serial.log").read_bytes()
