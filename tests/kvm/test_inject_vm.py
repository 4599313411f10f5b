"""vmmctl sidecar inject on a live micro-guest: what the guest sees of a disk that fails and one that is slow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import diskguest
from harness.vm import VmHost, vm_host
from motorcade.orchestrator import cli
from motorcade.orchestrator.errors import EXIT_ERROR, EXIT_NOT_FOUND, EXIT_USAGE

pytestmark = pytest.mark.kvm

IOERR, UNSUPP = 1, 2


@pytest.fixture
def host(tmp_path: Path) -> Iterator[VmHost]:
    """Where the VMs of the test live."""
    with vm_host(tmp_path) as h:
        yield h


def inject(*args: str) -> None:
    assert cli.main(["sidecar", "inject", "web", "root", *args]) == 0


def injected(capsys: pytest.CaptureFixture[str]) -> int:
    capsys.readouterr()
    assert cli.main(["sidecar", "stats", "web", "root", "--json"]) == 0
    return int(json.loads(capsys.readouterr().out)["detail"]["injected"])


@pytest.mark.parametrize("engine", ["auto", "sync"])
def test_requests_fail_as_asked_and_no_others(
    host: VmHost, guest: Path, tmp_path: Path, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    vm = host.start(diskguest.machine(tmp_path, guest, "rwwrfwrw", engine=engine))
    before = (tmp_path / "root.img").read_bytes()
    inject("--fail", "2", "--op", "write")
    assert [diskguest.do(vm) for _ in range(3)] == [0, IOERR, IOERR]
    assert (tmp_path / "root.img").read_bytes() == before
    inject("--fail", "9", "--status", "unsupp")
    assert [diskguest.do(vm), diskguest.do(vm)] == [UNSUPP, UNSUPP]
    inject("--clear")
    assert diskguest.do(vm) == 0
    inject("--delay", "30", "--fail", "1", "--op", "read")
    assert [diskguest.do(vm), diskguest.do(vm)] == [IOERR, 0]
    assert injected(capsys) == 5
    assert "write at byte 4096 failed: Input/output error" in vm.logs()


@pytest.mark.parametrize("engine", ["auto", "sync"])
def test_a_request_that_waits_is_let_go_by_a_snapshot(
    host: VmHost, guest: Path, tmp_path: Path, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would wait for an hour; what brings the sidecar to rest does not."""
    vm = host.start(diskguest.machine(tmp_path, guest, "ww", engine=engine))
    inject("--delay", "3600000")
    diskguest.begin(vm)
    while not injected(capsys):
        pass
    assert vm.snapshot(tmp_path / "template")["status"] == "completed"
    assert diskguest.wait(vm, 1) == 0
    assert diskguest.do(vm) == 0
    inject("--delay", "3600000")
    vm.close()


def test_a_request_that_waits_takes_so_long(host: VmHost, guest: Path, tmp_path: Path) -> None:
    vm = host.start(diskguest.machine(tmp_path, guest, "ww"))
    inject("--delay", "200")
    assert diskguest.do(vm) == 0
    with vm.qmp() as qmp:
        [queue] = qmp.execute("x-motorcade-sidecar-stats", {"id": "root"})["queues"]
    assert queue["latency-ns"] >= 200_000_000  # of the sidecar's own clock: not less, whatever the machine does


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        (["web", "root"], EXIT_USAGE, "give --fail, --delay or both; or --clear"),
        (["web", "root", "--clear", "--fail", "1"], EXIT_USAGE, "or --clear"),
        (["web", "root", "--delay", "1", "--status", "ioerr"], EXIT_USAGE, "give --fail N"),
        (["web", "root", "--fail", "1", "--count", "2"], EXIT_USAGE, "--count goes with --delay"),
        (["web", "root", "--fail", "0"], EXIT_USAGE, "1 to 4294967295"),
        (["web", "root", "--delay", "99999999"], EXIT_USAGE, "milliseconds"),
        (["web", "root", "--fail", "1", "--op", "rx"], EXIT_ERROR, "a disk has no rx requests"),
        (["web", "ttyS0", "--fail", "1"], EXIT_ERROR, "has no faults to inject"),
        (["web", "rot", "--fail", "1"], EXIT_NOT_FOUND, "web has no device rot"),
    ],
)
def test_what_cannot_be_injected(
    shared: None, capsys: pytest.CaptureFixture[str], args: list[str], status: int, said: str
) -> None:
    try:
        found = cli.main(["sidecar", "inject", *args])
    except SystemExit as e:
        found = int(e.code or 0)
    assert found == status
    assert said in capsys.readouterr().err


@pytest.fixture(scope="module")
def shared(guest: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One VM for all of those."""
    folder = tmp_path_factory.mktemp("shared")
    with vm_host(folder) as h:
        h.start(diskguest.machine(folder, guest, "w"))
        yield
