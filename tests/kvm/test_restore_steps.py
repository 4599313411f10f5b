"""Going on from a template, step by step: a real guest, with the test as its supervisor and its sidecars."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.corebench import COUNTER, MEMORY, CoreBench, core_bench
from motorcade.core import pm
from motorcade.core.platform import ACPI_TABLES
from motorcade.core.qmp.errors import QmpError
from motorcade.core.qmp.machine import RunState
from motorcade.core.snapshot.plan import Plan, Status
from motorcade.proto import messages as m
from motorcade.proto import template as format
from motorcade.proto.framing import Timeout
from motorcade.proto.template import Component, Template

pytestmark = pytest.mark.kvm

GUID = ACPI_TABLES + 0x40


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a guest that counts."""
    folder = tmp_path_factory.mktemp("template")
    with core_bench(folder) as b:
        b.start()
        b.assert_runs()
        return b.snapshot()


def changed(template: Path, folder: Path, change: Callable[[Template], Template]) -> Path:
    """Another template, made from this one."""
    fd = os.open(template / "state", os.O_RDONLY)
    try:
        whole = format.read(fd)
    finally:
        os.close(fd)
    other = folder / "changed"
    other.mkdir()
    (other / "state").write_bytes(format.encode(change(whole)))
    (other / "memory").symlink_to(template / "memory")
    return other


def with_part(name: str, data: Callable[[bytes], bytes]) -> Callable[[Template], Template]:
    def change(whole: Template) -> Template:
        parts = tuple(Component(c.name, c.version, data(c.data)) if c.name == name else c for c in whole.components)
        return dataclasses.replace(whole, components=parts)

    return change


def ends(b: CoreBench) -> str:
    """The machine, started, must end without having run; why."""
    b.server.answers[m.Shutdown] = lambda asked: b.die(asked.device_id) or m.Ok()
    b.machine.start()
    if b.machine.ended is None:
        b.hello()
    b.run_until(lambda: b.machine.ended is not None, "the end")
    ended = b.machine.ended
    assert ended is not None
    assert (ended.status, ended.reason) == (1, "restore-failed")
    assert not any(isinstance(life, m.Running) for life in b.lives)
    assert not any(b.machine._platform.vcpus.tids)
    return ended.detail


@pytest.mark.parametrize("paused", [False, True])
def test_time_and_sidecars_wait_for_the_first_run(template: Path, tmp_path: Path, paused: bool) -> None:
    with core_bench(tmp_path, incoming=template, paused=paused) as b:
        b.start()
        if paused:
            assert b.state() is RunState.PAUSED
            b.assert_stands_still()
            assert "Resume" not in [kind for _, kind in b.server.log]
            b.machine.resume()
        b.assert_runs()
        assert b.machine._platform.clock._stopped is None
        assert b.events[-1:] == ([("RESUME", {})] if paused else [])


def test_kvmclock_goes_on_by_the_time_that_passed(template: Path, tmp_path: Path) -> None:
    with core_bench(tmp_path, incoming=template, paused=True) as b:
        b.start()
        clock = b.machine._platform.clock
        kvmclock, realtime, _ = (int.from_bytes(clock.save()[i : i + 8], "little") for i in (0, 8, 16))
        clock._now_ns = lambda: realtime + 3_600_000_000_000
        clock.start()
        assert 0 <= b.machine._platform.vm.clock() - kvmclock - 3_600_000_000_000 < 10_000_000_000


def test_a_clone_gets_its_generation_id_when_it_first_runs(template: Path, tmp_path: Path) -> None:
    mine = bytes(range(16))
    with core_bench(tmp_path, incoming=template, paused=True, generation_id=mine) as b:
        b.start()
        kept = b.memory.read(GUID, 16)
        assert kept not in (bytes(16), mine)
        b.machine.resume()
        assert b.memory.read(GUID, 16) == mine
        assert b.machine._platform.pm.read(pm.EVENT_STATUS, 4) == pm.EVENT_GENERATION
    with core_bench(tmp_path, incoming=template) as b:
        b.start()
        assert b.memory.read(GUID, 16) == kept
        assert b.machine._platform.pm.read(pm.EVENT_STATUS, 4) == 0


def test_a_reset_gives_a_new_generation_id(template: Path, tmp_path: Path) -> None:
    with core_bench(tmp_path, incoming=template) as b:
        b.start()
        before = b.memory.read(GUID, 16)
        b.machine.reset("host-qmp-system-reset")
        assert b.memory.read(GUID, 16) not in (before, bytes(16))
        b.assert_runs()


def test_a_reset_of_one_that_never_ran(template: Path, tmp_path: Path) -> None:
    with core_bench(tmp_path, incoming=template, paused=True) as b:
        b.start()
        b.machine.reset("host-qmp-system-reset")
        b.assert_stands_still()
        b.machine.resume()
        b.assert_runs()


def test_without_the_kernel_image_there_is_no_reset(template: Path, tmp_path: Path) -> None:
    with core_bench(tmp_path, incoming=template, kernel=False) as b:
        b.start()
        with pytest.raises(QmpError, match="without its kernel image"):
            b.machine.reset("host-qmp-system-reset")
        b.assert_runs()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"memory": 2 * MEMORY}, "the template has 16 MiB of memory, this machine 32 MiB"),
        ({"cpus": 2}, "the template has 1 vCPUs, this machine 2"),
        ({"slot": 3}, "device disk0 is in slot 0 in the template, in slot 3 here"),
    ],
)
def test_a_template_of_another_machine(template: Path, tmp_path: Path, options: dict[str, Any], why: str) -> None:
    with core_bench(tmp_path, incoming=template, **options) as b:
        assert why in ends(b)


def drop(name: str) -> Callable[[Template], Template]:
    return lambda t: dataclasses.replace(t, components=tuple(c for c in t.components if c.name != name))


def renamed(old: str, new: str) -> Callable[[Template], Template]:
    def change(t: Template) -> Template:
        parts = (Component(c.name.replace(old, new), c.version, c.data) for c in t.components)
        return dataclasses.replace(t, components=tuple(parts))

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (renamed("disk0", "disk7"), "the template has no device disk0 (blk)"),
        (drop("sidecar.disk0"), "the template has no device disk0 (blk)"),
        (drop("uart"), "the template lacks uart"),
        (renamed("rtc", "vm.2"), "the template has a component vm.2"),
        (with_part("vm", lambda d: d[:-1]), "component vm: a record is cut off"),
        (with_part("vm", lambda d: b""), "component vm: it lacks"),
        (with_part("vcpu.0", lambda d: d[: len(d) // 2]), "component vcpu.0: a record is cut off"),
        (with_part("vcpu.0", lambda d: b""), "component vcpu.0: it lacks"),
        (with_part("clock", lambda d: d + b"x"), "component clock: 21 bytes, not 20"),
        (with_part("uart", lambda d: b"\xff" * len(d)), "component uart"),
        (with_part("pm", lambda d: b"\xff" * len(d)), "component pm: events 0xffffffff"),
        (with_part("pm", lambda d: b""), "component pm"),
        (with_part("rtc", lambda d: b"\xff" * len(d)), "component rtc"),
        (with_part("virtio.disk0", lambda d: d[:2] + b"{}"), "component virtio.disk0: it cannot be read"),
        (with_part("virtio.disk0", lambda d: d.replace(b'"status":0', b'"status":4')), "DRIVER_OK without FEATURES_OK"),
        (with_part("virtio.disk0", lambda d: d.replace(b'"max_size":64', b'"max_size":128')), "its queues have sizes"),
        (
            with_part("virtio.disk0", lambda d: d.replace(b'"virtio_type":2', b'"virtio_type":1')),
            "virtio device type 1",
        ),
        (with_part("sidecar.disk0", lambda d: d[:-8]), "component sidecar.disk0"),
    ],
)
def test_damaged_parts_end_it_by_name(
    template: Path, tmp_path: Path, change: Callable[[Template], Template], why: str
) -> None:
    with core_bench(tmp_path, incoming=changed(template, tmp_path, change)) as b:
        assert why in ends(b)


def test_every_flipped_byte_of_a_part_is_an_end_or_a_run(template: Path, tmp_path: Path) -> None:
    """Checksums are out of the way here: no part's bytes may bring the core down."""
    names = ("vm", "pm", "uart", "virtio.disk0", "sidecar.disk0", "rtc")
    with core_bench(tmp_path, incoming=template) as b:
        parts = {c.name: c.data for c in b.read_template(template).components}
    from motorcade.core.snapshot import components
    from motorcade.core.snapshot.components import Restored, WrongTemplate

    with core_bench(tmp_path, incoming=template) as b:
        b.machine.start()
        b.hello()
        whole = b.read_template(template)
        for name in names:
            for at in range(0, len(parts[name]), max(1, len(parts[name]) // 50)):
                data = bytearray(parts[name])
                data[at] ^= 0xFF
                try:
                    restored = Restored(b.machine._platform, with_part(name, lambda _d, data=data: bytes(data))(whole))  # type: ignore[misc]
                    restored.restore_platform()
                    restored.restore_device("disk0")
                except WrongTemplate as e:
                    assert name in str(e) or "slot" in str(e)
        assert components.unpack_records(parts["vm"])


@pytest.mark.parametrize("kind", [m.Load, m.Activate])
@pytest.mark.parametrize("outcome", [m.Error(m.ErrorCode.INVALID, "no state of mine"), Timeout(30_000)])
def test_a_sidecar_that_does_not_take_its_state(template: Path, tmp_path: Path, kind: type, outcome: Any) -> None:
    with core_bench(tmp_path, incoming=running_disk(template, tmp_path)) as b:
        b.server.answers[kind] = lambda asked: outcome if asked.device_id == "disk0" else m.Ok()
        assert ends(b).startswith("disk0: ")
        assert ("disk0", "Resume") not in b.server.log


def running_disk(template: Path, folder: Path) -> Path:
    """With a driver that had set queue 0 up."""
    from motorcade.core.snapshot.components import pack_sidecar

    queue = b'{"max_size":64,"size":32,"ready":true,"desc":65536,"driver":69632,"device":73728}'

    def virtio(data: bytes) -> bytes:
        data = data.replace(b'"status":0', b'"status":15').replace(
            b'"driver_features":0', b'"driver_features":4294967296'
        )
        at = data.index(b'"queues":[')
        return data[:at] + b'"queues":[' + queue + b"]}"

    state = pack_sidecar(m.DeviceState(1, b"", (m.QueueState(0, 7, 9, 0),)))

    def change(t: Template) -> Template:
        return with_part("sidecar.disk0", lambda _d: state)(with_part("virtio.disk0", virtio)(t))

    return changed(template, folder, change)


def test_the_driver_finds_its_device_as_it_left_it(template: Path, tmp_path: Path) -> None:
    with core_bench(tmp_path, incoming=running_disk(template, tmp_path), paused=True) as b:
        activations = []
        b.server.answers[m.Activate] = lambda asked: activations.append(asked.body) or m.Ok()
        b.start()
        queue = m.Queue(0, 32, 65536, 69632, 73728, last_avail=7, used_idx=9)
        (activation,) = activations
        assert activation.activation  # no other set-up has that number
        assert activation == m.Activate(1 << 32, (queue,), restored=True, activation=activation.activation)
        device = b.machine._platform.devices["disk0"]
        assert (device.status, device.queues[0].size, device.queues[0].ready) == (15, 32, True)
        b.machine.resume()
        b.assert_runs()


def test_pending_interrupts_are_raised_again(template: Path, tmp_path: Path) -> None:
    with core_bench(tmp_path, incoming=running_disk(template, tmp_path), paused=True) as b:
        b.start()
        platform = b.machine._platform
        platform.devices["disk0"]._interrupts.restore(1)
        lines: list[str] = []
        platform.devices["disk0"]._interrupts.raise_again = lambda: lines.append("raised")  # type: ignore[method-assign]
        b.machine.resume()
        assert lines == ["raised"]


def test_a_sidecar_that_dies_while_restoring(template: Path, tmp_path: Path) -> None:
    with core_bench(tmp_path, incoming=template) as b:
        del b.server.answers[m.Load]
        b.server.answers[m.Shutdown] = lambda asked: b.die(asked.device_id) or m.Ok()
        b.machine.start()
        b.hello()
        b.run_until(lambda: bool(b.server.asked))
        b.die("disk0")
        b.run_until(lambda: b.machine.ended is not None)
        assert b.machine.ended is not None
        assert "disk0" in b.machine.ended.detail


def test_migrate_incoming(template: Path, tmp_path: Path) -> None:
    with core_bench(tmp_path, incoming=template, defer=True) as b:
        done: list[QmpError | None] = []
        b.machine.start()
        b.hello()
        b.settle()
        assert b.state() is RunState.INMIGRATE
        for what in (b.machine.resume, b.machine.pause, lambda: b.machine.reset("x")):
            with pytest.raises(QmpError, match="waits for its template"):
                what()
        b.machine.migrate_incoming("file:/nowhere", done.append)
        with pytest.raises(QmpError, match="does not wait"):
            b.machine.migrate_incoming("file:/elsewhere", done.append)
        assert b.hear(m.OpenIncoming).uri == "file:/nowhere"
        b.tell(m.Incoming("there is no such template"))
        b.run_until(lambda: bool(done))
        assert isinstance(done.pop(), QmpError)
        b.machine.migrate_incoming(f"file:{template}", done.append)
        b.hear(m.OpenIncoming)
        b.tell(m.Incoming(""), [os.open(template / "state", os.O_RDONLY)])
        b.hear(m.Running)
        assert done == [None]
        b.assert_runs()


def test_a_machine_that_was_started_is_not_restored(tmp_path: Path) -> None:
    with core_bench(tmp_path) as b:
        b.start()
        with pytest.raises(QmpError, match="not started with --incoming defer"):
            b.machine.migrate_incoming("file:/x", lambda _error: None)


def test_memory_is_fetched_from_the_pager_before_it_is_written(template: Path, tmp_path: Path) -> None:
    with core_bench(tmp_path, incoming=template, pager=True) as b:
        b.start()
        del b.server.answers[m.Populate]
        for cancel in (True, False):
            b.machine.snapshot(Plan(f"file:{tmp_path / 'next'}"))
            b.open_target("cancelled" if cancel else "next")
            populate = b.asked(m.Populate, "pager")
            assert b.machine.snapshot_report.status is Status.SETUP
            b.assert_runs()
            if cancel:
                b.machine.cancel_snapshot()
                assert not b.close_target()
                b.end(Status.CANCELLED)
            populate.answer(m.Ok())
        b.hear(m.CopyDisks)
        b.tell(m.DisksCopied(""))
        assert b.close_target()
        b.end(Status.COMPLETED)
        assert ("pager", "Quiesce") not in b.server.log


def test_a_template_on_another(template: Path, tmp_path: Path) -> None:
    with core_bench(tmp_path, incoming=template) as b:
        b.start()
        b.assert_runs()
        second = b.snapshot("second", base=str(template))
        whole = b.read_template(second)
        assert [p.path for p in whole.parents] == [str(template)]
        assert whole.layers[COUNTER >> 16] == 1
        assert 2 in whole.layers
        assert (second / "memory").stat().st_blocks < (template / "memory").stat().st_blocks


def test_devices_alone_leave_ram_and_disks_where_they_are(template: Path, tmp_path: Path) -> None:
    with core_bench(tmp_path, incoming=template, pager=True) as b:
        b.start()
        for what in ("devices", "state"):
            target = b.snapshot(what, what=what)
            whole = b.read_template(target)
            assert not whole.has_memory
            assert whole.memory_size == MEMORY
            b.assert_runs()
        b.machine.pause()
        b.snapshot("stopped", what="devices")
        assert b.state() is RunState.PAUSED
