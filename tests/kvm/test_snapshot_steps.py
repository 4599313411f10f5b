"""The coordinator step by step: a real guest, with the test in the roles of its supervisor and its sidecars."""

from __future__ import annotations

import fcntl
import os
import re
import select
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.corebench import COUNTER, CoreBench, core_bench
from motorcade.core.qmp.errors import QmpError
from motorcade.core.qmp.machine import RunState
from motorcade.core.snapshot.plan import Plan, Status
from motorcade.core.snapshot.ram import RamWriter
from motorcade.proto import messages as m
from motorcade.proto.framing import Timeout

pytestmark = pytest.mark.kvm


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[CoreBench]:
    """A running guest."""
    with core_bench(tmp_path) as b:
        b.start()
        b.assert_runs()
        yield b


def restored(folder: Path, template: Path, **options: Any) -> Any:
    return core_bench(folder, incoming=template, **options)


@pytest.mark.parametrize("live", [False, True])
def test_a_running_guest_goes_on_during_and_from_its_snapshot(bench: CoreBench, tmp_path: Path, live: bool) -> None:
    target = bench.snapshot(live=live)
    bench.assert_runs()
    assert bench.state() is RunState.RUNNING
    frozen = int.from_bytes((target / "memory").read_bytes()[COUNTER : COUNTER + 8], "little")
    assert 0 < frozen <= bench.count()
    with restored(tmp_path, target) as clone:
        assert clone.count() == frozen
        clone.start()
        clone.assert_runs()
        assert clone.state() is RunState.RUNNING
        assert [kind for _, kind in clone.server.log] == ["Welcome", "Welcome", "Load", "Load", "Resume", "Resume"]


def test_a_stopped_guest_stays_stopped(bench: CoreBench) -> None:
    bench.machine.pause()
    target = bench.snapshot(live=True)
    bench.assert_stands_still()
    assert bench.state() is RunState.POSTMIGRATE
    assert (target / "memory").read_bytes()[COUNTER : COUNTER + 8] == bench.memory.read(COUNTER, 8)
    bench.machine.resume()
    bench.assert_runs()


def test_snapshot_restore_snapshot_gives_equal_templates(bench: CoreBench, tmp_path: Path) -> None:
    first = bench.snapshot("first")
    with restored(tmp_path, first, paused=True) as clone:
        clone.start()
        clone.assert_stands_still()
        second = clone.snapshot("second")
        a, b = clone.read_template(first), clone.read_template(second)
        for name in (c.name for c in a.components):
            assert a.component(name) == b.component(name), name
        assert (first / "state").read_bytes() == (second / "state").read_bytes()
        assert (first / "memory").read_bytes() == (second / "memory").read_bytes()
        assert "Resume" not in [kind for _, kind in clone.server.log]
        clone.machine.resume()
        clone.assert_runs()


# What goes wrong at a step. ``Step`` brings the core to it; there it waits for the test.


def at_open(b: CoreBench) -> None:
    b.machine.snapshot(Plan(f"file:{b.folder / 'template'}"))
    b.hear(m.OpenTarget)


def at_quiesce(b: CoreBench) -> None:
    del b.server.answers[m.Quiesce]
    b.machine.snapshot(Plan(f"file:{b.folder / 'template'}"))
    b.open_target()
    b.run_until(lambda: len(b.server.asked) == 2)


def at_save(b: CoreBench) -> None:
    del b.server.answers[m.Save]
    b.machine.snapshot(Plan(f"file:{b.folder / 'template'}"))
    b.open_target()
    b.run_until(lambda: len(b.server.asked) == 2)


def at_disks(b: CoreBench) -> None:
    b.machine.snapshot(Plan(f"file:{b.folder / 'template'}"))
    b.open_target()
    b.hear(m.CopyDisks)


def at_quiesce_of_a_live_one(b: CoreBench) -> None:
    del b.server.answers[m.Quiesce]
    b.machine.snapshot(Plan(f"file:{b.folder / 'template'}", live=True))
    b.open_target()
    b.run_until(lambda: len(b.server.asked) == 2)


STEPS = [at_open, at_quiesce, at_save, at_disks, at_quiesce_of_a_live_one]
SIDECAR_STEPS = [at_quiesce, at_save, at_quiesce_of_a_live_one]
Step = Callable[[CoreBench], None]


def clean_up(b: CoreBench, step: Step) -> None:
    """What the supervisor still has to do; nothing may be kept."""
    if step is at_open:
        b.tell(m.Target("", ("memory", "state"), "{}"), [os.open(os.devnull, os.O_RDWR) for _ in range(2)])
    assert not b.close_target()


def went_on(b: CoreBench) -> None:
    """Guest and sidecars go on, and the next snapshot works."""
    b.assert_runs()
    assert b.state() is RunState.RUNNING
    b.server.answers |= {m.Quiesce: lambda _asked: m.Ok(), m.Save: lambda _asked: m.Saved(m.DeviceState(1, b""))}
    b.snapshot("another")
    b.assert_runs()


@pytest.mark.parametrize("device", ["disk0", "ttyS0"])
@pytest.mark.parametrize("step", SIDECAR_STEPS)
@pytest.mark.parametrize(
    ("outcome", "why"),
    [
        (m.Error(m.ErrorCode.GENERIC, "no space left"), "no space left"),
        (Timeout(30_000), "no answer to .* within 30 s"),
    ],
)
def test_a_sidecar_that_fails_at_a_step(bench: CoreBench, step: Step, device: str, outcome: Any, why: str) -> None:
    step(bench)
    bench.server.log.clear()
    bench.asked(m.Quiesce if step is not at_save else m.Save, device).answer(outcome)
    clean_up(bench, step)
    assert re.search(f"{device}: .*{why}", bench.end(Status.FAILED))
    assert [entry for entry in bench.server.log if entry[1] == "Resume"] == [("disk0", "Resume"), ("ttyS0", "Resume")]
    went_on(bench)


@pytest.mark.parametrize("step", SIDECAR_STEPS)
def test_a_sidecar_that_dies_at_a_step(bench: CoreBench, step: Step) -> None:
    step(bench)
    bench.die("disk0")
    clean_up(bench, step)
    assert "disk0: its sidecar is gone: killed by SIGKILL" in bench.end(Status.FAILED)
    bench.assert_runs()
    assert ("SIDECAR_FAILED", {"id": "disk0", "kind": "blk", "reason": "killed by SIGKILL"}) in bench.events
    # Its state is lost, so there is no snapshot that would be whole.
    bench.machine.snapshot(Plan(f"file:{bench.folder / 'another'}"))
    bench.open_target("another")
    assert not bench.close_target()
    assert "disk0: its sidecar is gone" in bench.end(Status.FAILED)
    bench.assert_runs()


@pytest.mark.parametrize("step", STEPS)
def test_cancel_at_a_step(bench: CoreBench, step: Step) -> None:
    step(bench)
    bench.machine.cancel_snapshot()
    bench.machine.cancel_snapshot()
    clean_up(bench, step)
    assert bench.end(Status.CANCELLED) == ""
    assert bench.events[-1] == ("MIGRATION", {"status": "cancelled"})
    for asked in list(bench.server.asked):
        asked.answer(m.Ok())  # too late
    bench.server.asked.clear()
    went_on(bench)


ROUNDS = [("start_all", False), ("start_all", True), ("start_stash", True), ("start_sync", False), ("start_sync", True)]


def during(monkeypatch: pytest.MonkeyPatch, what: str, happens: Callable[[], None]) -> None:
    """Has something happen when this round of RAM has begun."""
    begin = getattr(RamWriter, what)

    def began(writer: RamWriter) -> None:
        begin(writer)
        monkeypatch.undo()
        happens()

    monkeypatch.setattr(RamWriter, what, began)


def begin(b: CoreBench, live: bool) -> None:
    """Up to where RAM is written; a live one's first round comes before the disks are copied."""
    b.machine.snapshot(Plan(f"file:{b.folder / 'template'}", live=live))
    b.open_target()
    b.run_until(lambda: any(isinstance(life, m.CopyDisks | m.CloseTarget) for life in b.lives))
    if any(isinstance(life, m.CopyDisks) for life in b.lives):
        b.tell(m.DisksCopied(""))


@pytest.mark.parametrize(("what", "live"), ROUNDS)
def test_cancel_while_ram_is_written(bench: CoreBench, monkeypatch: pytest.MonkeyPatch, what: str, live: bool) -> None:
    during(monkeypatch, what, bench.machine.cancel_snapshot)
    begin(bench, live)
    assert not bench.close_target()
    bench.end(Status.CANCELLED)
    went_on(bench)


@pytest.mark.parametrize(("what", "live"), ROUNDS)
def test_the_end_of_the_vm_while_ram_is_written(
    bench: CoreBench, monkeypatch: pytest.MonkeyPatch, what: str, live: bool
) -> None:
    bench.server.answers[m.Shutdown] = lambda asked: bench.die(asked.device_id) or m.Ok()
    during(monkeypatch, what, lambda: bench.machine.quit("host-qmp-quit"))
    begin(bench, live)
    bench.run_until(lambda: bench.machine.ended is not None)
    assert not bench.hear(m.CloseTarget).keep


@pytest.mark.parametrize("live", [False, True])
def test_cancel_while_nobody_takes_the_state(bench: CoreBench, tmp_path: Path, live: bool) -> None:
    bench.machine.snapshot(Plan("exec:sleep", what="template", live=live))
    bench.hear(m.OpenTarget)
    reader, writer = os.pipe2(os.O_CLOEXEC)
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    memory = os.open(tmp_path, os.O_TMPFILE | os.O_RDWR, 0o600)
    bench.tell(m.Target("", ("memory", "state"), "{}"), [memory, writer])
    bench.hear(m.CopyDisks)
    bench.tell(m.DisksCopied(""))
    bench.run_until(bench._looked_again(lambda: bool(select.select([reader], [], [], 0)[0])), "the state's first bytes")
    bench.assert_runs()
    bench.machine.cancel_snapshot()
    assert not bench.close_target()
    bench.end(Status.CANCELLED)
    os.close(reader)
    went_on(bench)


def test_cancel_comes_too_late_when_all_is_written(bench: CoreBench) -> None:
    bench.machine.snapshot(Plan(f"file:{bench.folder / 'template'}"))
    bench.open_target()
    bench.hear(m.CopyDisks)
    bench.tell(m.DisksCopied(""))
    assert bench.hear(m.CloseTarget).keep
    bench.machine.cancel_snapshot()
    bench.tell(m.TargetClosed(""))
    bench.end(Status.COMPLETED)


@pytest.mark.parametrize("step", STEPS)
def test_the_end_of_the_vm_at_a_step(bench: CoreBench, step: Step) -> None:
    step(bench)
    bench.server.answers[m.Shutdown] = lambda asked: bench.die(asked.device_id) or m.Ok()
    bench.machine.quit("host-qmp-quit")
    bench.run_until(lambda: bench.machine.ended is not None and bench.state() is RunState.SHUTDOWN)
    bench.settle()
    if step is not at_open:
        assert not bench.hear(m.CloseTarget).keep
    assert bench.machine.ended == m.Ended(0, "host-qmp-quit", "")


@pytest.mark.parametrize("step", STEPS)
def test_a_second_snapshot_at_a_step_is_refused(bench: CoreBench, step: Step) -> None:
    step(bench)
    with pytest.raises(QmpError, match="a snapshot is being taken already"):
        bench.machine.snapshot(Plan("file:/other"))
    with pytest.raises(QmpError, match="a snapshot is being taken"):
        bench.machine.reset("host-qmp-system-reset")
    bench.machine.cancel_snapshot()
    clean_up(bench, step)
    bench.end(Status.CANCELLED)
    went_on(bench)


@pytest.mark.parametrize("step", STEPS)
def test_stop_at_a_step_holds_and_cont_waits_for_its_end(bench: CoreBench, step: Step) -> None:
    step(bench)
    bench.machine.pause()
    if step is not at_open:
        assert bench.state() is RunState.FINISH_MIGRATE
        with pytest.raises(QmpError, match="can go on when it is over"):
            bench.machine.resume()
    bench.machine.cancel_snapshot()
    clean_up(bench, step)
    bench.end(Status.CANCELLED)
    bench.assert_stands_still()
    assert bench.state() is RunState.PAUSED
    bench.machine.resume()
    went_on(bench)


@pytest.mark.parametrize("what", ["open", "disks", "close"])
def test_the_supervisor_says_no(bench: CoreBench, what: str) -> None:
    bench.machine.snapshot(Plan(f"file:{bench.folder / 'template'}"))
    bench.open_target(error="no such place" if what == "open" else "")
    if what != "open":
        bench.hear(m.CopyDisks)
        bench.tell(m.DisksCopied("no space left" if what == "disks" else ""))
        assert bench.close_target("it exists" if what == "close" else "") is (what == "close")
    expected = {"open": "no such place", "disks": "no space left", "close": "it exists"}[what]
    assert bench.end(Status.FAILED) == expected
    went_on(bench)


def test_no_space_for_ram(bench: CoreBench, tmp_path: Path) -> None:
    bench.machine.snapshot(Plan(f"file:{tmp_path / 'template'}"))
    bench.hear(m.OpenTarget)
    full = os.open("/dev/full", os.O_RDWR | os.O_CLOEXEC)
    bench.tell(m.Target("", ("memory", "state"), "{}"), [full, os.open(os.devnull, os.O_RDWR)])
    assert not bench.close_target()
    bench.end(Status.FAILED)
    went_on(bench)


def test_no_space_for_the_state(bench: CoreBench, tmp_path: Path) -> None:
    bench.machine.snapshot(Plan(f"file:{tmp_path / 'template'}"))
    bench.hear(m.OpenTarget)
    memory = os.open(tmp_path, os.O_TMPFILE | os.O_RDWR, 0o600)
    bench.tell(m.Target("", ("memory", "state"), "{}"), [memory, os.open("/dev/full", os.O_RDWR)])
    bench.hear(m.CopyDisks)
    bench.tell(m.DisksCopied(""))
    assert not bench.close_target()
    assert "No space left" in bench.end(Status.FAILED)
    went_on(bench)


def test_files_that_the_supervisor_did_not_send(bench: CoreBench) -> None:
    bench.machine.snapshot(Plan("file:/x"))
    bench.hear(m.OpenTarget)
    bench.tell(m.Target("", ("state",), "{}"), [os.open(os.devnull, os.O_RDWR)])
    assert not bench.close_target()
    assert "without memory" in bench.end(Status.FAILED)
    went_on(bench)


# A guest that resets or powers off meanwhile.


@pytest.mark.parametrize("live", [False, True])
def test_the_guest_resets_during_a_snapshot(tmp_path: Path, live: bool) -> None:
    with core_bench(tmp_path, cmdline="irq=9 print=hello await=1 out=100:254") as b:
        b.start()
        b.peer.wait_for(b"hello")
        if live:
            del b.server.answers[m.Populate]
        b.machine.snapshot(Plan(f"file:{tmp_path / 'template'}", live=live))
        b.hear(m.OpenTarget)
        b.machine.powerdown()  # the interrupt that the guest waits for
        b.run_until(lambda: b.machine._leaving, "the guest's reset")
        b.settle()
        assert b.machine._leaving, "it must not be reset before the snapshot has let go"
        b.tell(m.Target("", ("memory", "state"), "{}"), [os.open(os.devnull, os.O_RDWR) for _ in range(2)])
        assert not b.close_target()
        assert "the guest reset the machine" in b.end(Status.FAILED)
        b.run_until(lambda: ("RESET", {"guest": True, "reason": "guest-reset"}) in b.events)
        b.peer.output = b""
        b.peer.wait_for(b"hello")
        b.snapshot("another")


def test_the_guest_powers_off_during_a_snapshot(tmp_path: Path) -> None:
    with core_bench(tmp_path, cmdline="irq=9 print=hello await=1 out=1540:52") as b:
        b.start()
        b.peer.wait_for(b"hello")
        b.server.answers[m.Shutdown] = lambda asked: b.die(asked.device_id) or m.Ok()
        b.machine.snapshot(Plan(f"file:{tmp_path / 'template'}"))
        b.hear(m.OpenTarget)
        b.machine.powerdown()  # the interrupt that the guest waits for
        b.run_until(lambda: b.machine.ended is not None, "the end")
        assert b.machine.ended == m.Ended(0, "guest-shutdown", "")
    assert b.machine.snapshot_report.status is Status.FAILED
