"""Limits by cgroups around a Linux guest's processes, in the box or on a host with cgroup v2."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from harness.vm import VmHost
from motorcade.orchestrator import cgroups, confinement
from motorcade.sidecars.rng.device import RngDevice

if TYPE_CHECKING:
    from motorcade.proto.memory import GuestMemory
    from motorcade.proto.messages import Boot

Machine = Callable[..., dict[str, Any]]
LIMITS = {"cpu": 1.5, "memory": "512M", "pids": 80, "sidecar": {"memory": "96M", "pids": 12}}


@pytest.fixture(autouse=True)
def _where() -> None:
    if why := cgroups.missing():
        pytest.skip(why)


def test_a_vm_and_its_processes_have_their_limits(host: VmHost, linux: Machine) -> None:
    vm = host.start(linux("limited", limits=LIMITS, devices=[{"id": "rng0", "kind": "rng"}]))
    group = cgroups.parent() / "limited"
    assert (group / "cpu.max").read_text() == "150000 100000\n"
    assert (group / "memory.max").read_text() == f"{512 << 20}\n"
    assert (group / "pids.max").read_text() == "80\n"
    for process in vm.started["processes"]:
        leaf = group / process["role"]
        found = {int(pid) for pid in (leaf / "cgroup.procs").read_text().split()}
        # KVM puts kernel threads that work for a VM (kvm-nx-lpage-recovery) there as well; they have no command line.
        assert {pid for pid in found if Path(f"/proc/{pid}/cmdline").read_bytes()} == {process["pid"]}
        assert (leaf / "pids.max").read_text() == ("max\n" if process["role"] == "core" else "12\n")
    told = confinement.read(vm.sidecar_pid("rng0"), os.getpid())
    assert told["cgroup-limits"]["memory.max"] == str(96 << 20)
    assert (told["seccomp"]["mode"], told["root"]) == ("filter", [])
    agent = vm.console()
    agent.wait_ready()
    agent.send("poweroff -f")
    assert vm.wait_end()["reason"] == "guest-shutdown"
    assert not group.exists()


def test_a_sidecar_that_forks_without_end_fills_its_own_cgroup_and_nothing_is_left(
    host: VmHost, linux: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its filter is there, which lets nobody fork."""
    real = RngDevice.__init__

    def bomb(self: RngDevice, boot: Boot, fds: Mapping[str, int], memory: GuestMemory) -> None:
        real(self, boot, fds, memory)
        for _ in range(1000):
            if os.fork() == 0:
                signal.pause()

    monkeypatch.setattr(RngDevice, "__init__", bomb)
    with pytest.raises(AssertionError, match=r"rng-rng0 failed: BlockingIOError"):
        host.start(linux("bomb", limits=LIMITS, devices=[{"id": "rng0", "kind": "rng"}]))
    assert not (cgroups.parent() / "bomb").exists()
