"""The core's sandbox and a whole VM's: what is tried in the core ends the VM by name, what is tried in a sidecar ends
the sidecar; and `vmmctl sidecar sandbox` says what the kernel says."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import diskguest
from harness.prisoners import ATTEMPTS, EVERYWHERE
from harness.vm import DEADLINE, VmHost, vm_host
from motorcade.core.loop import Loop
from motorcade.core.vcpu import Vcpus
from motorcade.orchestrator import cli
from motorcade.orchestrator.errors import EXIT_NOT_FOUND
from motorcade.orchestrator.qmpclient import QmpError
from motorcade.sidecars.blk.device import BlkDevice

pytestmark = pytest.mark.kvm
DIED = ("progress", "running", "sidecar-died")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[VmHost]:
    """Where the VMs of the test live."""
    with vm_host(tmp_path) as h:
        yield h


def after(target: type, name: str, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Has the attempt made where ``target.name`` is called, in the VM's processes."""
    real: Callable[..., Any] = getattr(target, name)
    test = os.getpid()

    def attempt(*args: Any) -> Any:
        assert os.getpid() != test
        ATTEMPTS[what][1]()
        return real(*args)

    monkeypatch.setattr(target, name, attempt)


@pytest.mark.parametrize("what", EVERYWHERE)
def test_what_the_core_may_not_do_ends_the_vm(
    host: VmHost, guest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    after(Loop, "_dispatch", monkeypatch, what)
    with pytest.raises(AssertionError, match=rf"core failed: seccomp: {ATTEMPTS[what][0]}\b"):
        host.start(diskguest.machine(tmp_path, guest, "w"))


def test_nor_may_its_vcpus(host: VmHost, guest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after(Vcpus, "_serve", monkeypatch, "a file")
    try:
        vm = host.start(diskguest.machine(tmp_path, guest, "w"))
    except AssertionError as e:
        assert "core failed: seccomp: openat" in str(e)  # before it was said to run
    else:
        ended = vm.wait_end(passing=DIED)
        assert (ended["reason"], "seccomp: openat" in ended["detail"]) == ("core-died", True)


def test_a_sidecars_violation_is_named_to_everybody(
    host: VmHost, guest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after(BlkDevice, "stats", monkeypatch, "exec")
    vm = host.start(diskguest.machine(tmp_path, guest, "w"))
    with vm.qmp() as qmp:
        with pytest.raises(QmpError, match="gave no counters"):
            qmp.execute("x-motorcade-sidecar-stats", {"id": "root"})
        while (event := qmp.wait_event(DEADLINE)) is not None and event["event"] != "SIDECAR_EXITED":
            pass
        assert event is not None
        assert "seccomp: execve" in event["data"]["reason"]
        assert qmp.execute("query-status")["running"]
    assert "seccomp: execve(0x" in (vm.run_dir / "log" / "blk-root.log").read_text()


def test_what_the_kernel_says(
    host: VmHost, guest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vm = host.start(diskguest.machine(tmp_path, guest, "w") | {"devices": [{"id": "rng0", "kind": "rng"}]})
    for device, role, log in (
        ("root", "blk", "blk-root.log"),
        ("ttyS0", "serial", "serial-ttyS0.log"),
        ("rng0", "kit", "rng-rng0.log"),
        ("core", "core", "core.log"),
    ):
        capsys.readouterr()
        assert cli.main(["sidecar", "sandbox", "web", device, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["role"], told["root"]) == (role, [])
        assert told["seccomp"] == {"mode": "filter", "filters": 1}
        assert told["no-new-privileges"]
        assert int(told["capabilities"]["effective"], 16) == int(told["capabilities"]["permitted"], 16) == 0
        assert {n for n, own in told["namespaces"].items() if own} >= {"user", "mnt", "net", "ipc", "uts"}
        assert told["limits"]["core"] == "0"
        kvm = [fd for fd in told["descriptors"].values() if "kvm" in fd]
        assert bool(kvm) == (device == "core")
        paths = {f for f in told["descriptors"].values() if f.startswith("/")}
        files = {f for f in paths if not f.startswith(("/memfd:", "/dev/"))}
        given = {"root": {tmp_path / "root.img"}, "core": {guest, tmp_path / "script"}}.get(device, set())
        assert files == {str(path) for path in {*given, vm.run_dir / "log" / log}}
        assert all(line["why"] for line in told["calls"])
    assert cli.main(["sidecar", "sandbox", "web", "root"]) == 0
    shown = capsys.readouterr().out
    assert "seccomp        filter (1)" in shown
    assert "root           empty" in shown
    assert "io_uring_enter, io_uring_register" in shown
    assert cli.main(["sidecar", "sandbox", "web", "disk9"]) == EXIT_NOT_FOUND
