"""VMs whose supervisors a zygote forks, prepared or not, as vmmctl starts and ends them."""

from __future__ import annotations

import json
import os
import select
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from harness.vmmctl import Host, gone, write_machine
from harness.zygotes import DEADLINE, await_full, await_gone, family, status
from motorcade.orchestrator import config, daemon, lifeline, pool, zygoteclient

pytestmark = pytest.mark.kvm

POWER_OFF = "out=1540:52"  # to the ACPI sleep control register (core/pm.py)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with Host() as h:
        monkeypatch.setenv("MOTORCADE_RUN_DIR", str(h.run_dir))
        yield h
        h.vmmctl("zygote", "stop")


def forked(host: Host) -> int:
    return int(json.loads(host.vmmctl("zygote", "status", "--json").stdout)["forked"])


def test_start_status_and_stop(host: Host) -> None:
    assert "no zygote" in host.vmmctl("zygote", "status", check=3).stdout
    assert "runs (pid" in host.vmmctl("zygote", "start").stdout
    assert "runs (pid" in host.vmmctl("zygote", "start").stdout
    assert "forked 0" in host.vmmctl("zygote", "status").stdout
    host.vmmctl("zygote", "stop")
    assert "no zygote" in host.vmmctl("zygote", "stop").stdout


def test_up_uses_it_and_is_as_it_ever_was(host: Host, guest: Path, tmp_path: Path) -> None:
    """Output, status, and that the VM ends with a vmmctl that is killed, though the supervisor is no child of it."""
    file = write_machine(tmp_path, "web", guest, cmdline=f"print=hello {POWER_OFF}")
    host.vmmctl("zygote", "start")
    assert host.vmmctl("up", str(file)).stdout.replace("\r", "") == "hello\n"
    broken = write_machine(tmp_path, "bad", guest, cmdline="fault")
    assert "triple-fault" in host.vmmctl("up", str(broken), check=1).stderr
    nowhere = write_machine(tmp_path, "no", "/nowhere/vmlinux")
    assert "/nowhere/vmlinux" in host.vmmctl("up", str(nowhere), check=None).stderr
    waits = write_machine(tmp_path, "db", guest, cmdline="print=hello")
    with host.running("up", str(waits)) as vmmctl:
        assert vmmctl.stdout is not None
        assert vmmctl.stdout.read(5) == b"hello"
        pids = host.live_pids("db")
        vmmctl.kill()
        gone(pids)
    assert forked(host) >= 3
    assert host.names() == []


def test_vms_outlive_it(host: Host, guest: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        host.vmmctl("zygote", "start")
        host.vmmctl("up", "-d", str(write_machine(tmp_path, name, guest)))
    zygote = json.loads(host.vmmctl("zygote", "status", "--json").stdout)["pid"]
    process = psutil.Process(zygote)
    assert process.pid == psutil.Process(host.pid("one", "supervisor")).ppid()
    os.kill(zygote, signal.SIGKILL)
    await_gone([process])
    for name in ("one", "two"):
        assert json.loads(host.vmmctl("qmp", name, "query-status").stdout)["running"] is True
        host.vmmctl("down", "--force", name)
    assert host.names() == []


def order(tmp_path: Path, guest: Path, name: str, **fields: object) -> daemon.Order:
    (tmp_path / f"{name}.img").write_bytes(bytes(1 << 20))
    disks = [{"id": "root", "path": f"{name}.img"}]
    file = write_machine(tmp_path, name, guest, disks=disks, cmdline="print=hello", **fields)
    machine, _ = config.load(str(file))
    return daemon.Order(machine, str(file), "kvm", False)


def await_running(line: object) -> list[dict[str, object]]:
    """The processes, once it runs."""
    processes: list[dict[str, object]] = []
    while True:
        message = lifeline.receive(line)  # type: ignore[arg-type]
        assert message is not None
        assert message["event"] in {"progress", "started", "running"}, message
        processes = message.get("processes", processes)
        if message["event"] == "running":
            return processes


def test_a_prepared_vm_is_taken_with_all_its_processes(host: Host, guest: Path, tmp_path: Path) -> None:
    wanted = order(tmp_path, guest, "web")
    shape = pool.shape(wanted.machine)
    assert shape == {"sidecars": {"blk": 1, "serial": 1}, "memory": 16 << 20}
    with zygoteclient.start(pool=2) as zygote:
        zygote.fork(shape)[1].close()
        shelf = await_full(zygote, 2)
        spare = psutil.Process(shelf["forked"][0])
        children = {child.pid for child in spare.children()}
        assert len(children) == 3
        pid, line = zygote.fork(shape)
        with line:
            assert pid == spare.pid
            daemon.start(line, wanted)
            assert {p["pid"] for p in await_running(line)} == children
            titles = {child.cmdline()[0] for child in spare.children()}
            assert titles == {f"motorcade: {r} (web)" for r in ("core", "blk-root", "serial-ttyS0")}
            await_full(zygote, 2)
        await_gone([spare])
    assert host.names() == []


def test_a_prepared_process_that_died_is_made_again(host: Host, guest: Path, tmp_path: Path) -> None:
    wanted = order(tmp_path, guest, "web")
    shape = pool.shape(wanted.machine)
    with zygoteclient.start(pool=1) as zygote:
        zygote.fork(shape)[1].close()
        spare = psutil.Process(await_full(zygote, 1)["forked"][0])
        children = spare.children()
        for child in children:
            child.kill()
        host.wait_for("their end", lambda: all(c.status() == psutil.STATUS_ZOMBIE for c in children))
        _, line = zygote.fork(shape)
        with line:
            daemon.start(line, wanted)
            assert len(await_running(line)) == 3
        await_gone([spare])


def test_another_shape_than_was_asked_for_runs_too(host: Host, guest: Path, tmp_path: Path) -> None:
    """What is missing is forked, what is too many ends with the VM."""
    consoles = [{"id": "hvc0"}, {"id": "hvc1"}]
    wanted = order(tmp_path, guest, "web", consoles=consoles)
    shape = {"sidecars": {"net": 1, "serial": 1}}
    with zygoteclient.start(pool=1) as zygote:
        zygote.fork(shape)[1].close()
        await_full(zygote, 1)
        pid, line = zygote.fork(shape)
        processes = family(pid)
        with line:
            daemon.start(line, wanted)
            assert len(await_running(line)) == 5
        await_gone(processes)
    assert host.names() == []


def test_twenty_vms_at_once(host: Host, guest: Path, tmp_path: Path) -> None:
    orders = [order(tmp_path, guest, f"vm{n}") for n in range(20)]
    with ExitStack() as stack, zygoteclient.start(pool=3) as zygote:
        shape = pool.shape(orders[0].machine)
        zygote.fork(shape)[1].close()
        await_full(zygote, 3)
        started = []
        for wanted in orders:
            pid, line = zygote.fork(shape)
            stack.enter_context(line).settimeout(DEADLINE)
            daemon.start(line, wanted)
            started.append((pid, line))
        for _, line in started:
            await_running(line)
        assert len(host.names()) == 20
        assert status(zygote)["running"] >= 20
        pidfds = [lifeline.pidfd(line, pid) for pid, line in started]
        stack.close()
        for pidfd in pidfds:
            assert pidfd is not None
            assert select.select([pidfd], [], [], DEADLINE)[0]
            os.close(pidfd)
    assert host.names() == []


def test_a_prepared_core_has_its_kvm_vm_already(host: Host, guest: Path, tmp_path: Path) -> None:
    """With RAM of the VM's size; for another size all processes are made anew, and none is left waiting."""
    wanted = order(tmp_path, guest, "web")
    for memory in (16 << 20, 32 << 20):
        shape = {**pool.shape(wanted.machine), "memory": memory}
        with zygoteclient.start(pool=1) as zygote:
            zygote.fork(shape)[1].close()
            spare = psutil.Process(await_full(zygote, 1)["forked"][0])
            # It takes its name itself, after the spare has said that all are forked.
            host.wait_for("the core", lambda spare=spare: any("core" in c.cmdline()[0] for c in spare.children()))
            core = next(c for c in spare.children() if "core" in c.cmdline()[0])
            host.wait_for("a blank VM", lambda core=core: kvm_vms(core.pid))
            before = kvm_vms(core.pid)
            _, line = zygote.fork(shape)
            with line:
                daemon.start(line, wanted)
                pids = {p["role"]: p["pid"] for p in await_running(line)}
                assert (pids["core"] == core.pid) == (memory == 16 << 20)
                assert len(kvm_vms(pids["core"])) == 1
                assert memory != 16 << 20 or kvm_vms(core.pid) == before
                assert core.is_running() == (memory == 16 << 20)
            await_gone([spare])
            zygote.stop()


def kvm_vms(pid: int) -> list[str]:
    """The descriptors of KVM VMs that a process has."""
    fds = Path(f"/proc/{pid}/fd")
    return [fd.name for fd in fds.iterdir() if str(fd.readlink()) == "anon_inode:kvm-vm"]
