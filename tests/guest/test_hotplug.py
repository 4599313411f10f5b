"""Disks and NICs that come and go under Debian's unmodified kernel, which is not rebooted meanwhile."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.agent import Agent
from harness.vm import VmHost

Machine = Callable[..., dict[str, Any]]
MIB = 1 << 20


def await_line(agent: Agent, command: str, wanted: str) -> None:
    """Until the guest says so: it is told of a change, and acts on it in its own time."""
    agent.check(f"until [ \"$({command})\" = '{wanted}' ]; do sleep 0.05; done")


def test_a_disk_comes_and_goes(host: VmHost, linux: Machine, tmp_path: Path) -> None:
    content = os.urandom(4 * MIB)
    (tmp_path / "data.img").write_bytes(content)
    vm = host.start(linux())
    agent = vm.console()
    agent.wait_ready()
    assert agent.check("ls /sys/block") == ""
    with vm.qmp() as qmp:
        file = {"driver": "file", "filename": str(tmp_path / "data.img")}
        qmp.execute("blockdev-add", {"node-name": "data", "driver": "raw", "file": file})
        qmp.execute("device_add", {"id": "data", "driver": "virtio-blk-mmio", "addr": "0x1", "serial": "PLUGGED"})
        await_line(agent, "cat /sys/block/vda/serial", "PLUGGED")
        assert agent.check("sha256sum < /dev/vda").split()[0] == hashlib.sha256(content).hexdigest()
        agent.check("dd if=/dev/zero of=/dev/vda bs=1M count=1 conv=fsync")
        qmp.execute("device_del", {"id": "data"})
        assert [e["data"] for e in qmp.events if e["event"] == "DEVICE_DELETED"] == [{"device": "data", "path": "data"}]
        await_line(agent, "cat /sys/block/vda/size", "0")
        print(agent.check("dmesg | tail -30"))
        qmp.execute("blockdev-del", {"node-name": "data"})
    assert (tmp_path / "data.img").read_bytes() == bytes(MIB) + content[MIB:]
    agent.send("poweroff -f")
    assert vm.wait_end()["status"] == 0
