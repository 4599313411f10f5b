"""Clones of one Linux template: each with an identity, a disk and random numbers of its own, and the right time."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import templatetime
from harness.agent import Agent
from harness.linuxworker import COMPLAINTS
from harness.vm import VmHost
from harness.vmmctl import Host, gone
from motorcade.orchestrator.qmpclient import QmpClient

Machine = Callable[..., dict[str, Any]]

CLONES = 10
DISK = 4 << 20  # bytes
DAY = 86400  # seconds
# The VM generation ID lies in memory that is not RAM for the guest (docs/internals.md).
GENERATION_ID = f"dd if=/dev/mem bs=16 skip={0xE0040 // 16} count=1 2> /dev/null | od -An -tx1"
FIRST_SECTOR = "dd if=/dev/vda bs=512 count=1 iflag=direct 2> /dev/null"


@pytest.fixture
def source(generic_linux: Machine, tmp_path: Path) -> dict[str, Any]:
    """The machine of the templates here."""
    (tmp_path / "disk.img").write_bytes(os.urandom(DISK))
    return generic_linux(
        "web",
        load=True,
        memory="128M",
        disks=[{"id": "root", "path": "disk.img"}],
        nets=[{"id": "lan", "unplugged": True}],
    )


def freeze(source: dict[str, Any], folder: Path, host: VmHost, last: str = "true") -> tuple[Path, str]:
    """A template of a guest that waits for commands, and has had a ``last`` one; and what its VM generation ID was. The
    VM is gone."""
    vm = host.start(source)
    agent = vm.console()
    agent.wait_ready()
    agent.check("dmesg -c > /run/boot")
    generation = agent.check(GENERATION_ID)
    agent.check(last)
    assert vm.snapshot(folder / "t")["status"] == "completed"
    vm.close()
    return folder / "t", generation


@contextlib.contextmanager
def clones(host: Host, template: Path, *options: str) -> Iterator[dict[str, tuple[Agent, QmpClient]]]:
    """By name: the consoles and QMP connections of clones that do not run yet. They end at the end."""
    command = host.command("clone", str(template), "--paused", *options)
    done = subprocess.run(command, env=host.env, capture_output=True, text=True, timeout=200)
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stderr
    with contextlib.ExitStack() as stack:
        found = {}
        pids = []
        for name in sorted(host.names()):
            pids += host.live_pids(name)
            agent = Agent.connect(host.run_dir / name / "console-ttyS0.sock")
            stack.callback(agent.close)
            found[name] = agent, stack.enter_context(QmpClient(host.run_dir / name / "qmp.sock", timeout=100))
        yield found
        for _, qmp in found.values():
            qmp.execute("quit")
        gone(pids)
        host.vmmctl("zygote", "stop", check=None)


@pytest.mark.timeout(400)
def test_ten_clones_at_once(source: dict[str, Any], tmp_path: Path, host: VmHost) -> None:
    template, generation = freeze(source, tmp_path, host)
    frozen = hashlib.sha256((template / "disk-root.raw").read_bytes()).digest()
    with (
        Host() as vmmctl,
        clones(vmmctl, template, "-n", str(CLONES), "--fresh-mac", "--fresh-serial") as found,
    ):
        assert len(found) == CLONES
        # The command waits in the console when the guest starts to run: nothing can come before it.
        for agent, _ in found.values():
            agent.send("load random 8; echo that was random")
        began = time.monotonic()
        for _, qmp in found.values():
            qmp.execute("cont")
        numbers = []
        for agent, _ in found.values():
            numbers.append(agent.expect(rb"begin 0\r?\n(.*)that was random", 100)[1].split())
        print(f"all have answered {time.monotonic() - began:.1f} s after the first went on: {numbers}")
        assert {len(n) for n in numbers} == {8}
        assert len({n for of_one in numbers for n in of_one}) == 8 * CLONES

        def ask(command: str) -> list[str]:
            return [agent.check(command, 100) for agent, _ in found.values()]

        assert all("crng reseeded due to virtual machine fork" in text for text in ask("dmesg"))
        assert [COMPLAINTS.findall(text) for text in ask("dmesg")] == [[]] * CLONES
        assert len({generation, *ask(GENERATION_ID)}) == CLONES + 1
        assert len({qmp.execute("query-uuid")["UUID"] for _, qmp in found.values()}) == CLONES
        assert len(set(ask("cat /sys/block/vda/serial"))) == CLONES
        rebind = "d=$(basename $(readlink /sys/class/net/eth0/device)); cd /sys/bus/virtio/drivers/virtio_net"
        macs = ask(f"{rebind} && echo $d > unbind && echo $d > bind && cat /sys/class/net/eth0/address")
        assert len(set(macs)) == CLONES
        for name, (agent, _) in found.items():
            agent.check(f"echo {name} | dd of=/dev/vda bs=512 conv=sync,fsync 2> /dev/null", 100)
        assert [text.strip("\0").strip() for text in ask(FIRST_SECTOR)] == list(found)
    assert hashlib.sha256((template / "disk-root.raw").read_bytes()).digest() == frozen


def aged(template: Path, folder: Path, seconds: int) -> Path:
    """A copy of the template that was made so much earlier."""
    older = folder / "aged"
    shutil.copytree(template, older)
    templatetime.move(older, -seconds * 10**9)
    return older


def test_a_clone_of_an_old_template_knows_what_time_it_is(source: dict[str, Any], tmp_path: Path, host: VmHost) -> None:
    """And its watchdogs do not take the day that it slept for one in which it hung, nor its scheduler for the work of
    the task that ran when it fell asleep, which the others would have to catch up with."""
    spin = "(i=0; while :; do i=$((i+1)); echo $i > /run/spin{}; done) &"
    earlier = f"date -s @$(($(date +%s) - {DAY})); {spin.format(0)} {spin.format(1)} sleep 1"
    template, _ = freeze(source, tmp_path, host, earlier)
    vm = host.start(source, template=aged(template, tmp_path, DAY))
    agent = vm.console()
    for _ in range(3):
        before = time.time()
        now = int(agent.check("date +%s"))
        # Two whole seconds were rounded down, here and where the day was taken off.
        assert before - 3 < now < time.time() + 2
    for n in range(2):
        was = agent.check(f"cat /run/spin{n}")
        agent.check(f"until [ \"$(cat /run/spin{n})\" -gt {int(was or 0) + 10} ]; do :; done 2>&-")
    assert int(agent.check("head -1 /proc/stat").split()[8]) > 0.9 * DAY * 100, "steal, in hundredths of seconds"
    agent.check("sleep 5")  # the watchdogs look every four seconds
    assert COMPLAINTS.findall(agent.check("dmesg")) == []
    agent.send("poweroff -f")
    assert vm.wait_end()["status"] == 0
