"""A vhost-user disk in whole machines: a micro-guest on /dev/kvm, qemu-storage-daemon, the supervisor between them."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import vhostbackend, wholevm
from harness.disk import IN, OK, OUT
from harness.guestdriver import GuestDriver, Script
from harness.vhostbackend import PROGRAM
from harness.vm import DEADLINE, VmHost, vm_host
from motorcade.orchestrator.box.vm import VIRTIOFSD as VIRTIOFSDS

pytestmark = [pytest.mark.kvm, pytest.mark.skipif(bool(vhostbackend.missing), reason=vhostbackend.missing)]

VIRTIOFSD = next((path for path in VIRTIOFSDS if os.access(path, os.X_OK)), None)
SLOT, DISK, FAR = 40, 1 << 20, 20 << 20
WORDS = 0x61626364, 0x65666768  # on the disk at first, and written by the guest


@pytest.fixture
def host(tmp_path: Path) -> Iterator[VmHost]:
    with vm_host(tmp_path) as h:
        yield h


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(WORDS[0].to_bytes(4, "little").ljust(DISK, b"\0"))
    return path


def started(image: Path) -> dict[str, Any]:
    """A backend that the VM starts."""
    export = "type=vhost-user-blk,id=e,node-name=d,writable=on,addr.type=fd,addr.str={fd}"
    return {"command": [PROGRAM, "--blockdev", f"driver=file,node-name=d,filename={image}", "--export", export]}


def machine(folder: Path, guest: Path, **device: Any) -> dict[str, Any]:
    """A guest that reads the first sector, prints its first word, waits for a byte, and writes what it has had in a far
    page all the time, without having looked at that again."""
    s = Script()
    disk = GuestDriver(s, SLOT)
    s.store(FAR, WORDS[1])
    disk.request(IN, 0, OK)
    s.words += [f"load={disk.data}"]
    far = disk.header + 0x100
    s.store(far, OUT, 0, 16, 0)
    disk.descriptor(4, far, 16, 1, 5)
    disk.descriptor(5, FAR, 512, 1, 6)
    disk.descriptor(6, disk.status_byte, 1, 2, 0)
    s.words += ["print=ready", "echo=1", "print="]
    wholevm.again(disk, 4)
    s.words += [f"load={disk.status_byte}", "print=written", "serve=0:0"]
    return {
        "name": "bridged",
        "memory": "32M",
        "kernel": {"image": str(guest), "cmdline": "initrd", "initrd": str(s.write(folder))},
        "devices": [{"id": "disk0", "kind": "vhost-user", "type": "blk", **device}],
    }


def written(image: Path) -> int:
    """The word that the guest writes."""
    with image.open("rb") as file:
        return int.from_bytes(os.pread(file.fileno(), 4, 16 * 512), "little")


def gone(pid: int) -> bool:
    """Not there, or dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_clone_goes_on_with_a_backend_that_sees_all_of_its_memory(
    host: VmHost, guest: Path, tmp_path: Path, image: Path
) -> None:
    fields = machine(tmp_path, guest, **started(image))
    vm = host.start(fields)
    with vm.attach() as uart:
        assert b"%x" % WORDS[0] in wholevm.hear(uart, b"ready")
    template, again = tmp_path / "template", tmp_path / "again"
    info = vm.snapshot(template)
    assert info["status"] == "completed", info
    vm.close()
    assert written(image) == 0
    clone = host.start(fields, template=template)
    with clone.attach() as uart:
        uart.sendall(b"x")
        wholevm.hear(uart, b"written")
    clone.close()
    assert written(image) == WORDS[1]
    paused = host.start(fields, template=template, paused=True)
    assert paused.snapshot(again)["status"] == "completed"
    wholevm.same(template, again)


def test_a_live_snapshot_has_what_the_backend_wrote(host: VmHost, guest: Path, tmp_path: Path, image: Path) -> None:
    fields = machine(tmp_path, guest, **started(image))
    vm = host.start(fields)
    with vm.attach() as uart:
        wholevm.hear(uart, b"ready")
    info = vm.snapshot(tmp_path / "template", live=True)
    assert info["status"] == "completed", info
    wholevm.verify(tmp_path / "template")
    with vm.attach() as uart:
        uart.sendall(b"x")
        wholevm.hear(uart, b"written")
    vm.close()
    with vm_host(tmp_path / "other") as others:
        (tmp_path / "other").mkdir()
        clone = others.start(fields, template=tmp_path / "template")
        with clone.attach() as uart:
            uart.sendall(b"x")
            wholevm.hear(uart, b"written")


def test_a_backend_that_the_vm_started_is_started_again(
    host: VmHost, guest: Path, tmp_path: Path, image: Path
) -> None:
    vm = host.start(machine(tmp_path, guest, **started(image)))
    with vm.attach() as uart, vm.qmp() as qmp:
        wholevm.hear(uart, b"ready")
        [backend] = [p["pid"] for p in vm.started["processes"] if p["role"] == "backend-disk0"]
        os.kill(backend, signal.SIGKILL)
        assert vm.await_event("sidecar-died")["role"] == "backend-disk0"
        uart.sendall(b"x")
        wholevm.hear(uart, b"written")
        assert qmp.execute("x-motorcade-sidecar-stats", {"id": "disk0"})["detail"] == {"reconnects": 1}
    assert written(image) == WORDS[1]
    pids = backend_pids(vm.run_dir)
    assert len(pids) == 1 and pids != [backend]
    vm.close()
    assert all(gone(pid) for pid in pids)


def test_a_sidecar_that_is_killed_is_replaced_and_connects_again(
    host: VmHost, guest: Path, tmp_path: Path, image: Path
) -> None:
    vm = host.start(machine(tmp_path, guest, **started(image)))
    with vm.attach() as uart:
        wholevm.hear(uart, b"ready")
        os.kill(vm.sidecar_pid("disk0"), signal.SIGKILL)
        uart.sendall(b"x")
        wholevm.hear(uart, b"written")
    assert written(image) == WORDS[1]
    assert len(backend_pids(vm.run_dir)) == 1


def test_no_backend_outlives_a_supervisor_that_is_killed(
    host: VmHost, guest: Path, tmp_path: Path, image: Path
) -> None:
    vm = host.start(machine(tmp_path, guest, **started(image)))
    [backend] = backend_pids(vm.run_dir)
    fd = os.pidfd_open(backend)
    os.kill(vm.pid, signal.SIGKILL)
    assert select.select([fd], [], [], DEADLINE)[0]
    os.close(fd)
    vm.close()
    shutil.rmtree(vm.run_dir)  # as vmmctl does with what a killed supervisor has left


@pytest.mark.parametrize(
    ("device", "why"),
    [
        ({"socket": "/nowhere/there.sock"}, "vhost-user disk0: no backend at /nowhere/there.sock: there is no such"),
        ({"command": ["no-such-program", "{fd}"]}, "vhost-user disk0: no-such-program: there is no such program"),
        ({"command": ["cat", "/no/file", "{fd}"]}, r"\(backend-disk0 said: cat: .*No such file or directory\)"),
        ({"command": ["sh", "-c", "echo not today; exit 3", "{socket}"]}, r"backend-disk0 said: not today"),
    ],
)
def test_a_backend_that_is_not_there_is_a_reason_in_one_line(
    host: VmHost, guest: Path, tmp_path: Path, device: dict[str, Any], why: str
) -> None:
    with pytest.raises(AssertionError, match=why):
        host.start(machine(tmp_path, guest, **device))


def test_a_backend_that_makes_its_socket_by_itself(host: VmHost, guest: Path, tmp_path: Path, image: Path) -> None:
    export = "type=vhost-user-blk,id=e,node-name=d,writable=on,addr.type=unix,addr.path={socket}"
    argv = [PROGRAM, "--blockdev", f"driver=file,node-name=d,filename={image}", "--export", export]
    vm = host.start(machine(tmp_path, guest, command=argv))
    with vm.attach() as uart:
        uart.sendall(b"x")
        wholevm.hear(uart, b"written")
    assert written(image) == WORDS[1]


@pytest.mark.skipif(VIRTIOFSD is None, reason="virtiofsd is not installed (apt install qemu-system-common)")
def test_what_a_backend_cannot_save_is_refused_by_name_and_nothing_is_lost(
    host: VmHost, guest: Path, tmp_path: Path
) -> None:
    s = Script()
    driver = GuestDriver(s, SLOT)
    s.words += ["print=before", "echo=1", "print="]
    driver.start()
    s.words += ["print=driving", "echo=1", "print="]
    driver.reset()
    s.words += ["print=left", "serve=0:0"]
    fields = machine(tmp_path, guest, command=[VIRTIOFSD, "--fd={fd}", "-o", f"source={tmp_path}"])
    fields["devices"][0] |= {"type": "fs", "tag": "shared"}
    fields["kernel"]["initrd"] = str(s.write(tmp_path))
    vm = host.start(fields)
    with vm.attach() as uart:
        wholevm.hear(uart, b"before")
        assert vm.snapshot(tmp_path / "first")["status"] == "completed"
        uart.sendall(b"x")
        wholevm.hear(uart, b"driving")
        info = vm.snapshot(tmp_path / "second")
        assert info["status"] == "failed"
        assert "disk0: quiesce: the backend" in info["error-desc"] and "has a state of its own" in info["error-desc"]
        assert not (tmp_path / "second").exists()
        uart.sendall(b"x")
        wholevm.hear(uart, b"left")
        assert vm.snapshot(tmp_path / "third")["status"] == "completed"


def backend_pids(run_dir: Path) -> list[int]:
    """Of the programs that live, by state.json."""
    processes = json.loads((run_dir / "state.json").read_text())["processes"]
    return [p["pid"] for p in processes if p["role"].startswith("backend-") and p["state"] == "running"]
