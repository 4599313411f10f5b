"""A VM's cgroups on the kernel's real hierarchy of version 2, also where no controller is left for it: who is in which,
that what a sidecar leaves behind is ended with the VM, and that no cgroup is left."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness import diskguest
from harness.vm import VmHost, vm_host
from motorcade.orchestrator import cgroups
from motorcade.sidecars.rng.device import RngDevice

if TYPE_CHECKING:
    from motorcade.proto.memory import GuestMemory
    from motorcade.proto.messages import Boot

ROOTS = [path for path in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")) if (path / "cgroup.kill").exists()
         or (path / "cgroup.controllers").exists()]  # fmt: skip
pytestmark = [
    pytest.mark.kvm,
    pytest.mark.skipif(not ROOTS or not os.access(ROOTS[0], os.W_OK), reason="no cgroup v2 that can be written"),
]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[VmHost]:
    """Where the VMs of the test live."""
    with vm_host(tmp_path) as h:
        yield h


@pytest.fixture
def parent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A delegated cgroup, from which nothing is bounded: the controllers may belong to version 1 here."""
    path = ROOTS[0] / f"mc-test-{os.getpid()}"
    path.mkdir()
    monkeypatch.setenv("MOTORCADE_CGROUP", str(path))
    monkeypatch.setattr(cgroups, "_FILES", {})
    yield path
    path.rmdir()  # fails where a VM has left one behind


def test_each_process_is_in_a_cgroup_of_its_own_until_the_vm_ends(
    host: VmHost, guest: Path, tmp_path: Path, parent: Path
) -> None:
    vm = host.start(diskguest.machine(tmp_path, guest, "w") | {"limits": {"sidecar": {}}})
    for process in vm.started["processes"]:
        assert (parent / "web" / process["role"] / "cgroup.procs").read_text().split() == [str(process["pid"])]
    with vm.qmp() as qmp:
        qmp.execute("quit")
    vm.wait_end()
    assert list(parent.glob("web*")) == []


def test_what_a_sidecar_has_forked_ends_with_the_vm(
    host: VmHost, guest: Path, tmp_path: Path, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It forks before its filter is there, which lets nobody."""
    real = RngDevice.__init__

    def fork(self: RngDevice, boot: Boot, fds: Mapping[str, int], memory: GuestMemory) -> None:
        real(self, boot, fds, memory)
        for _ in range(20):
            if os.fork() == 0:
                signal.pause()

    monkeypatch.setattr(RngDevice, "__init__", fork)
    machine = diskguest.machine(tmp_path, guest, "w") | {"devices": [{"id": "rng0", "kind": "rng"}], "limits": {}}
    vm = host.start(machine)
    forked = (parent / "web" / "rng-rng0" / "cgroup.procs").read_text().split()
    assert len(forked) == 21
    with vm.qmp() as qmp:
        qmp.execute("quit")
    vm.wait_end()
    assert list(parent.glob("web*")) == []
    assert not [pid for pid in forked if Path(f"/proc/{pid}/fd").exists() and _alive(int(pid))]


def _alive(pid: int) -> bool:
    """Not only a zombie that nobody has waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
