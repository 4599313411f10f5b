"""kill -9 of a clone's pager, again and again, while all of its memory is touched; and a template that goes away."""

from __future__ import annotations

import os
import random
import select
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import microguest, wholevm
from harness.vm import DEADLINE, Vm, VmHost, vm_host
from motorcade.orchestrator import pagers

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm is not there or not accessible"),
]

KILLS = 40
PAGES = 112 << 8  # 112 MiB


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VmHost]:
    """Where the VMs of the test live. At the end there is no overlay."""
    overlays = tmp_path / "overlays"
    overlays.mkdir()
    monkeypatch.setenv("MOTORCADE_OVERLAY_DIR", str(overlays))
    with vm_host(tmp_path) as h:
        yield h
    assert list(overlays.iterdir()) == []


def machine() -> dict[str, Any]:
    cmdline = f"ram={wholevm.RAM}:{PAGES}:100 serve=0:0"
    return {"name": "web", "memory": "128M", "kernel": {"image": str(microguest.build()), "cmdline": cmdline}}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a guest with much to fetch."""
    folder = tmp_path_factory.mktemp("template")
    with vm_host(folder) as host:
        vm = host.start(machine())
        with vm.attach() as uart:
            wholevm.hear(uart, b"ram ")
            uart.sendall(b"?")
            wholevm.hear(uart, b"pong")
        assert vm.snapshot(folder / "t")["status"] == "completed"
    return folder / "t"


def pager(vm: Vm) -> int:
    """The pid of the present one; 0 where there is none. The kernel knows it before anybody has written it down."""
    children = Path(f"/proc/{vm.pid}/task/{vm.pid}/children").read_text().split()
    others = {int(p["pid"]) for p in vm.started["processes"] if p["role"] != pagers.ID}
    return next((int(pid) for pid in children if int(pid) not in others), 0)


def kill_pagers(vm: Vm, count: int, rng: random.Random, until: int | None = None) -> int:
    """Each a little later than it was seen, until that many are dead or ``until`` is readable. How many it were."""
    fds = [until] if until is not None else []
    killed, last, end = 0, 0, time.monotonic() + DEADLINE
    while killed < count and not select.select(fds, [], [], 0)[0]:
        assert time.monotonic() < end, f"no other pager after {killed}"
        if (now := pager(vm)) in (0, last):
            continue
        select.select(fds, [], [], rng.uniform(0, 0.02))  # how far it has come is variety, not result
        os.kill(now, signal.SIGKILL)
        killed, last = killed + 1, now
    return killed


def impatient(patch: pytest.MonkeyPatch, deaths: int) -> None:
    """The supervisor, which is forked from this process, replaces at once, and that many times."""
    patch.setattr(pagers, "_BACK_OFF", 0.0)
    patch.setattr(pagers, "_MOST_DEATHS", deaths)


def test_dozens_of_pagers_are_killed_while_all_of_memory_is_touched(
    host: VmHost, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No fault waits for ever, no byte is wrong; core and sidecars are none the wiser."""
    impatient(monkeypatch, KILLS + 1)
    killed = 0
    for seed in range(2):
        vm = host.start(machine(), template=template)
        with vm.attach() as uart:
            said = wholevm.hear(uart, b"pong")  # of its former life
            while not said.endswith(b"\n"):
                said += uart.recv(4096)
            uart.sendall(b"c")
            killed += kill_pagers(vm, KILLS, random.Random(seed), uart.fileno())
            wholevm.hear(uart, b"bad 0")
            uart.sendall(b"c")
            wholevm.hear(uart, b"bad 0")
        with vm.qmp() as qmp:
            assert qmp.execute("query-status")["running"] is True
            end = time.monotonic() + DEADLINE
            while (states := {row["state"] for row in qmp.execute("x-motorcade-sidecars")}) != {"present"}:
                assert time.monotonic() < end, states
        vm.close()
    assert killed >= 24, killed


def test_one_that_never_lives_ends_the_vm_with_the_reason(
    host: VmHost, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(monkeypatch, 3)
    vm = host.start({**machine(), "restarts": 0}, template=template)
    killed = kill_pagers(vm, 4, random.Random(1))
    ended = vm.wait_end(passing={"sidecar-died"})
    assert killed == 4
    assert (ended["status"], ended["reason"]) == (1, "template-damaged")
    assert ended["detail"] == "the pager ended 3 times in a row: killed by SIGKILL"


def test_the_template_s_directory_is_removed_while_a_clone_runs(host: VmHost, template: Path, tmp_path: Path) -> None:
    """What is open stays: chunks that are touched later, also by another pager. What needs its name does without."""
    mine = tmp_path / "mine"
    shutil.copytree(template, mine, copy_function=os.link)
    (mine / "working-set").unlink(missing_ok=True)
    vm = host.start(machine(), template=mine, paused=True)
    shutil.rmtree(mine)
    with vm.qmp() as qmp, vm.attach() as uart:
        wholevm.hear(uart, b"pong")
        qmp.execute("cont")
        end = time.monotonic() + DEADLINE
        while "recorded a working set" not in vm.logs():
            assert time.monotonic() < end
            uart.sendall(b"r9.")  # a first touch, and one after the recorded time
            wholevm.hear(uart, b"touched 9 bad 0")
        os.kill(pager(vm), signal.SIGKILL)
        uart.sendall(b"c")
        wholevm.hear(uart, b"bad 0")
        info = vm.snapshot(tmp_path / "child", base=str(mine))
        assert (info["status"], info["error-desc"]) == ("failed", f"{mine}: no such directory")
        assert vm.snapshot(tmp_path / "all", live=True)["status"] == "completed"
        assert not list(tmp_path.glob("child*"))
        assert not mine.exists()
        uart.sendall(b"c")
        wholevm.hear(uart, b"bad 0")
    wholevm.verify(tmp_path / "all")
