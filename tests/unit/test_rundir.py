"""Run directories: names that are taken, leftovers of the killed, races, records."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.vmmctl import Host, gone
from motorcade.orchestrator import rundir


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with Host() as host:
        monkeypatch.setenv("MOTORCADE_RUN_DIR", str(host.run_dir / "run"))
        yield host.run_dir / "run"


def test_only_ours_and_private(root: Path) -> None:
    assert rundir.root() == root
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    root.chmod(0o755)
    rundir.root()
    assert stat.S_IMODE(root.stat().st_mode) == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make somebody else's directory")
def test_somebody_elses(root: Path) -> None:
    root.mkdir()
    os.chown(root, 12345, 12345)
    with pytest.raises(rundir.RunDirError, match="not a directory of ours"):
        rundir.root()


def test_one_supervisor_a_name(root: Path) -> None:
    run = rundir.RunDir.acquire("web")
    run.write_state({"name": "web", "pid": 4711, "status": "running"})
    with pytest.raises(rundir.Running, match=r"web is running \(pid 4711\); vmmctl down web ends it"):
        rundir.RunDir.acquire("web")
    other = rundir.RunDir.acquire("db")
    assert [(vm.name, vm.alive) for vm in rundir.vms()] == [("db", True), ("web", True)]
    other.release()  # without a state, as after an error at once: nothing to keep
    run.release()
    assert list(rundir.vms()) == []
    assert [p.name for p in root.iterdir()] == [".ended"]


def test_the_record_of_the_last_one(root: Path) -> None:
    for status in (7, 0):
        run = rundir.RunDir.acquire("web")
        os.close(run.open_log("core"))
        run.write_state({"status": "ended", "ended": {"status": status, "reason": "guest-shutdown"}})
        run.release()
    vm = rundir.find("web")
    assert vm is not None
    assert (vm.alive, vm.status, vm.state["ended"]["status"]) == (False, "ended", 0)
    assert (vm.path / "log" / "core.log").exists()
    assert [v.name for v in rundir.vms(ended=True)] == ["web"]


def test_few_records_are_kept(root: Path) -> None:
    for i in range(rundir.KEEP_ENDED + 3):
        run = rundir.RunDir.acquire(f"vm{i}")
        run.write_state({"name": f"vm{i}"})
        run.release()
    assert len(list((root / ".ended").iterdir())) == rundir.KEEP_ENDED


def test_leftovers_of_a_killed_vm(root: Path) -> None:
    """Its processes are ended, its files removed, its logs kept."""
    survivor = subprocess.Popen(["sleep", "1000"])
    try:
        pid = os.fork()
        if pid == 0:
            run = rundir.RunDir.acquire("web")
            os.close(run.open_log("core"))
            (run.path / "qmp.sock").touch()
            processes = [{"role": "core", "pid": survivor.pid, "start": rundir.process_start(survivor.pid)}]
            run.write_state({"name": "web", "pid": os.getpid(), "status": "running", "processes": processes})
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(pid, 0)
        vm = rundir.find("web")
        assert vm is not None
        assert (vm.alive, vm.status) == (False, "killed")
        run = rundir.RunDir.acquire("web")
        gone([survivor.pid])
        assert sorted(p.name for p in run.path.iterdir()) == ["lock", "log"]
        record = rundir.read_state(root / ".ended" / "web")
        assert record["status"] == "killed"
        assert (root / ".ended" / "web" / "log" / "core.log").exists()
        run.release()
    finally:
        survivor.kill()
        survivor.wait()


def test_a_pid_that_is_another_process_now_is_left_alone(root: Path) -> None:
    stranger = subprocess.Popen(["sleep", "1000"])
    try:
        start = rundir.process_start(stranger.pid)
        assert start is not None
        rundir.end_processes({"processes": [{"pid": stranger.pid, "start": start - 1}, {"pid": "x"}, {"pid": 2**22}]})
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_path_too_long_for_sockets(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTORCADE_RUN_DIR", str(root / ("x" * 90)))
    with pytest.raises(rundir.RunDirError, match="set MOTORCADE_RUN_DIR to a shorter path"):
        rundir.RunDir.acquire("web")
    assert not (root / ("x" * 90) / "web").exists()


def test_many_at_once_one_wins_at_a_time(root: Path) -> None:
    """Acquiring, looking and releasing race; at no time have two the same directory."""
    holding = threading.Lock()
    wins: list[int] = []

    def contend() -> None:
        for _ in range(50):
            list(rundir.vms())
            try:
                run = rundir.RunDir.acquire("web")
            except rundir.Running:
                continue
            assert holding.acquire(blocking=False), "two supervisors of one name"
            wins.append(1)
            holding.release()
            run.release()

    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            contend()
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=guarded) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert wins


def test_something_else_in_its_place(root: Path) -> None:
    rundir.root()
    (root / "web").write_text("a file")
    with pytest.raises(rundir.RunDirError, match="web/lock: Not a directory"):
        rundir.RunDir.acquire("web")


def test_no_names_that_leave_the_directory(root: Path) -> None:
    rundir.root()
    assert [rundir.find(name) for name in ("", ".", "..", ".ended", "a/b")] == [None] * 5


def test_broken_state_is_no_state(root: Path) -> None:
    run = rundir.RunDir.acquire("web")
    for text in ("", "{", "[]", "nonsense"):
        (run.path / "state.json").write_text(text)
        assert rundir.read_state(run.path) == {}
    run.release()
