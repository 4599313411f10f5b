"""Snapshots of whole VMs on bare KVM: real guests at work, the real core, supervisor and sidecars."""

from __future__ import annotations

import itertools
import os
import re
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.disk import IN, OK, OUT
from harness.guestdriver import F_FLUSH, GuestDriver, Script
from harness.vm import Vm, VmHost, vm_host
from motorcade.core import link

pytestmark = pytest.mark.kvm

PAGE = 4096
RAM, PAGES = 16 << 20, 4096  # where the busy guest's data are, and how many pages
BUSY = f"ram={RAM}:{PAGES}:60 serve=20000:64"  # 64 pages every few microseconds, round and round
ROUND = b"." * (PAGES // 64 + 1)  # heard after the first beat: every page has been written once


@pytest.fixture
def host(tmp_path: Path) -> Iterator[VmHost]:
    """Where the VMs of the test live."""
    with vm_host(tmp_path) as h:
        yield h


def machine(guest: Path, cmdline: str, **fields: Any) -> dict[str, Any]:
    """What machine.yaml would say."""
    kernel = {"image": str(guest), "cmdline": cmdline, **({"initrd": i} if (i := fields.pop("initrd", "")) else {})}
    return {"name": "web", "cpus": 1, "memory": "64M", "kernel": kernel, **fields}


def hear(console: socket.socket, text: bytes) -> bytes:
    """What comes up to ``text``."""
    said = b""
    while text not in said:
        some = console.recv(65536)
        assert some, said
        said += some
    return said


def bad_pages(console: socket.socket) -> int:
    """How many words of the busy guest's RAM are not what it had put there."""
    console.sendall(b"c")
    said = b""
    while not re.search(rb"bad [.0-9a-f]+\r?\n", said):
        said += hear(console, b"\n")
    return int(said.replace(b".", b"").partition(b"bad ")[2].split()[0], 16)


def torn_pages(template: Path) -> int:
    """The busy guest writes the time into page after page, round and round: read from the one that it wrote last, the
    times only grow. How often they do not: a page whose last write is missing, or that has one from after."""
    times = []
    with (template / "memory").open("rb") as memory:
        for n in range(PAGES):
            memory.seek(RAM + n * PAGE + 8)
            times.append(struct.unpack("<Q", memory.read(8))[0])
    return sum(a > b for a, b in itertools.pairwise([*times, times[0]])) - 1


def test_live_snapshots_of_a_guest_that_writes_all_the_time(host: VmHost, guest: Path, tmp_path: Path) -> None:
    vm = host.start(machine(guest, BUSY))
    with vm.attach() as console:
        hear(console, ROUND)
        for n in range(5):
            info = vm.snapshot(tmp_path / f"t{n}", live=bool(n % 2))
            assert info["status"] == "completed", info
            assert torn_pages(tmp_path / f"t{n}") == 0
        assert bad_pages(console) == 0
    vm.close()
    clone = host.start(machine(guest, BUSY), template=tmp_path / "t3")
    with clone.attach() as console:
        assert bad_pages(console) == 0
        assert clone.snapshot(tmp_path / "again", live=True)["status"] == "completed"
        assert torn_pages(tmp_path / "again") == 0


@pytest.mark.parametrize("live", [False, True])
def test_a_driver_goes_on_with_its_disk(host: VmHost, guest: Path, tmp_path: Path, live: bool) -> None:
    """Its queue stands where it stood, on both sides; what it wrote before the snapshot is there, in both machines."""
    script = Script()
    disk = GuestDriver(script, 0, F_FLUSH)
    script.store(disk.data, 0x1234_5678)
    disk.request(OUT, 8, OK)
    script.words += ["print=ready", "echo=1"]
    # The same start of the device goes on: a second request in the ring's next place.
    script.store(disk.data, 0)
    script.store(disk.header, IN, 0, 8, 0)
    disk.descriptor(1, disk.data, 512, 1 | 2, 2)
    disk._avail_idx = 1
    script.words += [f"store={disk.avail + 4}:0", f"store={disk.avail}:{2 << 16}"]
    disk.notify(0)
    script.words += [f"slot={disk.slot}", "isr", f"load={disk.data}", "print=over"]
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    fields = {"initrd": str(script.write(tmp_path)), "disks": [{"id": "d", "path": str(tmp_path / "disk.img")}]}
    vm = host.start(machine(guest, "initrd", **fields))

    def finish(of: Vm) -> None:
        with of.attach() as console:
            hear(console, b"ready")
            console.sendall(b"x")
            said = hear(console, b"over").replace(b"\r", b"")
        assert b"x" in said
        assert b"isr 1 then 0\n12345678\n" in said

    with vm.attach() as console:
        hear(console, b"ready")
    assert vm.snapshot(tmp_path / "t", live=live)["status"] == "completed"
    finish(vm)
    vm.close()
    finish(host.start(machine(guest, "initrd", **fields), template=tmp_path / "t"))


def test_a_byte_typed_during_the_pause_arrives_once(host: VmHost, guest: Path, tmp_path: Path) -> None:
    vm = host.start(machine(guest, "print=hello echo=4000"))
    text = bytes(range(97, 123))
    with vm.attach() as console:
        hear(console, b"\n")
        sent = b""
        for n in range(10):
            console.sendall(text)
            sent += text
            assert vm.snapshot(tmp_path / f"t{n}", live=n % 2 == 0)["status"] == "completed"
        said = b""
        while len(said) < len(sent):
            said += console.recv(4096)
        assert said == sent


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The VM's processes are forked from this one, and have its deadlines."""
    monkeypatch.setattr(link, "QUIESCE_MS", 300)
    monkeypatch.setattr("motorcade.core.snapshot.coordinator.QUIESCE_MS", 300)


@pytest.mark.parametrize("live", [False, True])
def test_a_sidecar_that_hangs(host: VmHost, guest: Path, tmp_path: Path, impatient: None, live: bool) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    vm = host.start(machine(guest, BUSY, disks=[{"id": "d", "path": str(tmp_path / "disk.img")}]))
    with vm.attach() as console:
        hear(console, ROUND)
        os.kill(vm.sidecar_pid("d"), signal.SIGSTOP)
        info = vm.snapshot(tmp_path / "t", live=live)
        assert (info["status"], info["error-desc"]) == ("failed", "d: no answer to quiesce within 0.3 s")
        os.kill(vm.sidecar_pid("d"), signal.SIGCONT)
        assert not list(tmp_path.glob("t*"))
        assert bad_pages(console) == 0
        assert vm.snapshot(tmp_path / "t", live=live)["status"] == "completed"
        assert torn_pages(tmp_path / "t") == 0


def test_a_sidecar_that_does_not_resume_is_killed(
    host: VmHost, guest: Path, tmp_path: Path, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "DEADLINE_MS", 1500)
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    vm = host.start(machine(guest, BUSY, disks=[{"id": "d", "path": str(tmp_path / "disk.img")}]))
    with vm.attach() as console, vm.qmp() as qmp:
        hear(console, b".")
        os.kill(vm.sidecar_pid("d"), signal.SIGSTOP)
        assert vm.snapshot(tmp_path / "t")["status"] == "failed"
        while not any(e["event"] == "SIDECAR_RESTARTED" for e in qmp.events):
            qmp.execute("query-status")
        assert bad_pages(console) == 0


def test_a_sidecar_that_is_killed(host: VmHost, guest: Path, tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    vm = host.start(machine(guest, BUSY, disks=[{"id": "d", "path": str(tmp_path / "disk.img")}]))
    with vm.attach() as console, vm.qmp() as qmp:
        hear(console, b".")
        os.kill(vm.sidecar_pid("d"), signal.SIGSTOP)
        qmp.execute("migrate", {"uri": f"file:{tmp_path / 't'}"})
        while qmp.execute("query-status")["status"] != "finish-migrate":
            pass
        os.kill(vm.sidecar_pid("d"), signal.SIGKILL)
        info = vm.await_snapshot(qmp)
        assert info["status"] == "failed"
        assert info["error-desc"].startswith("d: its sidecar ")
        assert not list(tmp_path.glob("t*"))
        assert bad_pages(console) == 0


def test_events_and_numbers(host: VmHost, guest: Path, tmp_path: Path) -> None:
    vm = host.start(machine(guest, BUSY))
    with vm.attach() as console, vm.qmp() as qmp:
        hear(console, b".")
        assert qmp.execute("query-migrate") == {"status": "none"}
        qmp.execute("migrate", {"uri": f"file:{tmp_path / 't'}", "blk": False, "inc": False, "detach": True})
        info = vm.await_snapshot(qmp)
        assert info["ram"] == {"total": 64 << 20, "transferred": info["ram"]["transferred"], "remaining": 0}
        assert 9 << 20 < info["ram"]["transferred"] < 64 << 20
        assert 0 <= info["downtime"] <= info["total-time"]
        assert 0 <= info["setup-time"] <= info["total-time"]
        qmp.execute("query-status")
        statuses = [e["data"]["status"] for e in qmp.events if e["event"] == "MIGRATION"]
        assert statuses == ["setup", "active", "completed"]


def test_the_pause_of_a_live_snapshot_is_that_of_little_memory(host: VmHost, guest: Path, tmp_path: Path) -> None:
    """128 MiB of data; the guest rests, so little is left to be copied when it is paused."""
    vm = host.start({**machine(guest, f"ram={RAM}:32768:100 print=filled echo=10"), "memory": "256M"})
    with vm.attach() as console:
        hear(console, b"filled")
    stopped = vm.snapshot(tmp_path / "stopped")
    live = vm.snapshot(tmp_path / "live", live=True)
    assert live["ram"]["transferred"] >= 128 << 20
    assert live["ram"]["transferred"] - stopped["ram"]["transferred"] < 16 << 20, (live, stopped)
