"""A Linux guest at work on its disk and its network while their sidecars are killed: it sees latency, and nothing else.

MOTORCADE_CHAOS_KILLS says how many kills there are.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.linuxload import pad, working
from harness.linuxworker import Worker, complaints
from harness.vm import VmHost
from motorcade.orchestrator.qmpclient import QmpClient

Machine = Callable[..., dict[str, Any]]

KILLS = int(os.environ.get("MOTORCADE_CHAOS_KILLS", "12"))


@pytest.mark.timeout(1200)
def test_kills_under_load(host: VmHost, linux: Machine, tap: tuple[str, str, str], tmp_path: Path) -> None:
    """Disk, NIC and a console that writes to a file; each byte is checked at both ends."""
    name, here, there = tap
    with open(tmp_path / "data.img", "wb") as image:
        image.truncate(8 << 20)
    machine = linux(
        "source",
        load=True,
        memory="128M",
        restarts=1_000_000,
        disks=[{"id": "data", "path": "data.img", "overlay": True}],
        nets=[{"id": "lan", "tap": name}],
        consoles=[
            {"id": "hvc0", "type": "virtio"},
            {"id": "hvc1", "type": "virtio"},
            {"id": "hvc2", "type": "virtio", "backend": {"file": str(tmp_path / "lines")}},
        ],
    )
    rng = random.Random(4)
    vm = host.start(machine)
    worker = Worker(vm, here)
    worker.start_work(there, here)
    worker.agent.check("stty -F /dev/hvc2 raw -echo; load tty 10 < /dev/hvc2 > /dev/hvc2 &")
    with working(worker.stream), vm.qmp() as qmp:
        worker.stream.wait_more()
        before = worker.done()
        for _ in range(KILLS):
            device = rng.choice(["data", "data", "lan", "hvc2"])
            pid = next(s["pid"] for s in qmp.execute("x-motorcade-sidecars") if s["id"] == device)
            os.kill(pid, signal.SIGKILL)
            wait_served(qmp, device)
            time.sleep(rng.random() * 0.3)  # the test's variety, not its result
        deadline = time.monotonic() + 240
        while any(rounds < before[part][0] + 2 for part, (rounds, _) in worker.done().items()):
            assert time.monotonic() < deadline, f"{before}, then {worker.done()}"
        done = worker.done()
        print(f"{KILLS} kills: {before}, then {done}; {worker.stream}")
        assert all(again == 0 for _, again in done.values()), done
        assert complaints(worker.agent) == []
    vm.close()
    lines = (tmp_path / "lines").read_bytes().splitlines()
    lines = lines[lines.index(b"L 1 " + pad(1)) : -1]  # before: the agent of that console; the last may be cut off
    assert len(lines) > KILLS
    assert lines == [b"L %d %s" % (n, pad(n)) for n in range(1, len(lines) + 1)]


def wait_served(qmp: QmpClient, device: str) -> None:
    """Until another process serves it."""
    while (event := qmp.wait_event(120)) is not None:
        assert event["event"] != "SIDECAR_FAILED", event
        if event["event"] == "SIDECAR_RESTARTED" and event["data"]["id"] == device:
            return
    raise AssertionError(f"{device} was not replaced")
