"""What QMP says of a live machine is so: counts of the guest's own requests, its memory, its registers, its threads."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.disk import FLUSH, IN, OK, OUT
from harness.guestdriver import F_FLUSH, GuestDriver, Script
from harness.qmp import QmpClient
from harness.vm import Vm, VmHost, vm_host
from harness.wholevm import hear

pytestmark = pytest.mark.kvm
PLACE, WORD = 0x900000, 0xB9000001


@pytest.fixture
def host(tmp_path: Path) -> Iterator[VmHost]:
    with vm_host(tmp_path) as h:
        yield h


def machine(guest: Path, folder: Path, script: Script | None = None, **fields: Any) -> dict[str, Any]:
    script = script or Script()
    script.words += ["print=ready", "serve=0:0"]
    (folder / "disk.img").write_bytes(bytes(1 << 20))
    return {
        "name": "true",
        "memory": "32M",
        "kernel": {"image": str(guest), "cmdline": "initrd", "initrd": str(script.write(folder))},
        "disks": [{"id": "vda", "path": str(folder / "disk.img")}],
        **fields,
    }


def ready(vm: Vm) -> None:
    with vm.attach() as uart:
        hear(uart, b"ready")


def pong(vm: Vm) -> None:
    """The guest goes on."""
    with vm.attach() as uart:
        uart.sendall(b"?")
        hear(uart, b"pong")


def stats(answer: list[dict[str, Any]]) -> dict[str, int]:
    (disk,) = answer
    assert disk["device"] == "vda"
    return {name: value for name, value in disk["stats"].items() if type(value) is int and value}


def test_block_statistics_count_what_the_guest_did(host: VmHost, guest: Path, tmp_path: Path) -> None:
    script = Script()
    disk = GuestDriver(script, 0, F_FLUSH)
    for sector, size in ((0, 512), (8, 4096)):
        disk.request(OUT, sector, OK, size)
    disk.request(IN, 8, OK, 1024)
    disk.request(FLUSH, 0, OK, 0)
    vm = host.start(machine(guest, tmp_path, script))
    ready(vm)
    with vm.qmp() as qmp:
        assert stats(qmp.execute("query-blockstats")) == {
            "rd_bytes": 1024, "rd_operations": 1, "wr_bytes": 4608, "wr_operations": 2, "flush_operations": 1,
        }  # fmt: skip


def test_a_sidecar_that_hangs_holds_up_no_answer(host: VmHost, guest: Path, tmp_path: Path) -> None:
    """It has what it said last; and meanwhile other clients are served."""
    script = Script()
    GuestDriver(script, 0, F_FLUSH).request(OUT, 0, OK)
    vm = host.start(machine(guest, tmp_path, script))
    ready(vm)
    with vm.qmp() as qmp, QmpClient(str(vm.run_dir / "qmp.sock")) as raw:
        before = stats(qmp.execute("query-blockstats"))
        assert before == {"wr_bytes": 512, "wr_operations": 1}
        os.kill(vm.sidecar_pid("vda"), signal.SIGSTOP)
        try:
            raw.read()
            raw.send(b'{"execute":"query-blockstats"}{"execute":"query-name"}')
            assert qmp.execute("query-status")["running"]
            pong(vm)
            answer = raw.read()["return"]
            assert stats(answer) == before
            assert raw.read() == {"return": {"name": "true"}}
        finally:
            os.kill(vm.sidecar_pid("vda"), signal.SIGCONT)
        assert stats(qmp.execute("query-blockstats")) == before


def test_memory_and_registers_are_the_guests(host: VmHost, guest: Path, tmp_path: Path) -> None:
    script = Script()
    script.store(PLACE, WORD)
    vm = host.start(machine(guest, tmp_path, script, cpus=2))
    ready(vm)
    with vm.qmp() as qmp:

        def register(name: str, vcpu: int = 0) -> int:
            return int(qmp.execute("query-vcpu-reg", {"addr": name, "vcpu": vcpu}), 16)

        assert qmp.execute("query-mem-gpa", {"gpa": f"{PLACE:x}"}) == f"{WORD:X}"
        assert qmp.execute("query-memory-size-summary") == {"base-memory": 32 << 20, "plugged-memory": 0}
        for _ in range(20):  # it runs, stands, and runs again
            assert 0x100000 <= register("rip") < 32 << 20
        assert register("cr0") & 0x80000001 == 0x80000001  # paging and protection
        efer = register("efer")
        assert efer & 0x500 == 0x500  # long mode, enabled and active
        assert register("c0000080") == register("0xC0000080") == efer
        assert register("rflags") & 2
        assert register("cs.limit") == 0xFFFFFFFF
        assert not qmp.events  # nobody is told that it stood still
        text = qmp.execute("human-monitor-command", {"command-line": "info registers"})
        assert f"efer={efer:x}" in text
        assert qmp.execute("human-monitor-command", {"command-line": f"xp /1xw {PLACE:#x}"}).endswith("0xb9000001\r\n")
        pong(vm)
        qmp.execute("stop")
        rip = register("rip")
        assert register("rip") == rip
        assert qmp.execute("query-status")["status"] == "paused"
        qmp.execute("cont")
        pong(vm)


def test_threads_are_the_cores(host: VmHost, guest: Path, tmp_path: Path) -> None:
    vm = host.start(machine(guest, tmp_path, cpus=2))
    core = next(p["pid"] for p in vm.started["processes"] if p["role"] == "core")
    with vm.qmp() as qmp:
        tids = [cpu["thread_id"] for cpu in qmp.execute("query-cpus")]
        assert [cpu["thread-id"] for cpu in qmp.execute("query-cpus-fast")] == tids
    names = [Path(f"/proc/{core}/task/{tid}/comm").read_text() for tid in tids]
    assert len(set(tids)) == 2
    assert all("vcpu" in name.lower() for name in names), names


def test_unix_and_tcp_sockets_of_ones_own(host: VmHost, guest: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    path = tmp_path / "own.sock"
    addresses = [f"unix:{path},server,nowait", f"tcp:127.0.0.1:{port},server,nowait"]
    vm = host.start(machine(guest, tmp_path, qmp=addresses))
    assert path.stat().st_mode & 0o777 == 0o600
    assert (vm.run_dir / "qmp.sock").stat().st_mode & 0o777 == 0o600
    with QmpClient(str(path)) as one, QmpClient(("127.0.0.1", port)) as other, vm.qmp() as third:
        assert one.read().keys() == other.read().keys() == {"QMP"}
        assert other.ask("query-name") == one.ask("query-name") == {"return": {"name": "true"}}
        assert other.ask("stop")["event"] == one.read()["event"] == "STOP"
        assert other.read() == {"return": {}}
        third.execute("query-name")
        assert [e["event"] for e in third.events] == ["STOP"]


def test_a_client_that_never_reads_holds_up_neither_the_vm_nor_its_end(
    host: VmHost, guest: Path, tmp_path: Path
) -> None:
    vm = host.start(machine(guest, tmp_path))
    ready(vm)
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.connect(str(vm.run_dir / "qmp.sock"))
        deaf.setblocking(False)
        request, sent = b'{"execute":"query-qmp-schema"}' * 1000, 0
        end = time.monotonic() + 60
        while sent < 10 * len(request) and time.monotonic() < end:
            try:
                sent += deaf.send(request)
            except BlockingIOError:
                break  # the server has stopped taking its commands
        with vm.qmp() as qmp:
            pong(vm)
            qmp.execute("quit")
            assert vm.wait_end()["reason"] == "host-qmp-quit"
