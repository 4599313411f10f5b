"""Snapshots of machines that lose a process, or whose target loses its space, at any moment.

Either there is a template, and it is whole, or there is nothing. The rest of the machine goes on.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import select
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness import microguest, wholevm
from harness.disk import small_tmpfs
from harness.vm import VmHost, vm_host
from harness.vmmctl import Host, gone

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm is not there or not accessible"),
]

PAGE = 4096


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VmHost]:
    """Where the VMs of the test live. At the end there is no overlay."""
    overlays = tmp_path / "overlays"
    overlays.mkdir()
    monkeypatch.setenv("MOTORCADE_OVERLAY_DIR", str(overlays))
    with vm_host(tmp_path) as h:
        yield h
    assert list(overlays.iterdir()) == []


@dataclass(frozen=True)
class Original:
    """A machine with all kinds of devices in the middle of things, and its template."""

    machine: dict[str, Any]
    template: Path
    seconds: float  # that a snapshot takes

    def moments(self, count: int, seed: str) -> Iterator[tuple[int, bool, float]]:
        """Numbers, whether live, and when: each in another part of the time that a snapshot takes, and a bit after."""
        rng = random.Random(seed)
        for n in range(count):
            yield n, bool(n % 2), self.seconds * 1.1 * (n // 2 * 2 + 2 * rng.random()) / count


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Original:
    """Made once."""
    folder = tmp_path_factory.mktemp("whole")
    machine = wholevm.machine(folder, microguest.build(), cpus=1)
    with vm_host(folder) as host:
        vm = host.start(machine)
        wholevm.busy(vm)
        info = vm.snapshot(folder / "t")
        assert info["status"] == "completed", info
    return Original(machine, folder / "t", info["total-time"] / 1000)


def used(folder: Path) -> dict[str, int]:
    """Bytes on the disk, by file."""
    return {p.name: p.stat().st_blocks * 512 for p in folder.iterdir()}


# No space left.


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="a file system of the test's own needs root")
@pytest.mark.parametrize("live", [False, True])
def test_no_space_left_at_each_file(host: VmHost, original: Original, tmp_path: Path, live: bool) -> None:
    sizes = used(original.template)
    disks = sum(size for name, size in sizes.items() if name.startswith("disk-"))
    assert disks
    assert sizes["state"] > 2 * PAGE
    # Live, memory comes before the disks; else it is the other way round. The state comes last.
    memory_first = {"memory": sizes["memory"] // 2, "disk ": sizes["memory"] + disks // 4}
    disks_first = {"disk ": disks // 4, "memory": disks + sizes["memory"] // 2}
    vm = host.start(original.machine, template=original.template)
    for what, size in {**(memory_first if live else disks_first), "": sum(sizes.values()) - 2 * PAGE}.items():
        with small_tmpfs(size // PAGE * PAGE) as own:
            folder = Path(f"/proc/{os.getpid()}/fd/{own.name}")  # as others see it
            info = vm.snapshot(folder / "t", live=live)
            assert info["status"] == "failed", (what, size)
            assert what in info["error-desc"]
            assert info["error-desc"].endswith("No space left on device"), info
            assert list(folder.iterdir()) == []
    with small_tmpfs(sum(sizes.values()) + (1 << 20)) as own:
        assert vm.snapshot(Path(f"/proc/{os.getpid()}/fd/{own.name}/t"), live=live)["status"] == "completed"
        wholevm.verify(own / "t")
    wholevm.finish(vm)


# Processes that are killed.


class Kill:
    """SIGKILL after some time, on a thread."""

    def __init__(self, pid: int, seconds: float) -> None:
        self.pid = pid
        self._timer = threading.Timer(seconds, os.kill, (pid, signal.SIGKILL))

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.join()


def whole_or_nothing(folder: Path, name: str, status: str) -> None:
    """What there is of a template, when its snapshot has ended so."""
    if status == "completed":
        wholevm.verify(folder / name)
    else:
        assert list(folder.glob(f"{name}*")) == []


@pytest.mark.parametrize("victim", ["over", "raw", "lan", "hvc0"])
def test_a_sidecar_at_any_moment(host: VmHost, original: Original, tmp_path: Path, victim: str) -> None:
    for n, live, moment in original.moments(6, victim):
        vm = host.start(original.machine, template=original.template)
        with Kill(vm.sidecar_pid(victim), moment):
            info = vm.snapshot(tmp_path / f"t{n}", live=live)
        whole_or_nothing(tmp_path, f"t{n}", info["status"])
        if info["status"] == "failed":
            assert info["error-desc"].startswith(f"{victim}: its sidecar "), info
        # Another has taken its place, and a snapshot of the machine has it.
        vm.await_event("sidecar-died")
        with vm.qmp() as qmp:
            while any(row["state"] != "present" for row in qmp.execute("x-motorcade-sidecars")):
                pass
            assert qmp.execute("query-status")["running"] is True
        assert vm.snapshot(tmp_path / f"later{n}", live=live)["status"] == "completed"
        whole_or_nothing(tmp_path, f"later{n}", "completed")
        if victim in ("raw", "lan"):
            # The others' successors have interrupted once for nothing, which is all that this guest's driver waits for.
            wholevm.finish(vm)
        vm.close()


def test_the_core_at_any_moment(host: VmHost, original: Original, tmp_path: Path) -> None:
    for n, live, moment in original.moments(8, "core"):
        vm = host.start(original.machine, template=original.template)
        core = next(int(p["pid"]) for p in vm.started["processes"] if p["role"] == "core")
        with vm.qmp() as qmp:
            qmp.execute("x-motorcade-snapshot", {"dir": str(tmp_path / f"t{n}"), "live": live})
            with Kill(core, moment):
                ended = vm.wait_end()
        assert (ended["status"], ended["reason"]) == (1, "core-died")
        whole = (tmp_path / f"t{n}").exists()
        whole_or_nothing(tmp_path, f"t{n}", "completed" if whole else "failed")
        assert list(tmp_path.glob("*.part")) == []


def test_the_process_that_copies_the_disks(host: VmHost, tmp_path: Path) -> None:
    machine = wholevm.machine(tmp_path, microguest.build(), cpus=1)
    with (tmp_path / "raw.img").open("wb") as f:
        for _ in range(96):
            f.write(os.urandom(1 << 20))
    vm = host.start(machine)
    wholevm.busy(vm)
    known = set(psutil.Process(vm.pid).children())
    with vm.qmp() as qmp:
        for n in itertools.count():
            qmp.execute("x-motorcade-snapshot", {"dir": str(tmp_path / f"t{n}")})
            while not (copier := set(psutil.Process(vm.pid).children()) - known):
                if qmp.execute("query-migrate")["status"] not in ("setup", "active"):
                    break
            for process in copier:
                with contextlib.suppress(psutil.NoSuchProcess):  # it was through
                    process.kill()
            info = vm.await_snapshot(qmp)
            whole_or_nothing(tmp_path, f"t{n}", info["status"])
            if info["status"] == "failed":
                break
    assert info["error-desc"] == "the process that copies the disks was killed by SIGKILL"
    wholevm.finish(vm)


# Supervisors that are killed.


def test_supervisors_of_clones_that_start(original: Original, tmp_path: Path) -> None:
    """vmmctl clone says which did not make it; the others run; of those that were killed there is nothing left."""
    overlays = tmp_path / "overlays"
    overlays.mkdir()
    rng = random.Random(1)
    with Host() as host, contextlib.ExitStack() as stack:
        stack.callback(host.vmmctl, "zygote", "stop", check=None)
        host.env["MOTORCADE_OVERLAY_DIR"] = str(overlays)
        for n in range(2):
            victims: dict[str, list[int]] = {}
            words = ("--name", f"c{n}-{{n}}")
            with host.running("clone", str(original.template), "-n", "5", *words) as process:
                for victim in (f"c{n}-2", f"c{n}-4"):
                    host.wait_for("its supervisor", lambda: host.state(victim).get("pid"))  # noqa: B023
                    select.select([], [], [], rng.uniform(0, 0.2))  # how far it has come is variety, not result
                    victims[victim] = host.live_pids(victim)
                    os.kill(host.pid(victim, "supervisor"), signal.SIGKILL)
                out, err = process.communicate(timeout=60)
            ran = {line.split()[0] for line in out.decode().splitlines()}
            failed = set(re.findall(r"vmmctl: (\S+): its supervisor died", err.decode()))
            names = {f"c{n}-{i}" for i in range(1, 6)}
            assert failed <= victims.keys(), err
            assert ran | failed == names, (out, err)
            assert process.returncode == bool(failed)
            for name, pids in victims.items():
                gone([*pids, *host.live_pids(name)])
            for name in names - victims.keys():
                assert json.loads(host.vmmctl("qmp", name, "query-status").stdout)["running"] is True
                host.vmmctl("down", "--force", name)
    assert list(overlays.iterdir()) == []
