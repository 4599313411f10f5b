"""Snapshots of a Linux guest at work: disk, network and both kinds of console, with every byte checked at both ends."""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import templatetime
from harness.linuxload import working
from harness.linuxworker import Worker, complaints
from harness.vm import VmHost
from motorcade.orchestrator.commands import template

Machine = Callable[..., dict[str, Any]]

ROUNDS = 20
EVERY = int(os.environ.get("MOTORCADE_RESTORE_EVERY", "5"))  # templates that are restored; 1: all


@pytest.mark.timeout(1200)
def test_twenty_snapshots_under_load_and_restores(
    host: VmHost, linux: Machine, tap: tuple[str, str, str], tmp_path: Path
) -> None:
    name, here, there = tap
    with open(tmp_path / "data.img", "wb") as image:
        image.truncate(8 << 20)
    machine = linux(
        "source",
        load=True,
        memory="128M",
        disks=[{"id": "data", "path": "data.img"}],
        nets=[{"id": "lan", "tap": name}],
        consoles=[{"id": "hvc0", "type": "virtio"}, {"id": "hvc1", "type": "virtio"}],
    )
    began = time.monotonic()

    def tell(what: str) -> None:
        print(f"{time.monotonic() - began:6.1f} {what}")

    vm = host.start(machine)
    worker = Worker(vm, here)
    worker.start_work(there, here)
    consoles = worker.consoles()
    tell("booted")
    kept = []
    with working(worker.stream, *consoles), vm.qmp() as qmp:
        for n, way in zip(range(ROUNDS), itertools.cycle(["moment", "live", "stopped", "live on a base"])):
            for part in (*consoles, worker.stream):
                part.wait_more()
            path = tmp_path / f"t{n}"
            if way == "stopped":
                qmp.execute("stop")
            if way.startswith("live"):
                base = {"base": str(kept[-1])} if way != "live" and kept else {}
                qmp.execute("x-motorcade-snapshot", {"dir": str(path), "live": True, **base})
            else:
                qmp.execute("migrate", {"uri": f"file:{path}"})
            info = vm.await_snapshot(qmp)
            assert info["status"] == "completed", info
            if way == "stopped":
                qmp.execute("cont")
            template.run_verify(argparse.Namespace(dir=path))
            tell(f"{way}: {info}")
            if n % EVERY == EVERY - 1:
                kept.append(path)
            else:
                shutil.rmtree(path)
        for part in (*consoles, worker.stream):
            part.wait_more()
        done = worker.done()
        tell(f"{done}; {worker.stream}; {[str(c) for c in consoles]}")
        assert all(rounds > ROUNDS and again == 0 for rounds, again in done.values()), done
        assert complaints(worker.agent) == []
    vm.close()
    port = worker.stream.port
    for path in kept:
        # As if it had just been made. This kernel charges the task that was running with the time since, and the
        # others, which never rest, would have to catch up with it first (docs/clones.md).
        young = tmp_path / "young"
        shutil.copytree(path, young, copy_function=lambda a, b: (shutil.copy if a.endswith("state") else os.link)(a, b))
        age = time.time_ns() - templatetime.made(young)
        templatetime.move(young, age)
        vm = host.start(machine, template=young)
        worker = Worker(vm, here, port, resumed=True)
        consoles = worker.consoles()
        with working(worker.stream, *consoles):
            before = worker.done()
            for part in (*consoles, worker.stream):
                part.wait_more()
            while any(done[0] <= before[name][0] for name, done in worker.done().items()):
                pass
            now = time.time()
            ahead = int(worker.agent.check("date +%s")) - now
            done = worker.done()
            said = f"restored: {done}; {worker.stream}; {[str(c) for c in consoles]}"
            tell(f"{said}; its clock is {ahead:.1f} s ahead, of {-age / 1e9:.1f}")
            assert done.pop("tcp")[1] == 1, "our end of its connection was gone, so it has made another"
            assert all(again == 0 for _, again in done.values())
            assert -2 < ahead + age / 1e9 < 2 + time.time() - now
            assert complaints(worker.agent) == []
        vm.close()
        shutil.rmtree(young)
