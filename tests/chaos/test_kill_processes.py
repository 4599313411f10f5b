"""kill -9 of every process of a VM, one at a time: nothing is left that the next `up` trips over."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from harness import microguest
from harness.vmmctl import Host, gone, write_machine
from motorcade.orchestrator.qmpclient import QmpClient

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm is not there or not accessible"),
]

POWER_OFF = "out=1540:52"


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as h:
        yield h


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """With a disk and its lock, a socket outside the run directory, and several processes."""
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    return write_machine(
        tmp_path,
        "web",
        microguest.build(),
        cmdline="print=hello",
        disks=[{"id": "root", "path": "disk.img"}],
        consoles=[{"id": "hvc0", "backend": {"socket": "c.sock"}}],
        qmp=["unix:q.sock"],
    )


def starts_again(host: Host, machine: Path) -> None:
    """The next `up` of the same file, and its end."""
    host.vmmctl("up", "-d", str(machine))
    assert json.loads(host.vmmctl("qmp", "web", "query-status").stdout)["running"] is True
    host.vmmctl("down", "--force", "web")
    assert host.names() == []


def test_the_supervisor(host: Host, machine: Path) -> None:
    """Everyone dies with it; its directory is seen as left over, and used again."""
    host.vmmctl("up", "-d", str(machine))
    pids = host.live_pids("web")
    assert len(pids) == 5
    os.kill(host.pid("web", "supervisor"), signal.SIGKILL)
    gone(pids)
    assert "web   killed" in host.vmmctl("ps").stdout
    assert "web does not run" in host.vmmctl("qmp", "web", "stop", check=3).stderr
    starts_again(host, machine)


def test_the_supervisor_and_at_once_again(host: Host, machine: Path) -> None:
    """No pause between: the disk's lock may still be with a process that is dying."""
    for _ in range(3):
        host.vmmctl("up", "-d", str(machine))
        os.kill(host.pid("web", "supervisor"), signal.SIGKILL)
    starts_again(host, machine)


def test_the_disk_is_free_for_another_vm_at_once(host: Host, machine: Path, tmp_path: Path) -> None:
    host.vmmctl("up", "-d", str(machine))
    os.kill(host.pid("web", "supervisor"), signal.SIGKILL)
    other = write_machine(
        tmp_path, "db", microguest.build(), cmdline=POWER_OFF, disks=[{"id": "d", "path": "disk.img"}]
    )
    host.vmmctl("up", str(other))
    starts_again(host, machine)


def test_the_core(host: Host, machine: Path) -> None:
    host.vmmctl("up", "-d", str(machine))
    pids = host.live_pids("web")
    os.kill(host.pid("web", "core"), signal.SIGKILL)
    gone(pids)
    assert host.names() == []
    ended = host.state("web")["ended"]
    assert (ended["status"], ended["reason"]) == (1, "core-died")
    assert "SIGKILL" in ended["detail"]
    starts_again(host, machine)


def test_the_core_under_vmmctl(host: Host, machine: Path) -> None:
    """vmmctl says what happened, and its status is not 0."""
    with host.running("up", str(machine)) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().strip() == b"hello"
        host.wait_for("the core's pid", lambda: host.state("web").get("status") == "running")
        os.kill(host.pid("web", "core"), signal.SIGKILL)
        assert process.wait(timeout=60) == 1
        assert b"lost its core process" in process.stderr.read()
    starts_again(host, machine)


def test_vmmctl_in_the_foreground(host: Host, machine: Path) -> None:
    """The lifeline ends the VM in good order."""
    with host.running("up", str(machine)) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == b"hello"
        host.wait_for("state.json", lambda: host.state("web").get("status") == "running")
        pids = host.live_pids("web")
        assert len(pids) == 5
        process.kill()
        gone(pids)
    assert host.names() == []
    assert host.state("web")["ended"]["reason"] == "host-signal"
    starts_again(host, machine)


@pytest.mark.parametrize("moment", [0.05, 0.15, 0.25, 0.35, 0.5])
def test_vmmctl_while_it_starts(host: Host, machine: Path, moment: float) -> None:
    """Whenever it is: all of it goes away."""
    with host.running("up", str(machine)) as process:
        pidfd = os.pidfd_open(process.pid)
        select.select([pidfd], [], [], moment)  # how far it has come by then is the test's variety, not its result
        os.close(pidfd)
        # Stopped, it forks no further: the supervisor, if there is one yet, may not have made its run directory.
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        supervisors = [child.pid for child in psutil.Process(process.pid).children()]
        process.kill()
        process.wait()
        gone(supervisors)
    assert host.names() == []
    starts_again(host, machine)


def test_vmmctl_after_it_left(host: Host, machine: Path) -> None:
    """-d: nothing ties them any more."""
    with host.running("up", "-d", str(machine)) as process:
        assert process.wait(timeout=60) == 0
    assert len(host.live_pids("web")) == 5
    host.vmmctl("down", "--force", "web")


@pytest.mark.parametrize("role", ["blk-root", "serial-ttyS0", "serial-hvc0"])
def test_a_sidecar(host: Host, machine: Path, role: str) -> None:
    """Another takes its place, everybody is told."""
    host.vmmctl("up", "-d", str(machine))
    killed = host.pid("web", role)
    with QmpClient(host.run_dir / "web" / "qmp.sock") as qmp:
        os.kill(killed, signal.SIGKILL)
        for name in ("SIDECAR_EXITED", "SIDECAR_RESTARTED"):
            event = qmp.wait_event(60)
            assert event is not None
            assert (event["event"], event["data"]["id"]) == (name, role.partition("-")[2])
            assert event["data"]["reason"] == "killed by SIGKILL"
        assert qmp.execute("query-status")["running"] is True
    host.wait_for("state.json", lambda: all(p["state"] == "running" for p in host.state("web")["processes"]))
    assert host.pid("web", role) != killed
    host.vmmctl("down", "--force", "web")
    assert host.names() == []
    starts_again(host, machine)


def test_a_sidecar_under_vmmctl(host: Host, machine: Path) -> None:
    with host.running("up", str(machine)) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().strip() == b"hello"
        host.wait_for("state.json", lambda: host.state("web").get("status") == "running")
        os.kill(host.pid("web", "serial-ttyS0"), signal.SIGKILL)  # the very console that vmmctl is on
        said = b""
        while b"serial-ttyS0 died: killed by SIGKILL; it is replaced" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        host.vmmctl("down", "--force", "web")
        assert process.wait(timeout=60) == 0


def test_everything_at_once(host: Host, machine: Path) -> None:
    host.vmmctl("up", "-d", str(machine))
    pids = host.live_pids("web")
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # the supervisor's death has killed it already
            os.kill(pid, signal.SIGKILL)
    gone(pids)
    starts_again(host, machine)
