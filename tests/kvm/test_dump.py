"""Dumps of whole VMs: dump-guest-memory and vmmctl dump, of real guests on bare KVM."""

from __future__ import annotations

import io
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from elftools.elf.elffile import ELFFile  # type: ignore[import-untyped]

from harness.vm import Vm, VmHost, vm_host
from motorcade.orchestrator.qmpclient import QmpError

pytestmark = pytest.mark.kvm

RAM, PAGES = 16 << 20, 256  # where the guest's data are, and how many pages of 4096 bytes
FILLED = f"ram={RAM}:{PAGES}:100 print=filled echo=3 print=more"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[VmHost]:
    with vm_host(tmp_path) as h:
        yield h


def machine(guest: Path, name: str = "web", **fields: Any) -> dict[str, Any]:
    return {"name": name, "cpus": 2, "memory": "64M", "kernel": {"image": str(guest), "cmdline": FILLED}, **fields}


def filled(host: VmHost, guest: Path, **fields: Any) -> Vm:
    """A VM whose guest has filled its pages and waits."""
    vm = host.start(machine(guest, **fields))
    with vm.attach() as console:
        said = b""
        while b"filled" not in said:
            said += console.recv(4096)
    return vm


def answers(vm: Vm) -> bool:
    """The guest goes on as before."""
    with vm.attach() as console:
        console.sendall(b"abc")
        said = b""
        while b"more" not in said:
            some = console.recv(4096)
            assert some, said
            said += some
    return b"abc" in said


def memory(core: Path) -> bytes:
    """Guest RAM of an ELF core file."""
    elf = ELFFile(io.BytesIO(core.read_bytes()))
    assert (elf.header.e_type, elf.header.e_machine) == ("ET_CORE", "EM_X86_64")
    (load,) = elf.iter_segments("PT_LOAD")
    assert (load["p_paddr"], load["p_filesz"]) == (0, 64 << 20)
    return bytes(load.data())


def notes(core: Path) -> list[Any]:
    elf = ELFFile(io.BytesIO(core.read_bytes()))
    return [n for s in elf.iter_segments("PT_NOTE") for n in s.iter_notes()]


def dump(vm: Vm, core: Path) -> None:
    with vm.qmp() as qmp:
        qmp.execute("dump-guest-memory", {"protocol": f"file:{core}", "paging": False})


def test_a_dump_has_the_guests_memory_and_registers(host: VmHost, guest: Path, tmp_path: Path) -> None:
    vm = filled(host, guest)
    vm.snapshot(tmp_path / "template")
    with vm.qmp() as qmp:
        qmp.execute("stop")
        dump(vm, tmp_path / "core")
        qmp.execute("cont")
    ram = memory(tmp_path / "core")
    # The guest waits for a key: what the template has, the dump has.
    assert ram[RAM : RAM + PAGES * 4096] == (tmp_path / "template/memory").read_bytes()[RAM : RAM + PAGES * 4096]
    assert any(ram[RAM : RAM + 4096])
    assert (tmp_path / "core").stat().st_blocks * 512 < 8 << 20
    found = notes(tmp_path / "core")
    assert [(n["n_name"], n["n_type"]) for n in found] == [("CORE", "NT_PRSTATUS")] * 2 + [("QEMU", 0)] * 2
    cr0, _, _, cr3, _ = struct.unpack_from("<5Q", found[2]["n_descdata"], 392)
    rip = struct.unpack_from("<Q", found[2]["n_descdata"], 8 + 16 * 8)[0]
    assert cr0 & 1 << 31
    assert 0 < cr3 < 64 << 20
    assert 1 << 20 <= rip < 64 << 20
    assert answers(vm)


def test_a_running_guest_goes_on_after_it(host: VmHost, guest: Path, tmp_path: Path) -> None:
    vm = filled(host, guest)
    with vm.qmp() as qmp:
        qmp.execute("dump-guest-memory", {"protocol": f"file:{tmp_path / 'core'}", "paging": False, "detach": True})
        while (event := qmp.wait_event(60)) is not None and event["event"] != "DUMP_COMPLETED":
            assert event["event"] != "MIGRATION"
        assert event is not None
        assert event["data"] == {"result": {"status": "completed", "completed": 64 << 20, "total": 64 << 20}}
        assert qmp.execute("query-dump")["status"] == "completed"
        assert qmp.execute("query-migrate") == {"status": "none"}
        assert qmp.execute("query-status")["running"] is True
    assert memory(tmp_path / "core")[RAM]
    assert answers(vm)
    assert [p.name for p in tmp_path.glob("core*")] == ["core"]


def test_a_lazily_filled_clone_is_dumped_whole(host: VmHost, guest: Path, tmp_path: Path) -> None:
    vm = filled(host, guest)
    vm.snapshot(tmp_path / "template")
    vm.close()
    clone = host.start(machine(guest), template=tmp_path / "template", paused=True)
    dump(clone, tmp_path / "core")
    assert memory(tmp_path / "core") == (tmp_path / "template/memory").read_bytes()
    with clone.qmp() as qmp:
        qmp.execute("cont")
    assert answers(clone)


def test_a_dump_needs_no_sidecar(host: VmHost, guest: Path, tmp_path: Path) -> None:
    """What one of them has done may be what it is wanted for."""
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    vm = filled(host, guest, disks=[{"id": "d", "path": str(tmp_path / "disk.img")}])
    os.kill(vm.sidecar_pid("d"), 19)  # SIGSTOP
    try:
        dump(vm, tmp_path / "core")
    finally:
        os.kill(vm.sidecar_pid("d"), 18)  # SIGCONT
    assert memory(tmp_path / "core")[RAM]


def test_a_dump_to_a_descriptor(host: VmHost, guest: Path, tmp_path: Path) -> None:
    vm = filled(host, guest)
    with (tmp_path / "core").open("w+b") as file, vm.qmp() as qmp:
        qmp.getfd("core", file.fileno())
        qmp.execute("dump-guest-memory", {"protocol": "fd:core", "paging": False})
    assert memory(tmp_path / "core")[RAM]
    reader, writer = os.pipe()
    with vm.qmp() as qmp:
        qmp.getfd("pipe", writer)
        os.close(writer)
        with pytest.raises(
            QmpError, match="cannot be written: Invalid argument"
        ):  # it has holes, and a head at the end
            qmp.execute("dump-guest-memory", {"protocol": "fd:pipe", "paging": False})
    assert os.read(reader, 1) == b""
    os.close(reader)
    assert answers(vm)


def test_no_dump_leaves_nothing_and_the_guest_goes_on(host: VmHost, guest: Path, tmp_path: Path) -> None:
    vm = filled(host, guest)
    (tmp_path / "folder").mkdir()
    with vm.qmp() as qmp:
        for place, why in (("folder", "exists, and is not a file"), ("no/core", "there is no folder")):
            with pytest.raises(QmpError, match=why):
                dump(vm, tmp_path / place)
        core = next(p for p in vm.started["processes"] if p["role"] == "core")
        resource.prlimit(core["pid"], resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        with pytest.raises(QmpError, match="File too large"):
            dump(vm, tmp_path / "core")
        assert qmp.execute("query-dump")["status"] == "failed"
    assert not list(tmp_path.glob("core*"))
    assert answers(vm)


def test_vmmctl_dump(host: VmHost, guest: Path, tmp_path: Path) -> None:
    vm = filled(host, guest)
    command = [sys.executable, "-m", "motorcade.orchestrator.cli", "dump", vm.name, "vm.core"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60)
    assert memory(tmp_path / "vm.core")[RAM]
    done = subprocess.run([*command[:-1], "no/core"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (
        1,
        f"vmmctl: no dump of web: {tmp_path}/no/core: there is no folder {tmp_path}/no\n",
    )
    assert answers(vm)
