"""vmmctl sidecar ls, stats, log, pause and resume on a live micro-guest; docs/looking-in.md."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import diskguest
from harness.vm import VmHost, vm_host
from motorcade.orchestrator import cli
from motorcade.orchestrator.errors import EXIT_ERROR, EXIT_NOT_FOUND
from motorcade.orchestrator.qmpclient import QmpError

pytestmark = pytest.mark.kvm


@pytest.fixture
def host(tmp_path: Path) -> Iterator[VmHost]:
    """Where the VMs of the test live."""
    with vm_host(tmp_path) as h:
        yield h


def vmmctl(capsys: pytest.CaptureFixture[str], *args: str, status: int = 0) -> str:
    """Its output, or, where it is to fail, what it says."""
    capsys.readouterr()
    assert cli.main(["sidecar", *args]) == status
    out, err = capsys.readouterr()
    return err if status else out


def listed(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    return {s["device"]: s for s in json.loads(vmmctl(capsys, "ls", "web", "--json"))}


def stats(capsys: pytest.CaptureFixture[str]) -> dict[str, int]:
    result: dict[str, int] = json.loads(vmmctl(capsys, "stats", "web", "root", "--json"))["queues"][0]
    return result


def test_what_a_sidecar_does_is_counted_and_shown(
    host: VmHost, guest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vm = host.start(diskguest.machine(tmp_path, guest, "wwr"))
    assert [diskguest.do(vm) for _ in range(3)] == [0, 0, 0]
    counted = stats(capsys)
    assert (counted["requests"], counted["taken"], counted["in-flight"], counted["errors"]) == (3, 3, 0, 0)
    assert (counted["bytes-in"], counted["bytes-out"], counted["kicks"]) == (1024, 512, 3)
    assert sum(counted["latency"]) == 3  # type: ignore[call-overload]
    longest = max(n for n, count in enumerate(counted["latency"]) if count)  # type: ignore[arg-type]
    assert 1 << longest <= counted["latency-ns"] < 3 * (2 << longest)
    shown = vmmctl(capsys, "stats", "web", "root")
    assert "latency of queue 0" in shown
    assert "writes 2" in shown
    disk = listed(capsys)["root"]
    assert (disk["kind"], disk["state"], disk["restarts"]) == ("blk", "running", 0)
    assert disk["pid"] == vm.sidecar_pid("root")
    assert disk["queues"] == [{"index": 0, "size": 8, "in-flight": 0, "waiting": 0}]
    assert isinstance(disk["pss"], int)
    assert disk["pss"] > 1 << 20
    assert "root" in vmmctl(capsys, "ls", "web")
    assert "welcomed by the core" in vmmctl(capsys, "log", "web", "root")


def test_a_paused_disk_keeps_its_guest_waiting_over_a_snapshot_too(
    host: VmHost, guest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = diskguest.machine(tmp_path, guest, "wwww")
    vm = host.start(fields)
    assert diskguest.do(vm) == 0
    vmmctl(capsys, "pause", "web", "root")
    vmmctl(capsys, "pause", "web", "root")  # no harm in it
    diskguest.begin(vm)
    # The micro-guest resets its disk before each request, which a paused sidecar answers; then the request waits.
    waiting = [{"index": 0, "size": 8, "in-flight": 0, "waiting": 1}]
    while listed(capsys)["root"]["queues"] != waiting:
        assert listed(capsys)["root"]["state"] == "paused"
    assert vm.snapshot(tmp_path / "template")["status"] == "completed"
    disk = listed(capsys)["root"]
    assert (disk["state"], disk["queues"]) == ("paused", waiting)
    assert stats(capsys)["requests"] == 1
    vmmctl(capsys, "resume", "web", "root")
    assert diskguest.wait(vm, 2) == 0
    assert listed(capsys)["root"]["state"] == "running"
    vmmctl(capsys, "pause", "web", "root")
    vm.close()  # a paused disk's VM ends in good order
    clone = host.start({**fields, "name": "web"}, template=tmp_path / "template")
    assert diskguest.wait(clone, 2) == 0  # nobody paused it there
    assert diskguest.do(clone) == 0


def test_a_paused_serial_port_keeps_what_is_typed(
    host: VmHost, guest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vm = host.start(diskguest.machine(tmp_path, guest, "w"))
    with vm.attach() as uart:
        assert b"ready" in uart.recv(4096)
    vmmctl(capsys, "pause", "web", "ttyS0")
    with vm.attach() as uart:
        uart.sendall(b"x")
        vmmctl(capsys, "resume", "web", "ttyS0")
    assert diskguest.wait(vm, 1) == 0


def test_a_sidecar_that_hangs_gives_no_counters_and_says_so(
    host: VmHost, guest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vm = host.start(diskguest.machine(tmp_path, guest, "w"))
    pid = vm.sidecar_pid("root")
    os.kill(pid, signal.SIGSTOP)
    try:
        assert "'root' gave no counters" in vmmctl(capsys, "stats", "web", "root", status=EXIT_ERROR)
        assert listed(capsys)["root"]["queues"] == []  # it needs no answer for that
        with vm.qmp() as qmp, pytest.raises(QmpError, match="no answer to inject"):
            qmp.execute("x-motorcade-sidecar-inject", {"id": "root", "count": 0})
    finally:
        os.kill(pid, signal.SIGCONT)
    assert diskguest.do(vm) == 0


def test_names_that_are_none(
    host: VmHost, guest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    host.start(diskguest.machine(tmp_path, guest, "w"))
    for command in ("stats", "pause", "resume", "log"):
        said = vmmctl(capsys, command, "web", "rot", status=EXIT_NOT_FOUND)
        assert "web has no device rot" in said
        assert "root" in said
        assert "no VM is called wob" in vmmctl(capsys, command, "wob", "root", status=EXIT_NOT_FOUND)


def test_trace_events_are_switched_by_name(host: VmHost, guest: Path, tmp_path: Path) -> None:
    vm = host.start(diskguest.machine(tmp_path, guest, "w"))

    def state(qmp: object, name: str) -> dict[str, str]:
        return {e["name"]: e["state"] for e in qmp.execute("trace-event-get-state", {"name": name})}  # type: ignore[attr-defined]

    with vm.qmp() as qmp:
        assert set(state(qmp, "*").values()) == {"disabled"}
        qmp.execute("trace-event-set-state", {"name": "sidecar_t*", "enable": True})
        assert state(qmp, "sidecar_take") == {"sidecar_take": "enabled"}
        assert state(qmp, "sidecar_push") == {"sidecar_push": "disabled"}
        with pytest.raises(QmpError, match="unknown event"):
            qmp.execute("trace-event-get-state", {"name": "sidecar_"})
        with pytest.raises(QmpError, match="vCPU"):
            qmp.execute("trace-event-set-state", {"name": "*", "enable": True, "vcpu": 0})


def test_the_pager_cannot_be_paused_and_a_machine_at_rest_has_nothing_to_pause(
    host: VmHost, guest: Path, tmp_path: Path
) -> None:
    fields = diskguest.machine(tmp_path, guest, "w")
    vm = host.start(fields)
    assert vm.snapshot(tmp_path / "template")["status"] == "completed"
    vm.close()
    clone = host.start(fields, template=tmp_path / "template", paused=True)
    with clone.qmp() as qmp:
        with pytest.raises(QmpError, match="at rest"):
            qmp.execute("x-motorcade-sidecar-pause", {"id": "root"})
        with pytest.raises(QmpError, match="pager"):
            qmp.execute("x-motorcade-sidecar-pause", {"id": "pager"})


def test_stats_again_and_again(
    host: VmHost, guest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--watch shows what was new, and Ctrl-C ends it."""
    vm = host.start(diskguest.machine(tmp_path, guest, "ww"))
    assert diskguest.do(vm) == 0
    waits = [lambda: diskguest.do(vm), lambda: signal.raise_signal(signal.SIGINT)]
    monkeypatch.setattr("time.sleep", lambda _s: waits.pop(0)())
    lines = vmmctl(capsys, "stats", "web", "root", "--json", "--watch", "1").splitlines()
    assert [json.loads(line)["queues"][0]["requests"] for line in lines] == [1, 1]


