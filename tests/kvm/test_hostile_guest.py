"""A guest on the real /dev/kvm that breaks its own devices: each says NEEDS_RESET and nothing else happens."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.guestdriver import F_FLUSH, NEEDS_RESET, POWER_OFF, GuestDriver, Script
from harness.vmmctl import Host, write_machine
from motorcade.core.virtio_mmio import Reg

pytestmark = pytest.mark.kvm

RAM = 16 << 20
HOLE = 0xC0000000  # no RAM from here to 4 GiB, whatever the machine's size
NEXT, WRITE, INDIRECT = 1, 2, 4
IN, OK = 0, 0
WORD = 0x6F746F4D  # of the first sector


def chain(*entries: tuple[int, int, int, int]) -> Callable[[GuestDriver], None]:
    """Offers these descriptors as they are, from the first."""

    def play(driver: GuestDriver) -> None:
        driver.start()
        for index, entry in enumerate(entries):
            driver.descriptor(index, *entry)
        driver.offer()

    return play


def ring(**places: int) -> Callable[[GuestDriver], None]:
    """Starts with queue 0's rings where they cannot be."""

    def play(driver: GuestDriver) -> None:
        driver.reset()
        driver.negotiate()
        driver.queue(**places)
        driver.driver_ok()

    return play


def index_far_ahead(driver: GuestDriver) -> None:
    driver.start()
    driver.offer(ahead=0x4000)


def head_past_the_table(driver: GuestDriver) -> None:
    driver.start()
    driver.offer(0x7FFF)


def notify(queue: int) -> Callable[[GuestDriver], None]:
    def play(driver: GuestDriver) -> None:
        driver.start()
        driver.notify(queue)

    return play


RUNNING: dict[str, Callable[[GuestDriver], None]] = {
    "a-loop": chain((0x1000, 16, NEXT, 1), (0x1000, 16, NEXT, 0)),
    "an-indirect-loop": chain((RAM - 4096, 0xFFFFFFF0, INDIRECT, 0)),
    "an-address-past-RAM": chain((RAM, 16, 0, 0)),
    "an-address-in-the-hole": chain((HOLE, 16, 0, 0)),
    "an-address-that-wraps": chain((2**64 - 8, 16, 0, 0)),
    "the-register-of-a-device": chain((0xD0000000, 16, 0, 0)),
    "a-length-of-4-GiB": chain((0x1000, 0xFFFFFFFF, 0, 0)),
    "a-length-of-0": chain((0x1000, 0, 0, 0)),
    "no-header": chain((0x1000, 1, WRITE, 0)),
    "an-index-far-ahead": index_far_ahead,
    "a-head-past-the-table": head_past_the_table,
    "a-table-outside-RAM": ring(desc=RAM - 16),
    "a-used-ring-in-the-hole": ring(used=HOLE),
    "a-table-at-the-top": ring(desc=2**64 - 16),
    "notify-the-second-queue": notify(1),
    "notify-a-queue-that-is-not-there": notify(99),
    "notify-queue-4-billion": notify(0xFFFFFFFF),
}

# Refused by the transport before the device runs, so no interrupt (virtio 1.2, 2.1.2).
SETTING_UP: dict[str, Callable[[GuestDriver], None]] = {
    "size-0": lambda d: d.queue(size=0),
    "size-3": lambda d: d.queue(size=3),
    "size-32768": lambda d: d.queue(size=32768),
    "size-4-billion": lambda d: d.queue(size=0xFFFFFFFF),
    "a-table-not-aligned": lambda d: d.queue(desc=d.desc + 8),
}


def hostile_script() -> Script:
    script = Script()
    broken, other = (GuestDriver(script, slot, F_FLUSH) for slot in (0, 1))
    console = GuestDriver(script, 32)
    for name, play in RUNNING.items():
        script.say(name)
        play(broken)
        broken.expect_needs_reset()
    other.request(IN, 0, OK)  # while its neighbour is broken
    script.load(other.data, WORD)
    for name, play in SETTING_UP.items():
        script.say(name)
        broken.reset()
        broken.negotiate()
        play(broken)
        broken.peek(Reg.STATUS, 11 | NEEDS_RESET)
    script.say("a-console-is-broken")
    console.start()
    console.notify(7)
    console.expect_needs_reset()
    script.say("a-disk-goes-on-after-its-reset")
    broken.request(IN, 0, OK)
    script.load(broken.data, WORD)
    return script


def test_everyone_lives(host: Host, guest: Path, tmp_path: Path) -> None:
    """Loops, lengths, addresses, sizes, queues never set up, and in between an honest request on the other disk."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.img").write_bytes(struct.pack("<I", WORD).ljust(1 << 20, b"\0"))
    script = hostile_script()
    script.say("done")
    script.words += ["irq=9", "await=1", POWER_OFF]
    file = write_machine(
        tmp_path, "web", guest, cmdline="initrd", initrd=str(script.write(tmp_path)), consoles=[{"id": "hvc0"}],
        disks=[{"id": "a", "path": "a.img", "queues": 2}, {"id": "b", "path": "b.img"}],
    )  # fmt: skip
    with host.running("up", str(file)) as process:
        assert process.stdout is not None
        for expected in script.expected:
            assert process.stdout.readline().decode().strip() == expected
        state = json.loads(host.vmmctl("status", "--json", "web").stdout)
        assert [p["state"] for p in state["processes"]] == ["running"] * 5
        assert json.loads(host.vmmctl("qmp", "web", "query-status").stdout)["status"] == "running"
        host.vmmctl("down", "web")
        assert process.wait(timeout=60) == 0
    log = host.vmmctl("logs", "web", "core").stdout
    for reason in ("a descriptor chain is a loop", "outside RAM", "never set up", "avail index", "not a power of two"):
        assert reason in log
