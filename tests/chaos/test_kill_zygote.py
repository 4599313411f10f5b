"""kill -9 of the zygote at any moment: requests fail cleanly, the VMs go on, nothing is left."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from harness import microguest
from harness.vmmctl import Host, write_machine
from harness.zygotes import await_full, await_gone, family, run_directory, status
from motorcade.orchestrator import zygoteclient
from motorcade.orchestrator.zygoteclient import ZygoteError

SHAPE = {"sidecars": {"blk": 1, "serial": 1}}


@pytest.fixture
def run_dir() -> Iterator[Path]:
    with run_directory() as path:
        yield path


def test_in_the_middle_of_requests(run_dir: Path) -> None:
    """Whether a supervisor was forked or not: its lifeline is closed, and it goes."""
    for seed in range(8):
        delay = random.Random(seed).uniform(0, 0.05)
        with zygoteclient.start(pool=2) as zygote:
            zygote.fork(SHAPE)[1].close()
            await_full(zygote, 1)
            victim = psutil.Process(status(zygote)["pid"])
            timer = threading.Timer(delay, victim.kill)
            timer.start()
            seen = {p.pid: p for p in family(victim.pid)}
            lines = []
            with pytest.raises(ZygoteError):
                while True:
                    pid, line = zygote.fork(SHAPE)
                    lines.append(line)
                    seen[pid] = psutil.Process(pid)
            timer.join()
        for line in lines:
            line.close()
        await_gone(list(seen.values()))
        titles = (" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"]))
        assert not [t for t in titles if f"(prepared by {victim.pid})" in t]
        assert zygoteclient.find() is None


@pytest.mark.kvm
@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm is not there or not accessible")
def test_between_two_ups(tmp_path: Path) -> None:
    """The next `up` finds a socket that nobody answers, and starts without."""
    with Host() as host:
        host.vmmctl("zygote", "start")
        host.vmmctl("up", "-d", str(write_machine(tmp_path, "one", microguest.build())))
        zygote = psutil.Process(host.pid("one", "supervisor")).parent()
        assert zygote is not None
        zygote.kill()
        await_gone([zygote])
        host.vmmctl("up", "-d", str(write_machine(tmp_path, "two", microguest.build())))
        assert sorted(host.names()) == ["one", "two"]
        for name in ("one", "two"):
            host.vmmctl("down", "--force", name)
        assert host.names() == []
