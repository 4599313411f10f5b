"""What the core does when a sidecar is replaced, step by step; supervisor and sidecars are the test's to play."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from harness.corebench import CoreBench, core_bench
from motorcade.core.qmp.errors import DeviceNotFound, QmpError
from motorcade.core.snapshot.plan import Plan, Status
from motorcade.core.virtio import Device
from motorcade.proto import messages as m

pytestmark = pytest.mark.kvm

F_VERSION_1 = 1 << 32


def device_of(b: CoreBench) -> Device:
    return b.machine._platform.devices["disk0"]


def set_up(b: CoreBench) -> m.Activate:
    """The guest's driver sets queue 0 up; what its sidecar is told."""
    device = device_of(b)
    device.write_status(1)
    device.write_status(3)
    device.driver_features_sel = 1
    device.write_driver_features(1)
    device.write_status(11)
    queue = device.queues[0]
    queue.size, queue.desc, queue.driver, queue.device = 32, 0x10000, 0x11000, 0x12000
    device.set_queue_ready(True)
    told: list[m.Activate] = []
    b.server.answers[m.Activate] = lambda asked: told.append(asked.body) or m.Ok()  # type: ignore[func-returns-value,arg-type]
    device.write_status(15)
    b.run_until(lambda: bool(told), "the activation")
    return told[0]


def hello(b: CoreBench, **changes: object) -> None:
    """The successor introduces itself."""
    body = m.Hello(1, "disk0", 2, 2, 0, (64,), b"12345678")
    b.server.handler("disk0", m.Message(1, 1000, dataclasses.replace(body, **changes)))  # type: ignore[arg-type]


def die(b: CoreBench, *, replaced: bool = True) -> None:
    b.tell(m.SidecarDied("disk0", "killed by SIGKILL", replaced))
    b.settle()


def replace(b: CoreBench) -> list[str]:
    """Another takes its place; what that is asked, in order."""
    b.tell(m.SidecarReplaced("disk0", 2))
    b.settle()
    before = len(b.server.log)
    hello(b)
    b.run_until(lambda: ("SIDECAR_RESTARTED", "disk0") in events(b), "the successor's service")
    return [kind for device, kind in b.server.log[before:] if device == "disk0" and kind != "Ping"]


def events(b: CoreBench) -> list[tuple[str, object]]:
    return [(name, data["id"]) for name, data in b.events if name.startswith("SIDECAR")]


def test_the_successor_is_told_what_the_driver_had_set_up(tmp_path: Path) -> None:
    with core_bench(tmp_path) as b:
        b.start()
        first = set_up(b)
        again: list[m.Activate] = []
        b.server.answers[m.Activate] = lambda asked: again.append(asked.body) or m.Ok()  # type: ignore[func-returns-value,arg-type]
        die(b)
        assert replace(b) == ["Welcome", "Activate", "Resume"]
        assert again == [first]  # the number, too: it goes on where the last one stopped
        assert device_of(b).status == 15
        assert events(b) == [("SIDECAR_EXITED", "disk0"), ("SIDECAR_RESTARTED", "disk0")]
        b.assert_runs()


def test_a_reset_in_the_gap_waits_for_nobody(tmp_path: Path) -> None:
    """The successor is not told of that driver any more; the next one's set-up has another number."""
    with core_bench(tmp_path) as b:
        b.start()
        first = set_up(b)
        die(b)
        device_of(b).write_status(0)
        assert device_of(b).status == 0
        assert replace(b) == ["Welcome", "Reset", "Resume"]
        assert set_up(b).activation != first.activation


def test_a_driver_that_comes_in_the_gap(tmp_path: Path) -> None:
    """Its activation and its writes reach the successor, in that order."""
    with core_bench(tmp_path) as b:
        b.start()
        die(b)
        device = device_of(b)
        for status in (1, 3):
            device.write_status(status)
        device.driver_features_sel = 1
        device.write_driver_features(1)
        device.write_status(15 - 4)
        device.write_status(15)
        device.write_config(0, 1, 7)
        b.settle()
        assert replace(b) == ["Welcome", "Activate", "ConfigWrite", "Resume"]


@pytest.mark.parametrize(
    "changes",
    [{"virtio_type": 1}, {"queue_sizes": (64, 64)}, {"config": b"123"}],
)
def test_another_device_is_no_successor(tmp_path: Path, changes: dict[str, object]) -> None:
    with core_bench(tmp_path) as b:
        b.start()
        set_up(b)
        die(b)
        b.tell(m.SidecarReplaced("disk0", 2))
        b.settle()
        hello(b, **changes)
        assert b.hear(m.KillSidecar).device_id == "disk0"
        b.assert_runs()


def test_one_that_is_given_up_and_revived(tmp_path: Path) -> None:
    with core_bench(tmp_path) as b:
        b.start()
        first = set_up(b)
        die(b, replaced=False)
        assert device_of(b).status & 64
        assert ("SIDECAR_FAILED", "disk0") in events(b)
        # Its driver has to begin anew (virtio 1.2, 2.1.2).
        assert replace(b) == ["Welcome", "Reset", "Resume"]
        assert device_of(b).status & 64
        device_of(b).write_status(0)
        assert set_up(b).activation != first.activation
        b.assert_runs()


def test_no_snapshot_in_the_gap(tmp_path: Path) -> None:
    with core_bench(tmp_path) as b:
        b.start()
        die(b)
        b.machine.snapshot(Plan(f"file:{tmp_path / 'template'}"))
        b.open_target()
        assert not b.close_target()
        assert "disk0: its sidecar is not there yet" in b.end(Status.FAILED)
        b.assert_runs()


def test_a_successor_that_does_not_start(tmp_path: Path) -> None:
    with core_bench(tmp_path) as b:
        b.start()
        errors: list[QmpError | None] = []
        b.machine.restart_sidecar("disk0", errors.append, upgrade=True, path="/new")
        assert b.hear(m.RestartSidecar) == m.RestartSidecar("disk0", True, "/new")
        with pytest.raises(QmpError, match="being restarted already"):
            b.machine.restart_sidecar("disk0", errors.append)
        b.tell(m.SidecarReady("disk0", "exited with status 1"))
        b.run_until(lambda: bool(errors), "the answer")
        assert str(errors[0]) == "disk0: the new sidecar did not start: exited with status 1; the old one goes on"
        with pytest.raises(DeviceNotFound):
            b.machine.restart_sidecar("nobody", errors.append)


def test_one_that_cannot_come_to_rest_goes_on(tmp_path: Path) -> None:
    with core_bench(tmp_path) as b:
        b.start()
        set_up(b)
        b.server.answers[m.Quiesce] = lambda asked: m.Error(m.ErrorCode.GENERIC, "the disk is full")
        errors: list[QmpError | None] = []
        b.machine.restart_sidecar("disk0", errors.append)
        b.hear(m.RestartSidecar)
        b.tell(m.SidecarReady("disk0"))
        assert b.hear(m.HandOver) == m.HandOver("disk0", cancel=True)
        b.run_until(lambda: bool(errors), "the answer")
        assert "the disk is full" in str(errors[0])
        assert b.server.log[-1] == ("disk0", "Resume")


def test_a_restart_in_good_order(tmp_path: Path) -> None:
    with core_bench(tmp_path) as b:
        b.start()
        set_up(b)
        done: list[QmpError | None] = []
        b.machine.restart_sidecar("disk0", done.append)
        b.hear(m.RestartSidecar)
        b.tell(m.SidecarReady("disk0"))
        assert b.hear(m.HandOver) == m.HandOver("disk0", cancel=False)
        with pytest.raises(QmpError, match="a sidecar is being restarted"):
            b.snapshot()
        assert [kind for _, kind in b.server.log[-2:]] == ["Quiesce", "Save"]
        die(b)
        assert replace(b) == ["Welcome", "Load", "Activate", "Resume"]
        b.run_until(lambda: bool(done), "the answer")
        assert done == [None]
