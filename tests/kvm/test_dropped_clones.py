"""Clones that nobody wants any more the moment that they run, or before: they end soon, and leave nothing."""

from __future__ import annotations

import os
import select
import time
from pathlib import Path

import psutil
import pytest

from harness.vmmctl import Host, write_machine
from motorcade.orchestrator import daemon, lifeline, pool, restore, zygoteclient

pytestmark = pytest.mark.kvm

SOON = 10.0  # seconds: far below any deadline of the core's or the supervisor's, for a machine that is busy
CLONES = 16
MEMORY = 16 << 20


@pytest.fixture
def template(host: Host, guest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> restore.Plan:
    """Of a guest that counts, which is why its pages are asked for at once; the zygote runs."""
    monkeypatch.setenv("MOTORCADE_RUN_DIR", str(host.run_dir))
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    devices = {"disks": [{"id": "root", "path": "disk.img"}], "consoles": [{"id": "hvc0"}]}
    file = write_machine(tmp_path, "web", guest, memory=MEMORY, cmdline="store=0x600000:0 count=0x600000", **devices)
    host.vmmctl("up", "-d", str(file))
    host.vmmctl("snapshot", "web", str(tmp_path / "template"))
    host.vmmctl("down", "--force", "web")
    return restore.read(tmp_path / "template")


@pytest.mark.parametrize("word", ["progress", "started", "running"])
def test_a_clone_that_is_dropped_ends_at_once(host: Host, template: restore.Plan, word: str) -> None:
    shape = pool.shape(template.machine, pager=True)
    with zygoteclient.start(pool=2) as zygote:
        for n in range(CLONES):
            machine = restore.renamed(template.machine, name=f"c{n}")
            incoming = restore.incoming(machine, template, generation_id=os.urandom(restore.GENERATION_ID))
            pid, line = zygote.fork(shape)
            processes: list[psutil.Process] = []
            with line:
                daemon.start(line, daemon.Order(machine, "", "kvm", False, incoming))
                while (message := lifeline.receive(line)) is not None and message["event"] != word:
                    assert message["event"] in {"progress", "started"}, message
                    processes = [psutil.Process(p["pid"]) for p in message.get("processes", [])]
                pidfd = lifeline.pidfd(line, pid)
            dropped = time.monotonic()
            assert pidfd is not None
            assert select.select([pidfd], [], [], SOON)[0], f"clone {n} is still there"
            os.close(pidfd)
            assert time.monotonic() - dropped < SOON
            assert [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
        zygote.stop()
    assert host.names() == []
