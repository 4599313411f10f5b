"""What the threads of a running VM's processes may still do: nothing that a request never needs.

Capabilities and no_new_privs are a thread's own (credentials(7)), so every thread is looked at.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from harness.vmmctl import Host, write_machine

pytestmark = pytest.mark.kvm

_RIGHTS = ("CapInh", "CapPrm", "CapEff", "CapAmb")


def privileges(pid: int) -> dict[str, dict[str, str]]:
    """Of each thread that has some, by its id and name: what it has."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        lines = (line.partition(":") for line in (task / "status").read_text().splitlines())
        status = {key: value.strip() for key, _, value in lines}
        has = {key: status[key] for key in _RIGHTS if int(status[key], 16)}
        if status["NoNewPrivs"] != "1":
            has["NoNewPrivs"] = status["NoNewPrivs"]
        if has:
            found[f"{task.name} {status['Name']}"] = has
    return found


def assert_none(host: Host, name: str, roles: set[str]) -> None:
    pids = {role: host.pid(name, role) for role in roles}
    assert {role: found for role, pid in pids.items() if (found := privileges(pid))} == {}
    assert all(len(list(Path(f"/proc/{pid}/task").iterdir())) > 1 for pid in pids.values()), (
        "no thread of ZeroMQ's was seen"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has anything to give up")
def test_no_thread_of_a_vm_keeps_a_privilege(host: Host, guest: Path, tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    devices = {
        "disks": [{"id": "root", "path": "disk.img"}],
        "nets": [{"id": "lan", "unplugged": True}],
        "consoles": [{"id": "hvc0"}],
    }
    roles = {"core", "blk-root", "net-lan", "serial-hvc0"}
    host.vmmctl("up", "-d", str(write_machine(tmp_path, "web", guest, cmdline="await=1", **devices)))
    assert_none(host, "web", roles)
    host.vmmctl("snapshot", "web", str(tmp_path / "template"))
    host.vmmctl("down", "--force", "web")
    host.vmmctl("up", "-d", "--incoming", f"file:{tmp_path}/template")
    assert_none(host, "web", roles | {"pager"})
    host.vmmctl("down", "--force", "web")
