"""QEMU's and Xen's ways on whole VMs: states without RAM, RAM in a named file, commands, descriptors, devices alone."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.disk import OK, OUT
from harness.guestdriver import F_FLUSH, GuestDriver, Script
from harness.vm import Vm, VmHost, vm_host
from harness.vmmctl import Host, write_machine
from motorcade.orchestrator import config, hostcheck, restore
from motorcade.orchestrator.errors import UserError
from motorcade.orchestrator.qmpclient import QmpClient, QmpError

pytestmark = pytest.mark.kvm

SIZE = 32 << 20
CMDLINE = "ram=16777216:64:100 print=hello echo=3 print=more echo=100"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[VmHost]:
    with vm_host(tmp_path) as h:
        yield h


@pytest.fixture
def shm() -> Iterator[Path]:
    """A folder on tmpfs."""
    with tempfile.TemporaryDirectory(prefix="mc-", dir="/dev/shm") as folder:
        yield Path(folder)


def machine(guest: Path, name: str = "web", **fields: Any) -> dict[str, Any]:
    return {"name": name, "cpus": 1, "memory": SIZE, "kernel": {"image": str(guest), "cmdline": CMDLINE}, **fields}


def hear(vm: Vm, text: bytes, typed: bytes = b"") -> bytes:
    with vm.attach() as console:
        console.sendall(typed)
        said = b""
        while text not in said:
            some = console.recv(4096)
            assert some, said
            said += some
    return said


def goes_on(vm: Vm) -> bool:
    return b"abcmore" in hear(vm, b"more", b"abc").replace(b"\r\n", b"")


def ignore_shared(qmp: QmpClient) -> None:
    qmp.execute("migrate-set-capabilities", {"capabilities": [{"capability": "x-ignore-shared", "state": True}]})


def migrate(vm: Vm, uri: str) -> dict[str, Any]:
    with vm.qmp() as qmp:
        ignore_shared(qmp)
        qmp.execute("migrate", {"uri": uri})
        return vm.await_snapshot(qmp)


def source(host: VmHost, guest: Path, shm: Path, **fields: Any) -> Vm:
    """A VM whose RAM is a file, whose guest waits."""
    vm = host.start(machine(guest, memory_file=str(shm / "ram"), **fields))
    hear(vm, b"hello")
    return vm


def frozen(host: VmHost, guest: Path, shm: Path) -> Path:
    """A state without RAM, and its RAM in shm; the VM is gone."""
    vm = source(host, guest, shm)
    assert migrate(vm, f"file:{shm / 'state'}")["status"] == "completed"
    vm.close()
    return shm / "state"


# RAM in a file.


def test_ram_stays_as_it_is_after_its_state_is_written(host: VmHost, guest: Path, shm: Path) -> None:
    """The guest ran, and does not go on by itself; cont takes it back, and the state is worth nothing then."""
    vm = source(host, guest, shm)
    assert migrate(vm, f"file:{shm / 'state'}")["status"] == "completed"
    before = (shm / "ram").read_bytes()
    with vm.qmp() as qmp:
        assert qmp.execute("query-status") == {"running": False, "singlestep": False, "status": "postmigrate"}
        with vm.attach() as console:
            console.sendall(b"a")
        assert (shm / "ram").read_bytes() == before
        qmp.execute("cont")
    assert b"abcmore" in hear(vm, b"more", b"bc").replace(b"\r\n", b"")


def test_a_state_without_ram_goes_on_in_its_memory_file(host: VmHost, guest: Path, shm: Path) -> None:
    state = frozen(host, guest, shm)
    assert state.is_file()
    assert state.stat().st_size < 1 << 20
    assert (shm / "ram").stat().st_size == SIZE
    vm = host.start(machine(guest, memory_file=str(shm / "ram")), template=state)
    assert goes_on(vm)


def test_clones_of_a_memory_file_are_private(host: VmHost, guest: Path, shm: Path) -> None:
    state = frozen(host, guest, shm)
    before = (shm / "ram").read_bytes()
    clones = [
        host.start(machine(guest, f"c{n}", memory_file=str(shm / "ram"), memory_share=False), template=state)
        for n in range(3)
    ]
    for clone in clones:
        assert goes_on(clone)
    assert (shm / "ram").read_bytes() == before
    # A clone's memory has no name: it is frozen as any machine's.
    assert clones[0].snapshot(shm / "template")["status"] == "completed"
    info = migrate(clones[0], f"file:{shm / 'other'}")
    assert (info["status"], info["error-desc"]) == (
        "failed",
        "x-ignore-shared leaves RAM where it is; this machine's has no name: it needs a memory_file of its own",
    )
    again = host.start(machine(guest, "again"), template=shm / "template")
    hear(again, b"d", b"d")


def test_vmmctl_clones_a_state(guest: Path, shm: Path, tmp_path: Path) -> None:
    with Host() as vmmctl:
        (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
        fields: dict[str, Any] = {"cmdline": CMDLINE, "memory": "32M", "memory_file": str(shm / "ram")}
        for name, disks in (("none", []), ("some", [{"id": "d", "path": "disk.img"}])):
            vmmctl.vmmctl("up", "-d", str(write_machine(tmp_path, name, guest, disks=disks, **fields)))
            with QmpClient(vmmctl.run_dir / name / "qmp.sock") as qmp:
                ignore_shared(qmp)
                qmp.execute("migrate", {"uri": f"file:{shm / name}"})
            vmmctl.wait_for("the state", lambda name=name: (shm / name).exists())  # type: ignore[misc]
            vmmctl.vmmctl("down", "--force", name)
        done = vmmctl.vmmctl("clone", str(shm / "some"), check=1)
        assert "has no disks, and clones cannot share those that they write to (d)" in done.stderr
        vmmctl.vmmctl("clone", str(shm / "none"), "-n", "3")
        for n in (1, 2, 3):
            assert vmmctl.state(f"none-{n}")["status"] == "running"
        assert "in use by another VM" in vmmctl.vmmctl("up", "-d", str(tmp_path / "none.yaml"), check=1).stderr
        for n in (1, 2, 3):
            vmmctl.vmmctl("down", "--force", f"none-{n}")
        vmmctl.vmmctl("up", "-d", "--incoming", f"file:{shm / 'none'}")  # in place
        assert vmmctl.state("none")["status"] == "running"
        vmmctl.vmmctl("down", "--force", "none")
        vmmctl.vmmctl("zygote", "stop", check=None)


def test_a_disk_reads_and_writes_memory_in_a_file(host: VmHost, guest: Path, shm: Path, tmp_path: Path) -> None:
    """The sidecars map the same file; and in a clone, the same copy of it."""
    script = Script()
    disk = GuestDriver(script, 0, F_FLUSH)
    script.store(disk.data, 0x1234_5678)
    disk.request(OUT, 8, OK)
    script.words += ["print=hello", "echo=3"]
    script.store(disk.data, 0x0BAD_CAFE)
    disk._avail_idx = 1
    script.words += [f"store={disk.avail + 4}:0", f"store={disk.avail}:{2 << 16}"]
    disk.notify(0)
    script.words += [f"slot={disk.slot}", "isr", "print=more"]
    kernel = {"image": str(guest), "cmdline": "initrd", "initrd": str(script.write(tmp_path))}
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    fields = {"kernel": kernel, "disks": [{"id": "d", "path": str(image)}], "memory_file": str(shm / "ram")}
    vm = host.start({**machine(guest), **fields})
    hear(vm, b"hello")
    assert migrate(vm, f"file:{shm / 'state'}")["status"] == "completed"
    vm.close()
    assert image.read_bytes()[8 * 512 : 8 * 512 + 4] == (0x1234_5678).to_bytes(4, "little")
    for share in (False, True):  # the clone first: the other goes on in the file itself
        vm = host.start({**machine(guest), **fields, "memory_share": share}, template=shm / "state")
        hear(vm, b"more", b"abc")
        vm.close()
        assert image.read_bytes()[8 * 512 : 8 * 512 + 4] == (0x0BAD_CAFE).to_bytes(4, "little")
        image.write_bytes(bytes(1 << 20))


def test_a_memory_file_belongs_to_one_vm_or_to_clones(host: VmHost, guest: Path, shm: Path) -> None:
    vm = source(host, guest, shm)
    with pytest.raises(AssertionError, match="is in use by another VM"):
        host.start(machine(guest, "second", memory_file=str(shm / "ram")))
    assert migrate(vm, f"file:{shm / 'state'}")["status"] == "completed"
    clone = machine(guest, "clone", memory_file=str(shm / "ram"), memory_share=False)
    with pytest.raises(AssertionError, match="is in use by the VM that writes to it; end that first"):
        host.start(clone, template=shm / "state")
    vm.close()
    host.start(clone, template=shm / "state")
    with pytest.raises(AssertionError, match="is in use by another VM"):
        host.start(machine(guest, memory_file=str(shm / "ram")))


def test_a_machine_that_starts_has_fresh_memory(host: VmHost, guest: Path, shm: Path) -> None:
    (shm / "ram").write_bytes(os.urandom(SIZE))
    vm = source(host, guest, shm)
    assert (shm / "ram").read_bytes()[28 << 20 :].strip(b"\0") == b""
    vm.close()


def check(host: VmHost, folder: Path, data: dict[str, Any], template: Path | None = None) -> str:
    """What is said to this machine before anything starts."""
    file = folder / "checked.yaml"
    file.write_text(json.dumps(data))
    try:
        parsed, said = config.load(str(file))
        incoming = None
        if template is not None:
            plan = restore.read(template)
            restore.check(parsed, said, plan)
            incoming = restore.incoming(parsed, plan, generation_id=b"")
        hostcheck.check(parsed, said, incoming)
    except UserError as e:
        return str(e)
    return ""


def test_memory_files_that_are_none(host: VmHost, guest: Path, shm: Path, tmp_path: Path) -> None:
    state = frozen(host, guest, shm)
    file = str(shm / "ram")

    def said(**fields: Any) -> str:
        return check(host, tmp_path, machine(guest, **fields))

    assert "memory_share: false goes with a memory_file" in said(memory_share=False)
    assert "false is for a machine that goes on from a state" in said(memory_file=file, memory_share=False)
    assert "no such folder" in said(memory_file=str(shm / "no/ram"))
    assert "not a file" in said(memory_file=str(shm))
    (shm / "short").write_bytes(bytes(4096))
    assert "has 4096 bytes, the machine's memory has 33554432" in said(memory_file=str(shm / "short"))
    (shm / "empty").touch()
    assert said(memory_file=str(shm / "empty")) == ""

    def restored(**fields: Any) -> str:
        return check(host, tmp_path, machine(guest, **fields), state)

    assert "there is no memory_file to say where that is" in restored()
    assert "no such file" in restored(memory_file=str(shm / "gone"))
    for share in (True, False):
        assert "has 4096 bytes" in restored(memory_file=str(shm / "short"), memory_share=share)
    os.truncate(shm / "ram", SIZE - 4096)
    assert "has 33550336 bytes" in restored(memory_file=file)


def test_a_template_has_its_memory_with_it(host: VmHost, guest: Path, shm: Path, tmp_path: Path) -> None:
    """Of a machine whose RAM is a file, too: it needs that no more."""
    vm = source(host, guest, shm)
    assert vm.snapshot(tmp_path / "t")["status"] == "completed"
    vm.close()
    (shm / "ram").unlink()
    assert restore.read(tmp_path / "t").machine.memory_file is None
    assert goes_on(host.start(machine(guest), template=tmp_path / "t"))
    wrong = check(host, tmp_path, machine(guest, memory_file=str(shm / "ram")), tmp_path / "t")
    assert "has the machine's memory; memory_file is for a state that has none" in wrong


def test_states_that_are_none(host: VmHost, guest: Path, shm: Path, tmp_path: Path) -> None:
    state = frozen(host, guest, shm)
    data = state.read_bytes()
    fields = machine(guest, memory_file=str(shm / "ram"))
    for at in range(0, len(data), max(1, len(data) // 50)):
        flipped = bytearray(data)
        flipped[at] ^= 1
        state.write_bytes(flipped)
        assert str(state) in check(host, tmp_path, fields, state), f"a flipped bit at {at}"
        state.write_bytes(data[:at])
        assert str(state) in check(host, tmp_path, fields, state), f"a cut at {at}"
    os.mkfifo(shm / "fifo")
    with pytest.raises(UserError, match="Not a directory"):
        restore.read(shm / "fifo")


def test_x_ignore_shared_needs_a_memory_file(host: VmHost, guest: Path, shm: Path) -> None:
    vm = host.start(machine(guest))
    hear(vm, b"hello")
    info = migrate(vm, f"file:{shm / 'state'}")
    assert info["status"] == "failed"
    assert "it needs a memory_file of its own" in info["error-desc"]
    assert goes_on(vm)


# Commands and descriptors.


def test_a_state_goes_through_commands(host: VmHost, guest: Path, shm: Path) -> None:
    vm = source(host, guest, shm)
    assert migrate(vm, f"exec:cat > {shm / 'state'}")["status"] == "completed"
    info = migrate(vm, f"exec:cat > {shm / 'other'}; exit 3")
    assert (info["status"], info["error-desc"]) == (
        "failed",
        f"exec: cat > {shm / 'other'}; exit 3: ended with status 3",
    )
    assert migrate(vm, "exec:exec /nonexistent 2> /dev/null")["status"] == "failed"
    vm.close()
    waiting = host.start(machine(guest, memory_file=str(shm / "ram")), defer=True)
    with waiting.qmp() as qmp:
        for command, why in (
            ("cat /nonexistent 2> /dev/null", "ended with status 1"),
            (f"cat {shm / 'state'}; exit 4", "ended with status 4"),
            ("kill -9 $$", "was killed by SIGKILL"),
            ("true", "not a template's state"),
            (f"head -c 5000 {shm / 'state'}", "truncated"),
        ):
            with pytest.raises(QmpError, match=why):
                qmp.execute("migrate-incoming", {"uri": f"exec:{command}"})
            assert qmp.execute("query-status")["status"] == "inmigrate"
        qmp.execute("migrate-incoming", {"uri": f"exec:cat {shm / 'state'}"})
    assert goes_on(waiting)


def test_a_state_goes_through_descriptors(host: VmHost, guest: Path, shm: Path) -> None:
    vm = source(host, guest, shm)
    ours, theirs = socket.socketpair()
    with vm.qmp() as qmp:
        qmp.getfd("out", theirs.fileno())
        theirs.close()
        ignore_shared(qmp)
        qmp.execute("migrate", {"uri": "fd:out"})
        state = b""
        while piece := ours.recv(65536):
            state += piece
        assert vm.await_snapshot(qmp)["status"] == "completed"
    ours.close()
    vm.close()
    waiting = host.start(machine(guest, memory_file=str(shm / "ram"), memory_share=False), defer=True)
    with waiting.qmp() as qmp:
        for data in (state[:1000], state):
            reader, writer = os.pipe()
            qmp.getfd("in", reader)
            os.close(reader)
            fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1 << 20)
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(data)
            if data is not state:
                with pytest.raises(QmpError, match="truncated"):
                    qmp.execute("migrate-incoming", {"uri": "fd:in"})
        qmp.execute("migrate-incoming", {"uri": "fd:in"})
    assert goes_on(waiting)


def test_a_reader_that_goes_away_is_a_failed_migration(host: VmHost, guest: Path, shm: Path) -> None:
    vm = source(host, guest, shm)
    reader, writer = os.pipe()
    with vm.qmp() as qmp:
        qmp.getfd("out", writer)
        os.close(writer)
        os.close(reader)
        ignore_shared(qmp)
        qmp.execute("migrate", {"uri": "fd:out"})
        info = vm.await_snapshot(qmp)
    assert (info["status"], info["error-desc"]) == ("failed", "the snapshot cannot be written: Broken pipe")
    assert goes_on(vm)


def test_a_reader_that_does_not_read_can_be_given_up(host: VmHost, guest: Path, shm: Path) -> None:
    vm = source(host, guest, shm)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with vm.qmp() as qmp:
        qmp.getfd("out", writer)
        os.close(writer)
        ignore_shared(qmp)
        qmp.execute("migrate", {"uri": "fd:out"})
        end = time.monotonic() + 60
        while qmp.execute("query-migrate")["status"] != "active" and time.monotonic() < end:
            pass
        qmp.execute("migrate_cancel")
        assert vm.await_snapshot(qmp)["status"] == "cancelled"
    os.close(reader)
    assert goes_on(vm)


# Devices alone.


@pytest.mark.parametrize("xen", ["", "xen-"])
def test_the_state_of_devices_is_loaded_into_the_same_machine(
    host: VmHost, guest: Path, tmp_path: Path, xen: str
) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    devices = {
        "disks": [{"id": "d", "path": str(tmp_path / "disk.img")}],
        "nets": [{"id": "lan", "unplugged": True}],
        "consoles": [{"id": "hvc0"}],
    }
    vm = host.start(machine(guest, **devices))
    hear(vm, b"hello")
    with vm.qmp() as qmp:
        # The guest runs: it stands still for a moment, and goes on.
        qmp.execute(f"{xen}save-devices-state", {"filename": str(tmp_path / "running")})
        assert qmp.execute("query-status")["running"] is True
        assert qmp.execute("query-migrate") == {"status": "none"}
        with pytest.raises(QmpError, match="state 'running'"):
            qmp.execute(f"{xen}load-devices-state", {"filename": str(tmp_path / "running")})
        qmp.execute("stop")
        qmp.execute(f"{xen}save-devices-state", {"filename": str(tmp_path / "first")})
        qmp.execute(f"{xen}load-devices-state", {"filename": str(tmp_path / "first")})
        assert qmp.execute("query-status")["status"] == "paused"
        # Time stands still in it as in one that was restored: what is saved now is what was loaded.
        qmp.execute(f"{xen}save-devices-state", {"filename": str(tmp_path / "second")})
        assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
        qmp.execute("cont")
    assert goes_on(vm)


def test_a_disk_in_use_goes_on_after_a_load(host: VmHost, guest: Path, tmp_path: Path) -> None:
    script = Script()
    disk = GuestDriver(script, 0, F_FLUSH)
    script.store(disk.data, 0x1234_5678)
    disk.request(OUT, 8, OK)
    script.words += ["print=hello", "echo=3"]
    script.store(disk.data, 0x0BAD_CAFE)
    disk._avail_idx = 1
    script.words += [f"store={disk.avail + 4}:0", f"store={disk.avail}:{2 << 16}"]
    disk.notify(0)
    script.words += [f"slot={disk.slot}", "isr", "print=more"]
    kernel = {"image": str(guest), "cmdline": "initrd", "initrd": str(script.write(tmp_path))}
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    vm = host.start({**machine(guest), "kernel": kernel, "disks": [{"id": "d", "path": str(image)}]})
    hear(vm, b"hello")
    with vm.qmp() as qmp:
        qmp.execute("stop")
        qmp.execute("save-devices-state", {"filename": str(tmp_path / "devices")})
        for _ in range(3):
            qmp.execute("load-devices-state", {"filename": str(tmp_path / "devices")})
        qmp.execute("cont")
    assert b"isr 1 then 0" in hear(vm, b"more", b"abc")
    assert image.read_bytes()[8 * 512 : 8 * 512 + 4] == (0x0BAD_CAFE).to_bytes(4, "little")


def test_the_state_of_devices_by_descriptor(host: VmHost, guest: Path) -> None:
    vm = host.start(machine(guest))
    hear(vm, b"hello")
    reader, writer = os.pipe()
    with vm.qmp() as qmp:
        qmp.execute("stop")
        qmp.getfd("x", writer)
        os.close(writer)
        qmp.execute("save-devices-state", {"filename": "fd:x"})
        qmp.getfd("x", reader)
        os.close(reader)
        qmp.execute("load-devices-state", {"filename": "fd:x"})
        qmp.execute("cont")
    assert goes_on(vm)


def test_a_state_of_another_machine_changes_nothing(host: VmHost, guest: Path, tmp_path: Path) -> None:
    other = host.start(machine(guest, "other", cpus=2))
    with other.qmp() as qmp:
        qmp.execute("save-devices-state", {"filename": str(tmp_path / "other")})
    (tmp_path / "noise").write_bytes(os.urandom(5000))
    vm = host.start(machine(guest))
    hear(vm, b"hello")
    with vm.qmp() as qmp:
        qmp.execute("stop")
        for name, why in (
            ("other", "the state is of other processors|2 vCPUs, this machine 1"),
            ("noise", "not a template's state"),
            ("nothing", "No such file"),
            (".", "not a file"),
        ):
            with pytest.raises(QmpError, match=why):
                qmp.execute("load-devices-state", {"filename": str(tmp_path / name)})
        with pytest.raises(QmpError, match="a state is at file:PATH"):
            qmp.execute("load-devices-state", {"filename": "./relative"})
        with pytest.raises(QmpError, match="must be absolute"):
            qmp.execute("save-devices-state", {"filename": "./relative"})
        assert qmp.execute("query-status")["status"] == "paused"
        qmp.execute("cont")
    assert goes_on(vm)


def test_devices_into_a_machine_that_waits(host: VmHost, guest: Path, shm: Path) -> None:
    """With the memory that they go with, they are all that is missing; without it, there is nothing to go on with."""
    vm = source(host, guest, shm)
    with vm.qmp() as qmp:
        qmp.execute("stop")
        qmp.execute("save-devices-state", {"filename": str(shm / "devices")})
    vm.close()
    waiting = host.start(machine(guest), defer=True)
    with waiting.qmp() as qmp, pytest.raises(QmpError, match="no memory yet that the state of devices could go with"):
        qmp.execute("xen-load-devices-state", {"filename": str(shm / "devices")})
    waiting.close()
    waiting = host.start(machine(guest, memory_file=str(shm / "ram")), defer=True)
    with waiting.qmp() as qmp:
        qmp.execute("xen-load-devices-state", {"filename": str(shm / "devices")})
    assert goes_on(waiting)
