"""Debian's unmodified kernel on whole VMs: what it finds, what it does to its devices, how it ends."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import images
from harness.vm import VmHost

Machine = Callable[..., dict[str, Any]]
MIB = 1 << 20


def test_finds_all_its_hardware(host: VmHost, linux: Machine, tmp_path: Path) -> None:
    """CPUs, RAM above the hole's start, disks with their serials, consoles, by ACPI alone; then the power button."""
    content = os.urandom(8 * MIB)
    (tmp_path / "data.img").write_bytes(content)
    vm = host.start(
        linux(
            cpus=2,
            disks=[
                {"id": "first", "path": "data.img", "readonly": True, "serial": "CAFE42", "queues": 2},
                {"id": "second", "path": "data.img", "readonly": True},
            ],
            consoles=[{"id": "hvc0", "type": "virtio"}],
        )
    )
    agent = vm.console()
    assert "cloud-amd64" in agent.wait_ready()
    assert agent.check("uname -s") == "Linux"
    assert agent.check("nproc") == "2"
    assert agent.check("cat /sys/block/vda/serial") == "CAFE42"
    assert agent.check("cat /sys/block/vda/size") == str(8 * MIB // 512)
    assert agent.check("ls -d /sys/block/vda/mq/* | wc -l") == "2"
    assert agent.check("sha256sum < /dev/vda").split()[0] == hashlib.sha256(content).hexdigest()
    assert agent.run("dd if=/dev/zero of=/dev/vdb bs=512 count=1 conv=fsync").status != 0
    assert agent.check("ls /sys/bus/platform/devices | grep -c LNRO0005") == "3"  # of 33 that ACPI describes
    hvc = vm.console("hvc0")
    hvc.wait_ready()
    assert hvc.check("echo through the other console") == "through the other console"
    with vm.qmp() as qmp:
        assert qmp.execute("query-status") == {"running": True, "singlestep": False, "status": "running"}
        assert [c["CPU"] for c in qmp.execute("query-cpus")] == [0, 1]
        qmp.execute("system_powerdown")
        ended = vm.wait_end()
    assert (ended["status"], ended["reason"]) == (0, "guest-shutdown")


def test_reboot_keeps_the_disk(host: VmHost, linux: Machine, tmp_path: Path) -> None:
    """The guest's own reboot is a reset of the machine, its root file system is still there, poweroff is status 0."""
    images.copy_rootfs(tmp_path / "root.img")
    vm = host.start(linux(cmdline="root=/dev/vda", disks=[{"id": "root", "path": "root.img"}], cpus=2))
    agent = vm.console()
    agent.wait_ready()
    agent.check("head -c 300000 /dev/urandom > /precious && sync")
    digest = agent.check("sha256sum /precious")
    agent.send("reboot -f")
    agent.wait_ready()
    assert agent.check("sha256sum /precious") == digest
    assert agent.check("nproc") == "2"
    with vm.qmp() as qmp:
        assert "RESET" not in [e["event"] for e in qmp.events]
        qmp.execute("system_reset")
    agent.wait_ready()
    assert agent.check("sha256sum /precious") == digest
    agent.send("poweroff -f")
    ended = vm.wait_end()
    assert (ended["status"], ended["reason"]) == (0, "guest-shutdown")


def test_overlay_leaves_the_base_alone(host: VmHost, linux: Machine, tmp_path: Path) -> None:
    """Two VMs on one base at once, each with writes of its own that outlive it."""
    base = images.copy_rootfs(tmp_path / "base.img")
    before = hashlib.sha256(base.read_bytes()).digest()

    def machine(name: str) -> dict[str, Any]:
        disk = {"id": "root", "path": "base.img", "overlay": f"{name}.overlay"}
        return linux(name, cmdline="root=/dev/vda", disks=[disk])

    for attempt in range(2):
        for name in ("one", "two"):
            vm = host.start(machine(name))
            agent = vm.console()
            agent.wait_ready()
            if attempt == 0:
                agent.check(f"echo {name} > /mine && sync")
            else:
                assert agent.check("cat /mine") == name
        for vm in host.vms[-2:]:
            vm.console().send("sync; poweroff -f")
            assert vm.wait_end()["status"] == 0
    assert hashlib.sha256(base.read_bytes()).digest() == before


def test_full_disk_under_an_overlay(host: VmHost, linux: Machine, tmp_path: Path) -> None:
    """The guest sees I/O errors; what it flushed before is there in the next VM."""
    import subprocess

    with open(tmp_path / "base.img", "wb") as base:
        base.truncate(64 * MIB)
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)], check=True)
    try:
        disk = {"id": "data", "path": "base.img", "overlay": "small/overlay"}
        vm = host.start(linux(disks=[disk]))
        agent = vm.console()
        agent.wait_ready()
        agent.check("yes kept | head -c 1000000 > /tmp/kept; dd if=/tmp/kept of=/dev/vda conv=fsync 2>&1")
        assert agent.run("dd if=/dev/urandom of=/dev/vda bs=64k seek=64 count=200 oflag=direct 2>&1").status != 0
        assert agent.check("uname") == "Linux"
        assert agent.check("head -c 1000000 /dev/vda | cmp - /tmp/kept && echo same") == "same"
        agent.send("poweroff -f")
        assert vm.wait_end()["status"] == 0
        again = host.start(linux("again", disks=[disk]))
        agent = again.console()
        agent.wait_ready()
        agent.check("yes kept | head -c 1000000 > /tmp/kept")
        assert agent.check("head -c 1000000 /dev/vda | cmp - /tmp/kept && echo same") == "same"
        agent.send("poweroff -f")
        assert again.wait_end()["status"] == 0
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_tap_carries_pings_and_a_tcp_stream(host: VmHost, linux: Machine, tap: tuple[str, str, str]) -> None:
    name, here, there = tap
    vm = host.start(linux(nets=[{"id": "lan", "tap": name, "mac": "02:00:00:00:00:42"}]))
    agent = vm.console()
    agent.wait_ready()
    assert agent.check("cat /sys/class/net/eth0/address") == "02:00:00:00:00:42"
    agent.check(f"ip addr add {there}/24 dev eth0 && ip link set eth0 up")
    agent.check(f"ping -c 3 -W 10 {here}")
    payload = os.urandom(2 * MIB)
    received = bytearray()
    with socket.create_server((here, 0)) as server:

        def serve() -> None:
            # busybox's nc ends when the other side has closed, so each direction has a connection of its own.
            with server.accept()[0] as peer:
                peer.sendall(payload)
            with server.accept()[0] as peer:
                while chunk := peer.recv(65536):
                    received.extend(chunk)

        thread = threading.Thread(target=serve)
        thread.start()
        port = server.getsockname()[1]
        agent.check(f"nc {here} {port} < /dev/null > /tmp/got")
        assert agent.check("sha256sum /tmp/got").split()[0] == hashlib.sha256(payload).hexdigest()
        agent.check(f"nc {here} {port} < /tmp/got")
        thread.join()
    assert received == payload
    vm.console().send("poweroff -f")
    assert vm.wait_end()["status"] == 0


def test_more_than_3_gib_of_ram(host: VmHost, linux: Machine) -> None:
    """RAM goes on above the hole, and the guest can use it there."""
    vm = host.start(linux(memory="3328M"))
    agent = vm.console()
    agent.wait_ready()
    total_kib = int(agent.check("sed -n 's/MemTotal: *//p' /proc/meminfo").split()[0])
    assert total_kib > 3100 << 10
    assert "100000000-10fffffff" in agent.check("grep 'System RAM' /proc/iomem")
    agent.send("poweroff -f")
    assert vm.wait_end()["status"] == 0


def test_stop_and_cont(host: VmHost, linux: Machine) -> None:
    vm = host.start(linux(cpus=2))
    agent = vm.console()
    agent.wait_ready()
    with vm.qmp() as qmp:
        qmp.execute("stop")
        assert qmp.execute("query-status")["status"] == "paused"
        agent.send("echo not yet")
        qmp.execute("cont")
        assert [e["event"] for e in qmp.events] == ["STOP", "RESUME"]
        assert agent.check("echo going on") == "going on"
        qmp.execute("quit")
    ended = vm.wait_end()
    assert (ended["status"], ended["reason"]) == (0, "host-qmp-quit")


def test_a_killed_disk_sidecar_that_may_not_be_replaced_fails_the_device_and_nothing_else(
    host: VmHost, linux: Machine, tmp_path: Path
) -> None:
    with open(tmp_path / "data.img", "wb") as image:
        image.truncate(MIB)
    vm = host.start(linux(restarts=0, disks=[{"id": "data", "path": "data.img"}]))
    agent = vm.console()
    agent.wait_ready()
    with vm.qmp() as qmp:
        os.kill(vm.sidecar_pid("data"), signal.SIGKILL)
        while (event := qmp.wait_event(60)) is not None:
            assert event["data"]["id"] == "data"
            if event["event"] == "SIDECAR_FAILED":
                break
        assert event is not None
        assert agent.check("echo alive") == "alive"
        sidecars = {s["id"]: s["state"] for s in qmp.execute("x-motorcade-sidecars")}
        assert sidecars == {"ttyS0": "present", "data": "gone"}
        qmp.execute("quit")
    assert vm.await_event("sidecar-died")["role"] == "blk-data"
    assert vm.wait_end()["status"] == 0


@pytest.mark.parametrize("crash", ["echo c > /proc/sysrq-trigger"])
def test_a_panicking_guest_reboots(host: VmHost, linux: Machine, crash: str) -> None:
    """panic=-1: the kernel's own emergency restart is a reset here."""
    vm = host.start(linux())
    agent = vm.console()
    agent.wait_ready()
    agent.send(crash)
    agent.wait_ready()
    agent.send("poweroff -f")
    assert vm.wait_end()["status"] == 0
