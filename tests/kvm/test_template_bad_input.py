"""Templates that are damaged, foreign or changed, and real machines that are to go on from them.

Whatever it is: one error that names it, and no process, run directory or file is left. (``vm_host`` sees to the run
directories, and the end of the supervisor to its processes.) What vmmctl says is in test_clones.py; each part's own
checks, at every byte, are in tests/unit/test_template.py, test_restore_steps.py and tests/device.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from harness import wholevm
from harness.guestdriver import RINGS
from harness.pager import working_set
from harness.vm import Vm, VmHost, vm_host
from motorcade.orchestrator import supervisor
from motorcade.orchestrator.errors import UserError
from motorcade.orchestrator.qmpclient import QmpError
from motorcade.proto import template as format
from motorcade.proto.template import CHUNK, Component, Template

pytestmark = pytest.mark.kvm

Change = Callable[[Template], Template]
SERVE = f"ram={wholevm.RAM}:{wholevm.PAGES}:60 serve=0:0"


@dataclasses.dataclass(frozen=True)
class Original:
    """A template, and the machine that it was made of."""

    machine: dict[str, Any]
    path: Path

    def copy(self, folder: Path) -> Path:
        """Another directory with the same files; the test may replace those."""
        to = folder / "changed"
        shutil.copytree(self.path, to, copy_function=os.link)
        return to

    def changed(self, folder: Path, change: Change) -> Path:
        """One with another state, whose checksums are right."""
        to = self.copy(folder)
        whole = read(to)
        (to / "state").unlink()
        (to / "state").write_bytes(format.encode(change(whole)))
        return to

    def damaged(self, folder: Path, name: str, damage: Callable[[bytearray], object]) -> Path:
        """One with another file."""
        to = self.copy(folder)
        data = bytearray((to / name).read_bytes())
        damage(data)
        (to / name).unlink()
        (to / name).write_bytes(data)
        return to


def read(template: Path) -> Template:
    fd = os.open(template / "state", os.O_RDONLY)
    try:
        return format.read(fd)
    finally:
        os.close(fd)


def flip(at: int) -> Callable[[bytearray], object]:
    return lambda data: data.__setitem__(at, data[at] ^ 0x20)


def cut(at: int) -> Callable[[bytearray], object]:
    return lambda data: data.__delitem__(slice(at, None))


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VmHost]:
    """Where the VMs of the test live. At the end there is no overlay."""
    overlays = tmp_path / "overlays"
    overlays.mkdir()
    monkeypatch.setenv("MOTORCADE_OVERLAY_DIR", str(overlays))
    with vm_host(tmp_path) as h:
        yield h
    assert list(overlays.iterdir()) == []


def freeze(folder: Path, machine: dict[str, Any], ready: Callable[[Vm], None]) -> Original:
    with vm_host(folder) as host:
        vm = host.start(machine)
        ready(vm)
        info = vm.snapshot(folder / "t")
        assert info["status"] == "completed", info
    return Original(machine, folder / "t")


@pytest.fixture(scope="module")
def whole(guest: Path, tmp_path_factory: pytest.TempPathFactory) -> Original:
    """Of a machine with every kind of device."""
    folder = tmp_path_factory.mktemp("whole")
    return freeze(folder, wholevm.machine(folder, guest, cpus=1), wholevm.busy)


@pytest.fixture(scope="module")
def serving(guest: Path, tmp_path_factory: pytest.TempPathFactory) -> Original:
    """Of a guest that answers, and has most of its memory still to read when it is restored."""

    def ready(vm: Vm) -> None:
        with vm.attach() as uart:
            wholevm.hear(uart, b"ram ")
            uart.sendall(b"?")
            wholevm.hear(uart, b"pong")

    machine = {"name": "web", "memory": "32M", "kernel": {"image": str(guest), "cmdline": SERVE}}
    return freeze(tmp_path_factory.mktemp("serving"), machine, ready)


def refused(host: VmHost, original: Original, template: Path, **options: Any) -> str:
    """It must not run; why."""
    try:
        vm = host.start(original.machine, template=template, **options)
    except UserError as e:  # as vmmctl, which has started nothing yet
        return str(e)
    except AssertionError as e:
        message = dict(e.args[0])
        assert message["event"] in ("failed", "ended")
        assert message["status"] == 1
        assert message.get("reason", "restore-failed") in ("restore-failed", "template-damaged")
        return str(message.get("message") or message["detail"])
    pytest.fail(f"{vm.name} runs")


# The state.


def test_every_region_of_the_state(host: VmHost, whole: Original, tmp_path: Path) -> None:
    """Nothing has been started when that is seen."""
    size = (whole.path / "state").stat().st_size
    places = [0, 7, 8, 12, 16, 24, 40, 60, 63, 64, *range(4096, size, 8192), size - 1]
    for at in places:
        for damage in (flip(at), cut(at)):
            template = whole.damaged(tmp_path, "state", damage)
            why = refused(host, whole, template)
            assert why.startswith(f"{template}/state: "), why
            shutil.rmtree(template)
    assert host.vms == []


def newer_format(data: bytearray) -> None:
    header = format._HEADER
    magic, version, crc, length, _ = header.unpack(data[: header.size])
    data[: header.size] = header.pack(magic, version + 1, crc, length, 0)
    data[header.size - 4 : header.size] = zlib.crc32(data[: header.size - 4]).to_bytes(4, "little")


def test_a_newer_format(host: VmHost, whole: Original, tmp_path: Path) -> None:
    why = refused(host, whole, whole.damaged(tmp_path, "state", newer_format))
    assert why.endswith("state: its format is version 2, newer than this program, which reads up to 1")


def other_cpu(whole: Template) -> Template:
    """Leaf 7 with all that there is: nobody has it."""
    entries = bytearray(whole.cpu.cpuid)
    at = next(i for i in range(0, len(entries), 40) if int.from_bytes(entries[i : i + 4], "little") == 7)
    entries[at + 16 : at + 20] = b"\xff" * 4
    return dataclasses.replace(whole, cpu=dataclasses.replace(whole.cpu, cpuid=bytes(entries)))


def other_msr(whole: Template) -> Template:
    return dataclasses.replace(whole, cpu=dataclasses.replace(whole.cpu, msrs=(*whole.cpu.msrs, 0xC001BEEF)))


def described(change: Callable[[dict[str, Any]], object]) -> Change:
    def apply(whole: Template) -> Template:
        description = json.loads(whole.description)
        change(description)
        return dataclasses.replace(whole, description=json.dumps(description))

    return apply


def disks(change: Callable[[list[Any]], object]) -> Change:
    def apply(whole: Template) -> Template:
        what = json.loads(whole.disks)
        change(what)
        return dataclasses.replace(whole, disks=json.dumps(what))

    return apply


def without(name: str) -> Change:
    return lambda t: dataclasses.replace(t, components=tuple(c for c in t.components if c.name != name))


def part(name: str, change: Callable[[Component], Component]) -> Change:
    def apply(whole: Template) -> Template:
        assert whole.component(name) is not None
        return dataclasses.replace(
            whole, components=tuple(change(c) if c.name == name else c for c in whole.components)
        )

    return apply


def newer(component: Component) -> Component:
    return dataclasses.replace(component, version=component.version + 1)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (other_cpu, "this host's CPU lacks"),
        (other_msr, "c001beef"),
        (lambda t: dataclasses.replace(t, memory_size=t.memory_size // 2, layers=b"", sums=b""), "it has no memory"),
        (described(lambda d: d.update(memory=64 << 20)), "memory"),
        (described(lambda d: d.update(cpus=2)), "cpus: 1, but the template"),
        (described(lambda d: d["disks"].pop()), "do not agree"),
        (described(lambda d: d["nets"].pop()), "net"),
        (described(lambda d: d["consoles"].reverse()), "console"),
        (described(lambda d: d["disks"][0].update(queues=2)), "queues"),
        (described(lambda d: d.update(colour="red")), "state: its machine is not one that this program knows: "),
        (lambda t: dataclasses.replace(t, description="{"), "state: its machine is not one that this program knows: "),
        (disks(lambda d: d[0]["files"][0].update(size=512)), "base.img has 1048576 bytes now and had 512"),
        (disks(lambda d: d[0]["files"][1].update(path="../disk-over.overlay")), "neither an absolute path nor a copy"),
        (disks(lambda d: d[0].update(files=[])), "disk over has no file"),
        (disks(lambda d: d.clear()), "do not agree"),
        (part("vm", newer), "vm"),
        (part("sidecar.over", newer), "sidecar.over"),
        (
            part("virtio.lan", lambda c: dataclasses.replace(c, name="virtio.wan")),
            "a device wan, which this machine has not",
        ),
        (part("uart", lambda c: dataclasses.replace(c, name="teapot")), "teapot"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_template_of_another_machine_or_host(
    host: VmHost, whole: Original, tmp_path: Path, change: Change, why: str
) -> None:
    template = whole.changed(tmp_path, change)
    said = refused(host, whole, template)
    assert why in said
    assert "Traceback" not in said


def names(template: Path) -> list[str]:
    return [c.name for c in read(template).components]


def test_every_part_that_is_missing_or_short(host: VmHost, whole: Original, tmp_path: Path) -> None:
    """Named by the core, or by the sidecar whose it is."""
    for n, name in enumerate(names(whole.path)):
        short = part(name, lambda c: dataclasses.replace(c, data=c.data[:-1]))
        for change in (short, without(name)) if n % 3 == 0 else (short,):
            template = whole.changed(tmp_path, change)
            said = refused(host, whole, template)
            assert name in said or name.partition(".")[2] in said, (name, said)
            shutil.rmtree(template)


@pytest.mark.parametrize("seed", range(6))
def test_flipped_bits_in_the_parts_are_an_end_or_a_run(
    host: VmHost, whole: Original, tmp_path: Path, seed: int
) -> None:
    """Under right checksums, where no value can be known to be wrong. No process dies of it."""
    rng = random.Random(seed)

    def damage(t: Template) -> Template:
        parts = list(t.components)
        n = rng.randrange(len(parts))
        data = bytearray(parts[n].data)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        parts[n] = dataclasses.replace(parts[n], data=bytes(data))
        return dataclasses.replace(t, components=tuple(parts))

    template = whole.changed(tmp_path, damage)
    try:
        vm = host.start(whole.machine, template=template, paused=True)
    except AssertionError as e:
        assert dict(e.args[0]).get("reason", "restore-failed") == "restore-failed", e
        return
    with vm.qmp() as qmp:
        assert qmp.execute("query-status")["status"] == "paused"
        rows = qmp.execute("x-motorcade-sidecars")
    assert {row["state"] for row in rows} == {"present"}, rows
    vm.close()


# The memory.


def pieces(template: Path, first: int, end: int) -> list[int]:
    """Offsets of the chunks from ``first`` to ``end`` that are in its file."""
    layers = read(template).layers
    return [at for at in range(first, end, CHUNK) if layers[at // CHUNK] == 1]


@pytest.mark.parametrize("ahead", [False, True])
def test_damage_where_the_guest_is_ends_it_at_once(
    host: VmHost, serving: Original, tmp_path: Path, ahead: bool
) -> None:
    """By its first instruction; or, found in the working set, before that."""

    def everywhere(data: bytearray) -> None:
        for at in pieces(serving.path, 0, wholevm.RAM):
            data[at] ^= 1

    template = serving.damaged(tmp_path, "memory", everywhere)
    (template / "working-set").unlink(missing_ok=True)
    if ahead:
        (template / "working-set").write_bytes(working_set([at // CHUNK for at in pieces(serving.path, 0, 16 << 20)]))
        said = refused(host, serving, template)
    else:
        vm = host.start(serving.machine, template=template)
        ended = vm.wait_end()
        assert (ended["status"], ended["reason"]) == (1, "template-damaged")
        said = ended["detail"]
    assert "the template's memory at 0x" in said
    assert "is damaged: its checksum is wrong" in said


@pytest.mark.parametrize("damage", ["flipped", "cut off"])
def test_damage_that_is_found_later_ends_it_with_the_reason(
    host: VmHost, serving: Original, tmp_path: Path, damage: str
) -> None:
    """The guest reads what it has not touched since it was restored. It never sees a wrong byte."""
    at = pieces(serving.path, wholevm.RAM, 32 << 20)[-1]
    template = serving.damaged(tmp_path, "memory", flip(at + 100) if damage == "flipped" else lambda _: None)
    vm = host.start(serving.machine, template=template)
    with vm.attach() as uart:
        uart.sendall(b"?")
        wholevm.hear(uart, b"pong")
        if damage == "cut off":
            os.truncate(template / "memory", at + 100)
        uart.sendall(b"c")
        ended = vm.wait_end()
        said = b""
        while some := uart.recv(65536):
            said += some
    assert b"bad" not in said
    assert (ended["status"], ended["reason"]) == (1, "template-damaged")
    why = "is damaged: its checksum is wrong" if damage == "flipped" else "is truncated"
    assert ended["detail"] == f"the template's memory at {at:#x} {why}"


def test_damage_that_a_sidecar_meets_ends_it_soon(
    host: VmHost, whole: Original, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks at its ring, and waits for good; the supervisor does not wait as long as for a disk to be flushed."""
    monkeypatch.setattr(supervisor, "DAMAGED_TIMEOUT", 0.5)
    monkeypatch.setattr(supervisor, "END_TIMEOUT", 1000.0)
    ring = RINGS + 32 * 0x10000  # of hvc0
    template = whole.damaged(tmp_path, "memory", flip(ring + 100))
    vm = host.start(whole.machine, template=template, paused=True)
    with vm.qmp() as qmp, suppress(QmpError):  # it may be over before there is an answer
        qmp.execute("cont")
    ended = vm.wait_end()
    assert (ended["status"], ended["reason"]) == (1, "template-damaged")
    assert f"the template's memory at {ring:#x} is damaged" in ended["detail"]


def test_damage_that_a_snapshot_finds_ends_both(host: VmHost, serving: Original, tmp_path: Path) -> None:
    at = pieces(serving.path, wholevm.RAM, 32 << 20)[0]
    template = serving.damaged(tmp_path, "memory", flip(at))
    vm = host.start(serving.machine, template=template)
    with vm.qmp() as qmp:
        qmp.execute("x-motorcade-snapshot", {"dir": str(tmp_path / "again")})
    ended = vm.wait_end()
    assert (ended["status"], ended["reason"]) == (1, "template-damaged")
    assert list(tmp_path.glob("again*")) == []


@pytest.mark.parametrize("size", [0, 1, 16 << 20, -1])
def test_a_memory_file_that_is_too_short(host: VmHost, serving: Original, tmp_path: Path, size: int) -> None:
    end = pieces(serving.path, 0, 32 << 20)[-1] + CHUNK
    size = end + size if size < 0 else size
    template = serving.damaged(tmp_path, "memory", cut(size))
    said = refused(host, serving, template)
    assert f"the template's memory is truncated at {size} bytes" in said


def test_a_base_that_is_damaged_or_another_one(host: VmHost, serving: Original, tmp_path: Path) -> None:
    base, child = serving.copy(tmp_path), tmp_path / "child"
    vm = host.start(serving.machine, template=base, paused=True)
    assert vm.snapshot(child, base=str(base))["status"] == "completed"
    vm.close()
    memory = bytearray((base / "memory").read_bytes())
    (base / "memory").unlink()
    last = pieces(serving.path, wholevm.RAM, 32 << 20)[-1]
    memory[last] ^= 4
    (base / "memory").write_bytes(memory)
    vm = host.start(serving.machine, template=child)
    with vm.attach() as uart:
        uart.sendall(b"c")
        assert (
            vm.wait_end()["detail"]
            == f"the memory of the template's ancestor 1 at {last:#x} is damaged: its checksum is wrong"
        )
    os.truncate(base / "memory", last)
    said = refused(host, serving, child)
    assert f"the memory of the template's ancestor 1 is truncated at {last} bytes" in said
    (base / "memory").unlink()
    assert refused(host, serving, child) == f"{base}/memory: No such file or directory"
    state = read(base)
    (base / "state").unlink()
    (base / "state").write_bytes(format.encode(without("rtc")(state)))
    said = refused(host, serving, child)
    assert said == f"{child}: it builds on the template {base}, but {base} is another one now"


def test_a_working_set_that_is_none_does_not_matter(host: VmHost, serving: Original, tmp_path: Path) -> None:
    template = serving.copy(tmp_path)
    (template / "working-set").unlink(missing_ok=True)
    (template / "working-set").write_bytes(os.urandom(4096))
    vm = host.start(serving.machine, template=template)
    with vm.attach() as uart:
        uart.sendall(b"c")
        wholevm.hear(uart, b"bad 0")
    assert "the working set is left out" in vm.logs()


# Templates that are named later.


def test_a_waiting_machine_refuses_bad_templates_and_takes_a_good_one(
    host: VmHost, serving: Original, whole: Original, tmp_path: Path
) -> None:
    damaged = serving.damaged(tmp_path, "state", flip(100))
    vm = host.start(serving.machine, defer=True)
    with vm.qmp() as qmp:
        for template, why in (
            (damaged, "state: the state is damaged: its checksum is wrong"),
            (whole.path, f"disks: none, but the template {whole.path} has disks over, raw, ro"),
            (tmp_path, "not a template"),
        ):
            with pytest.raises(QmpError, match=why):
                qmp.execute("migrate-incoming", {"uri": f"file:{template}"})
            assert qmp.execute("query-status")["status"] == "inmigrate"
        qmp.execute("migrate-incoming", {"uri": f"file:{serving.path}"})
    with vm.attach() as uart:
        uart.sendall(b"c")
        wholevm.hear(uart, b"bad 0")


def test_a_waiting_machine_whose_template_lacks_memory_ends(host: VmHost, serving: Original, tmp_path: Path) -> None:
    template = serving.damaged(tmp_path, "memory", cut(1 << 20))
    vm = host.start(serving.machine, defer=True)
    with vm.qmp() as qmp:
        qmp.execute("migrate-incoming", {"uri": f"file:{template}"})
    ended = vm.wait_end()
    assert (ended["status"], ended["reason"]) == (1, "template-damaged")
    assert ended["detail"] == f"the template's memory is truncated at {1 << 20} bytes"
