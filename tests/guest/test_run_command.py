"""`vmmctl run` with Debian's kernel: StratoVirt's command line, `migrate`, and the same one with -incoming."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.agent import Agent
from harness.forked import vmmctl
from harness.vm import DEADLINE, VmHost
from harness.vmmctl import gone
from motorcade.orchestrator import rundir
from motorcade.orchestrator.qmpclient import QmpClient

Machine = Callable[..., dict[str, Any]]


@pytest.mark.timeout(300)
def test_stratovirts_command_line_starts_is_frozen_and_restored(
    host: VmHost, linux: Machine, tap: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Disk, NIC, virtio console, rng, serial and QMP sockets; what was in the guest's memory is there again."""
    name, here, there = tap
    monkeypatch.chdir(tmp_path)
    Path("rootfs.img").write_bytes(b"of the disk".ljust(1 << 20, b"\0"))
    kernel = linux()["kernel"]
    line = [
        *("run", "--", "-machine", "microvm", "-enable-kvm", "-smp", "2", "-m", "256"),
        *("-kernel", kernel["image"], "-initrd", kernel["initrd"], "-append", kernel["cmdline"]),
        *("-drive", "file=rootfs.img,id=rootfs,readonly=off,direct=off"),
        *("-device", "virtio-blk-device,drive=rootfs,id=rootfs"),
        *("-netdev", f"tap,id=net0,ifname={name}"),
        *("-device", "virtio-net-device,netdev=net0,id=net0,mac=52:54:00:12:34:56"),
        *("-device", "virtio-serial-device", "-chardev", "socket,path=console.sock,id=console0,server,nowait"),
        *("-device", "virtconsole,chardev=console0,id=console0"),
        *("-object", "rng-random,id=objrng0,filename=/dev/random"),
        *("-device", "virtio-rng-device,rng=objrng0,max-bytes=1234,period=1000"),
        *("-qmp", "unix:vm.sock,server,nowait", "-serial", "socket,path=serial.sock,server,nowait"),
        *("-daemonize", "-pidfile", "vm.pid"),
    ]
    assert vmmctl(*line) == 0
    [vm] = rundir.vms()
    core = int(Path("vm.pid").read_text())
    pids = [p["pid"] for p in vm.state["processes"]]
    assert core == next(p["pid"] for p in vm.state["processes"] if p["role"] == "core")
    agent = Agent.connect(Path("serial.sock"))
    agent.wait_ready()
    assert agent.check("nproc") == "2"
    assert agent.check("dd if=/dev/vda bs=11 count=1 2> /dev/null") == "of the disk"
    assert agent.check("cat /sys/class/net/eth0/address") == "52:54:00:12:34:56"
    agent.check(f"ip addr add {there}/24 dev eth0 && ip link set eth0 up && ping -c 1 -W 20 {here}")
    assert agent.check("cat /sys/class/misc/hw_random/rng_current").startswith("virtio_rng")
    console = Agent.connect(Path("console.sock"))
    console.wait_ready()
    assert console.check("echo through hvc0") == "through hvc0"
    console.close()
    agent.check("echo remembered > /run/kept")
    with QmpClient("vm.sock", timeout=DEADLINE) as qmp:
        qmp.execute("stop")
        qmp.execute("migrate", {"uri": f"file:{tmp_path}/template"})
        end = time.monotonic() + DEADLINE
        while (info := qmp.execute("query-migrate"))["status"] in ("setup", "active"):
            assert time.monotonic() < end, info
        assert info["status"] == "completed", info
        qmp.execute("quit")
    gone([*pids, vm.state["pid"]])
    agent.close()
    assert sorted(os.listdir()) == ["rootfs.img", "template"]  # noqa: PTH208
    assert vmmctl(*line, "-incoming", "file:template") == 0
    [again] = rundir.vms()
    assert again.name == vm.name
    agent = Agent.connect(Path("serial.sock"))
    assert agent.check("cat /run/kept") == "remembered"
    assert agent.check("dd if=/dev/vda bs=11 count=1 iflag=fullblock 2> /dev/null") == "of the disk"
    agent.check(f"ping -c 1 -W 20 {here}")
    agent.send("poweroff -f")
    gone([again.state["pid"]])
    agent.close()
    ended = rundir.find(vm.name)
    assert ended is not None
    assert ended.state["ended"]["reason"] == "guest-shutdown"
    assert sorted(os.listdir()) == ["rootfs.img", "template"]  # noqa: PTH208
