"""A micro-guest that does a request of its disk for each byte that is typed on its serial port, and says its status."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from harness import wholevm
from harness.disk import IN, OK, OUT
from harness.guestdriver import F_FLUSH, GuestDriver, Script
from harness.vm import Vm

FLUSH = 4
SIZE = 1 << 20  # bytes of its disk


def machine(folder: Path, guest: Path, requests: str, **disk: Any) -> dict[str, Any]:
    """``requests``: a letter each, w, r or f (write, read, flush); the guest does them in this order."""
    image = folder / "root.img"
    if not image.exists():
        image.write_bytes(os.urandom(SIZE))
    script = Script()
    driver = GuestDriver(script, 0, F_FLUSH)
    script.words.append("print=ready")
    for letter in requests:
        script.words += ["echo=1", "print="]
        kind = {"w": OUT, "r": IN, "f": FLUSH}[letter]
        driver.request(kind, 8, OK, 0 if letter == "f" else 512)
        script.words.append("print=done")
    script.words += ["serve=0:0"]
    return {
        "name": "web",
        "accel": "kvm",
        "memory": "32M",
        "kernel": {"image": str(guest), "cmdline": "initrd", "initrd": str(script.write(folder))},
        "disks": [{"id": "root", "path": str(image), **disk}],
    }


def begin(vm: Vm) -> None:
    """Has the guest begin its next request."""
    with vm.attach() as uart:
        wholevm.hear(uart, b"ready")
        uart.sendall(b"x")


def do(vm: Vm) -> int:
    """Has it do the next request; its status (virtio 1.2, 5.2.6)."""
    with vm.attach() as uart:
        before = wholevm.hear(uart, b"ready").count(b"done")  # what was said until now comes first
        uart.sendall(b"x")
        return wait(vm, before + 1)


def wait(vm: Vm, count: int) -> int:
    """Waits until so many requests are over; the status of the last."""
    with vm.attach() as uart:
        said = b""
        while said.count(b"done") < count:
            some = uart.recv(65536)
            assert some, said
            said += some
    words = [line for line in said.replace(b"\r", b"").splitlines() if line.startswith(b"a5a5a5")]
    return int(words[count - 1], 16) & 0xFF
