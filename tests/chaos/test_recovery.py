"""Random kills of a VM's sidecars under a checksummed load: no error, nothing lost, nothing twice, nobody left behind.

MOTORCADE_CHAOS_KILLS says how many (default: few enough for every run).
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.disk import small_tmpfs
from harness.killing import Victim
from harness.vmmctl import Host
from motorcade.orchestrator.qmpclient import QmpError

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm is not there or not accessible"),
]

KILLS = int(os.environ.get("MOTORCADE_CHAOS_KILLS", "30"))
ROLES = ["blk-root", "blk-root", "blk-root", "serial-ttyS0", "serial-hvc0", "rng-dice", "net-lan"]


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as h:
        yield h


def everything(folder: Path, **disk: object) -> dict[str, object]:
    """One device of each kind."""
    return {
        "disks": [{"id": "root", "path": str(folder / "disk.img"), **disk}],
        "consoles": [{"id": "hvc0", "backend": {"file": str(folder / "hvc0.txt")}}],
        "nets": [{"id": "lan", "link": str(folder / "link")}],
        "devices": [{"id": "dice", "kind": "rng"}],
    }


@pytest.mark.timeout(120 + 3 * KILLS)
def test_random_kills(host: Host, tmp_path: Path) -> None:
    """Some of them of a sidecar that has only just begun to recover. With an overlay, whose map is the sidecar's."""
    rng = random.Random(int(os.environ.get("MOTORCADE_CHAOS_SEED", "1")))
    with Victim(host, tmp_path, 16, **everything(tmp_path, overlay=True)) as victim:
        for _ in range(KILLS):
            role = rng.choice(ROLES)
            if rng.random() < 0.2:
                victim.kill(role, wait=False)
                time.sleep(rng.random() * 0.05)  # the test's variety, not its result
            victim.kill(role)
            time.sleep(rng.random() * 0.03)
        report = victim.finish()
        assert report.clean, f"{report}\n{victim.log('root')}"
        rows = json.loads(host.vmmctl("sidecar", "ls", "web", "--json").stdout)
        assert [r["state"] for r in rows].count("running") == 5
        assert sum(r["restarts"] for r in rows) >= KILLS
        print(f"{KILLS} kills, {report.requests} requests")


@pytest.mark.timeout(120 + 3 * KILLS)
def test_random_kills_of_a_clone(host: Host, tmp_path: Path) -> None:
    """Its pager's among them, while its memory comes."""
    rng = random.Random(int(os.environ.get("MOTORCADE_CHAOS_SEED", "1")))
    with Victim(host, tmp_path, 16, **everything(tmp_path, overlay=True)) as victim:
        victim.freeze_and_thaw(tmp_path / "t")
        for _ in range(KILLS):
            victim.kill(rng.choice([*ROLES, "pager", "pager"]))
            time.sleep(rng.random() * 0.03)
        report = victim.finish()
        assert report.clean, f"{report}\n{victim.log('root')}"
        print(f"{KILLS} kills, {report.requests} requests")


@pytest.mark.timeout(120 + 3 * KILLS)
@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="a file system of the test's own needs root")
def test_random_kills_with_injected_errors_and_a_full_disk(host: Host, tmp_path: Path) -> None:
    """The guest hears of each request that fails, and finds all others done. The disk has room again in the end."""
    rng = random.Random(int(os.environ.get("MOTORCADE_CHAOS_SEED", "1")))
    with small_tmpfs(6 << 20) as own:
        (own / "ballast").write_bytes(bytes(4 << 20))
        overlay = f"/proc/{os.getpid()}/fd/{own.name}/overlay"
        with Victim(host, tmp_path, 16, **everything(tmp_path, overlay=overlay)) as victim:
            for n in range(KILLS):
                operation = rng.choice(["any", "read", "write", "flush"])
                fault = rng.choice([{"status": "ioerr"}, {"delay": 20}, {"delay": 5, "status": "ioerr"}])
                fault |= {"id": "root", "count": rng.randint(1, 20), "operation": operation}
                victim.qmp.execute("x-motorcade-sidecar-inject", fault)
                time.sleep(rng.random() * 0.03)  # the test's variety, not its result
                victim.kill("blk-root")
                if n == KILLS * 2 // 3:
                    log = victim.directory / "log" / "blk-root.log"
                    host.wait_for("a full disk", lambda log=log: "No space left on device" in log.read_text())
                    (own / "ballast").unlink()
            report = victim.finish()
            assert report.errors > 0
            assert (report.bad, report.doubled) == (0, 0), f"{report}\n{victim.log('root')}"
            print(f"{KILLS} kills, {report.requests} requests, {report.errors} errors")


def test_restarts_and_upgrades_under_load(host: Host, tmp_path: Path) -> None:
    with Victim(host, tmp_path, 16, **everything(tmp_path)) as victim:
        for device in ("root", "hvc0", "ttyS0", "dice", "lan"):
            before = victim.pid(f"x-{device}")
            host.vmmctl("sidecar", "restart", "web", device)
            assert victim.pid(f"x-{device}") != before
        before = victim.pid("blk-root")
        host.vmmctl("sidecar", "upgrade", "web", "root")
        after = victim.pid("blk-root")
        assert after != before
        assert b"motorcade.sidecars.blk" in Path(f"/proc/{after}/cmdline").read_bytes()  # a new interpreter
        victim.kill("blk-root")  # and so is what takes its place
        assert b"motorcade.sidecars.blk" in Path(f"/proc/{victim.pid('blk-root')}/cmdline").read_bytes()
        report = victim.finish()
        assert report.clean, report


def test_an_upgrade_to_code_that_does_not_start(host: Host, tmp_path: Path) -> None:
    """The old one keeps serving."""
    broken = tmp_path / "broken" / "motorcade"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('this release is broken')\n")
    with Victim(host, tmp_path, 4) as victim:
        before = victim.pid("blk-root")
        done = host.vmmctl("sidecar", "upgrade", "--path", str(broken.parent), "web", "root", check=1)
        assert "the new sidecar did not start: exited with status 1; the old one goes on" in done.stderr
        assert victim.pid("blk-root") == before
        done = host.vmmctl("sidecar", "upgrade", "--path", str(tmp_path / "nowhere"), "web", "root", check=2)
        assert "there is no such directory" in done.stderr
        assert "no device has the id nobody" in host.vmmctl("sidecar", "restart", "web", "nobody", check=1).stderr
        assert victim.finish().clean


def test_a_sidecar_that_dies_too_often_fails_visibly_and_is_revived(host: Host, tmp_path: Path) -> None:
    with Victim(host, tmp_path, 4, restarts=2) as victim:
        for _ in range(2):
            victim.kill("blk-root")
        victim.kill("blk-root", wait=False)
        data = victim.wait_event("SIDECAR_FAILED", "root")
        assert data["reason"].startswith("3 times within 60 s, at last: killed by SIGKILL")
        assert victim.qmp.execute("query-status")["running"] is True
        host.wait_for("state.json", lambda: "failed: 3 times" in str(host.state("web")["devices"]))
        assert "failed" in host.vmmctl("status", "web").stdout
        host.vmmctl("sidecar", "restart", "web", "root")
        assert host.state("web")["status"] == "running"
        with pytest.raises(QmpError, match="no device has the id"):
            victim.qmp.execute("x-motorcade-sidecar-restart", {"id": "nobody"})
        # Its driver has to reset it, which this guest does not; that it is served again shows in its process.
        assert victim.pid("blk-root") in host.live_pids("web")


def test_a_sidecar_that_hangs(host: Host, tmp_path: Path) -> None:
    """Stopped, it answers nobody: it is killed for its silence, and replaced."""
    with Victim(host, tmp_path, 4) as victim:
        os.kill(victim.pid("blk-root"), signal.SIGSTOP)
        assert "silent" in victim.wait_event("SIDECAR_RESTARTED", "root")["reason"]
        assert victim.finish().clean
