"""Disks and NICs that come and go under Debian's unmodified kernel, which is not rebooted meanwhile."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.agent import Agent
from harness.linuxload import Stream, working
from harness.vm import VmHost

Machine = Callable[..., dict[str, Any]]
MIB = 1 << 20
ROUNDS = int(os.environ.get("MOTORCADE_HOTPLUG_ROUNDS", "20"))  # a round takes 3 seconds in the box
SLOTS = 16  # of disks, and as many of NICs


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


def files(pid: int) -> list[str]:
    """What a process's descriptors are, without what tells instances apart."""
    return sorted(str(fd.readlink()).split("[")[0].split(":")[0] for fd in Path(f"/proc/{pid}/fd").iterdir())


@pytest.mark.timeout(600)
def test_disks_and_nics_come_and_go_under_load(
    host: VmHost, linux: Machine, tap: tuple[str, str, str], tmp_path: Path
) -> None:
    """Each disk is pulled while it is read and written, each NIC while a stream is on it, which goes on with the next
    one; meanwhile a disk that stays is worked on."""
    name, here, there = tap
    (tmp_path / "data.img").write_bytes(bytes(8 * MIB))
    vm = host.start(linux(load=True, disks=[{"id": "stays", "path": "data.img"}], consoles=[{"id": "hvc0"}]))
    agent = vm.console("hvc0")
    agent.wait_ready()
    agent.check("load disk /dev/vda 0 1 /run/disk > /dev/null 2>&1 &")
    stream = Stream("tcp", here)
    core = next(p["pid"] for p in vm.started["processes"] if p["role"] == "core")
    left: dict[int, tuple[list[str], list[str], int, int]] = {}  # by round
    with working(stream), vm.qmp() as qmp:
        for n in range(ROUNDS):
            slot = n % SLOTS
            image = tmp_path / f"{n}.img"
            content = os.urandom(MIB)
            image.write_bytes(content)
            disk = {"id": f"d{n}", "path": str(image), "serial": f"S{n}", "slot": 1 + slot % (SLOTS - 1)}
            qmp.execute("x-motorcade-device-add", {"disk": disk})
            qmp.execute("x-motorcade-device-add", {"net": {"id": f"n{n}", "tap": name, "slot": slot}})
            path = agent.check(f"until grep -lx S{n} /sys/block/*/serial; do sleep 0.05; done")
            dev = "/dev/" + path.split("/")[3]
            await_line(agent, f"cat {path.replace('serial', 'size')}", str(MIB // 512))
            nic = f"ip addr add {there}/24 dev eth{slot} && ip link set eth{slot} up"
            agent.check(f"until {nic}; do sleep 0.05; done 2>&-")
            if n == 0:
                agent.check(f"load tcp {here} {stream.port} /run/tcp > /dev/null 2>&1 &")
            agent.check(f"grep -q 1 /sys/class/net/eth{slot}/carrier")
            found = agent.check(f"dd if={dev} bs=64k iflag=direct 2>&- | sha256sum").split()[0]
            assert found == hashlib.sha256(content).hexdigest(), f"round {n}"
            word = b"%-16d" % n
            agent.check(f"yes '{word[:15].decode()}' | dd of={dev} bs=64k count=8 iflag=fullblock conv=fsync 2>&-")
            # At work until it fails.
            agent.check(
                f"(while dd if=/dev/zero of={dev} bs=64k seek=8 count=4 oflag=direct "
                f"&& dd if={dev} of=/dev/null bs=64k iflag=direct; do echo > /run/works; done; echo > /run/failed) "
                "> /dev/null 2>&1 &"
            )
            agent.check("until [ -e /run/works ]; do sleep 0.01; done; rm /run/works")
            stream.wait_more()
            qmp.execute("device_del", {"id": f"d{n}"})
            qmp.execute("device_del", {"id": f"n{n}"})
            agent.check("until rm /run/failed; do sleep 0.01; done 2>&-")
            agent.check(f"ip addr flush dev eth{slot}; ip link set eth{slot} down")
            now = image.read_bytes()
            assert now[: MIB // 2] == (word[:15] + b"\n") * (MIB // 32), f"round {n}"
            for at in range(MIB // 2, MIB, 512):
                sector = now[at : at + 512]
                assert sector == content[at : at + 512] or (at < MIB * 3 // 4 and sector == bytes(512)), f"{n}: {at}"
            image.unlink()
            children = psutil.Process(vm.pid).children(recursive=True)
            left[n] = files(core), files(vm.pid), len(children), len(qmp.execute("x-motorcade-sidecars"))
        # From the time on when each slot has been used, which is held after that.
        full = min(SLOTS, ROUNDS) - 1
        assert all(found == left[full] for n, found in left.items() if n > full), left
        done = agent.check("cat /run/disk /run/tcp")
        print(f"{ROUNDS} rounds: {done}; {stream}")
        assert "BAD" not in done and stream.connections == 1
        assert not re.findall(r".*(?:hung|Trace|BUG|Oops|lockup).*", agent.check("dmesg"))
        qmp.execute("quit")
    assert vm.wait_end()["status"] == 0
