"""A machine with a device of every kind, each in the middle of something: what a snapshot of all of it has to keep.

Two vCPUs; a disk that is written, one with an overlay and one that is only read; a NIC with a buffer for what arrives;
two virtio consoles and the 16550, with input that the guest has not asked for yet.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

from harness.disk import IN, OK, OUT
from harness.guestdriver import F_FLUSH, GuestDriver, Script
from harness.vm import DEADLINE, Vm
from motorcade.orchestrator import cli

DISK = 1 << 20  # bytes of each disk
RAM, PAGES = 16 << 20, 2048  # the guest's known data: where, and how many pages
WORD = 0x6B657074  # on the disk with the overlay
CONSOLE_IN, UART_IN = b"abcdefghij", b"pqrst"


def machine(folder: Path, guest: Path, *, cpus: int = 2) -> dict[str, Any]:
    """What machine.yaml says; its files are made in ``folder``."""
    for name in ("raw.img", "base.img", "ro.img"):
        (folder / name).write_bytes(os.urandom(DISK))
    return {
        "name": "whole",
        "accel": "kvm",
        "cpus": cpus,
        "memory": "32M",
        "kernel": {"image": str(guest), "cmdline": "initrd", "initrd": str(_script(cpus).write(folder))},
        "disks": [
            {"id": "over", "path": str(folder / "base.img"), "overlay": str(folder / "first.overlay")},
            {"id": "raw", "path": str(folder / "raw.img")},
            {"id": "ro", "path": str(folder / "ro.img"), "readonly": True},
        ],
        "nets": [{"id": "lan", "unplugged": True}],
        "consoles": [{"id": "ttyS0", "type": "uart"}, {"id": "hvc0"}, {"id": "hvc1"}],
    }


def _script(cpus: int) -> Script:
    s = Script()
    over, raw = GuestDriver(s, 0, F_FLUSH), GuestDriver(s, 1, F_FLUSH)
    nic, console, gate = GuestDriver(s, 16), GuestDriver(s, 32), GuestDriver(s, 33)
    s.words += ["smp"] * (cpus > 1) + [f"ram={RAM}:{PAGES}:60"]
    for disk in (over, raw):
        s.store(disk.data, WORD)
        disk.request(OUT, 8, OK)
    for device, size in ((nic, 2048), (console, 4), (gate, 4)):
        device.start()
        device.descriptor(0, device.data, size, 2, 0)
        device.offer()
    s.words += ["print=ready", f"slot={console.slot}", "isr", "print=asked", f"slot={gate.slot}", "isr", "print=going"]
    # Each ring's next place: the console's, for what it has kept back; the disk's, to read what was written.
    console.descriptor(1, console.data + 8, 4, 2, 0)
    again(console, 1)
    s.words += [f"load={console.data + 8}"]
    s.store(over.data, 0)
    s.store(over.header, IN, 0, 8, 0)
    over.descriptor(1, over.data, 512, 1 | 2, 2)
    again(over, 0)
    s.words += [f"load={over.data}", f"echo={len(UART_IN)}", "print=", "serve=0:0"]
    return s


def again(device: GuestDriver, head: int) -> None:
    """A second request of one start: the ring's second place (its first was 0)."""
    words = device.script.words
    words += [f"store={device.avail + 4}:{head << 16}", f"store={device.avail}:{2 << 16}"]
    device.notify(0)
    words += [f"slot={device.slot}", "isr"]


def hear(console: socket.socket, text: bytes) -> bytes:
    """What comes up to ``text``."""
    said = b""
    while text not in said:
        some = console.recv(65536)
        assert some, said
        said += some
    return said


def say(vm: Vm, device: str, text: bytes) -> None:
    """Types on a console, and waits until its sidecar has taken it all in."""
    with vm.attach(device) as console, vm.qmp() as qmp:
        console.sendall(text)
        end = time.monotonic() + DEADLINE
        while (taken := qmp.execute("x-motorcade-sidecar-stats", {"id": device})["detail"]["guest_in"]) < len(text):
            assert time.monotonic() < end, f"{device} has taken {taken} bytes"


def busy(vm: Vm) -> None:
    """Has everything in the middle of something: four of CONSOLE_IN are in the guest, six wait; UART_IN waits."""
    with vm.attach() as uart:
        hear(uart, b"ready")
        with vm.attach("hvc0") as console:
            console.sendall(CONSOLE_IN)  # in one piece, and taken so
            hear(uart, b"asked")
    say(vm, "ttyS0", UART_IN)


def finish(vm: Vm) -> None:
    """Everything goes on where it was: no byte is lost, none comes twice, the disk has what was written, and RAM."""
    with vm.attach() as uart, vm.attach("hvc1") as gate:
        gate.sendall(b"go")
        said = hear(uart, UART_IN)
        said = said.replace(b"\r", b"").partition(b"going\n")[2].rstrip()
        waiting = int.from_bytes(CONSOLE_IN[4:8], "little")
        assert said == b"isr 1 then 0\n%x\nisr 1 then 0\n%x\n%b" % (waiting, WORD, UART_IN), said
        uart.sendall(b"c")
        assert b"bad 0" in hear(uart, b"bad 0").replace(b"\r", b"")


def same(one: Path, other: Path) -> None:
    """Two templates are equal, byte for byte, in all their files."""
    names = sorted(p.name for p in one.iterdir() if p.name != "working-set")
    assert names == sorted(p.name for p in other.iterdir() if p.name != "working-set")
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), f"{one.name} and {other.name} differ in {name}"


def verify(template: Path) -> None:
    """As vmmctl does: every byte of it, and of what it builds on."""
    assert cli.main(["template", "verify", str(template)]) == 0
