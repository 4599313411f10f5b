"""Disks and NICs that come and go under a micro-guest, which is told word for word what its driver does."""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from harness.guestdriver import F_FLUSH, GuestDriver, Script
from harness.vm import Vm, VmHost, vm_host
from harness.vmmctl import Host, write_machine
from motorcade.core import layout
from motorcade.core.virtio_mmio import CONFIG, MAGIC, Reg
from motorcade.orchestrator.qmpclient import QmpClient, QmpError

pytestmark = pytest.mark.kvm

MIB = 1 << 20
EMPTY = 0  # device id
PRESENT = 0xE0050  # the bitmap of slots that ACPI's _STA reads
IN, OUT, FLUSH = 0, 1, 4
OK, IOERR = 0, 1
NICS = 16


class Talk:
    """The guest's serial line: it does a line of words, and says what it has done."""

    def __init__(self, vm: Vm, *, fresh: bool = True) -> None:
        self._sock, self._seen, self._n = vm.attach(), b"", 0
        if fresh:
            self.await_start()
        else:  # what a template remembers of the console comes first
            self._sock.sendall(b"print=here serial\n")
            self._read_until(b"here\n")

    def await_start(self) -> None:
        """The guest listens."""
        self._read_until(b"ready\n")

    def _read_until(self, text: bytes) -> bytes:
        while text not in self._seen:
            data = self._sock.recv(65536)
            assert data, f"the console ended; {self._seen[-500:]!r}"
            self._seen += data.replace(b"\r", b"")
        said, _, self._seen = self._seen.partition(text)
        return said

    def do(self, script: Script) -> None:
        """Plays it, and checks what the guest prints."""
        self._n += 1
        words = [*script.words, f"print=done-{self._n}", "serial"]
        self._sock.sendall(" ".join(words).encode() + b"\n")
        assert self._read_until(f"done-{self._n}\n".encode()).decode().split("\n")[:-1] == script.expected

    def close(self) -> None:
        self._sock.close()


class Disk:
    """A driver of a disk that is set up once, and whose queue goes on whatever happens behind it.

    ``polls``: it looks at the used ring and the configuration instead of InterruptStatus, since a sidecar that takes
    over interrupts for what its predecessor may not have, too.
    """

    def __init__(self, talk: Talk, slot: int, *, polls: bool = False) -> None:
        self.talk, self.slot, self.requests, self.polls = talk, slot, 0, polls
        script, driver = self._driver()
        driver.start()
        talk.do(script)

    def _driver(self) -> tuple[Script, GuestDriver]:
        script = Script()
        return script, GuestDriver(script, self.slot, F_FLUSH)

    def request(self, kind: int, status: int, word: int | None = None, *, sector: int = 0) -> None:
        """One request of a sector, that ends with ``status``; ``word``: its first 32 bits, read or to be written."""
        script, d = self._driver()
        script.store(d.header, kind, 0, sector, 0)
        script.store(d.status_byte, 0xFF)
        if kind == OUT:
            script.store(d.data, word or 0)
        d.descriptor(0, d.header, 16, 1, 2 if kind == FLUSH else 1)
        d.descriptor(1, d.data, 512, 1 | (2 if kind == IN else 0), 2)
        d.descriptor(2, d.status_byte, 1, 2, 0)
        self.requests += 1
        script.store(d.avail + 4, 0, 0, 0, 0)  # all heads are 0
        script.store(d.avail, self.requests << 16)
        d.notify(0)
        if self.polls:
            script.until(d.used, self.requests << 16)
        else:
            script.words += [f"slot={self.slot}", "isr"]
            script.expected.append("isr 1 then 0")
        script.load(d.status_byte, status)
        if kind == IN and word is not None:
            script.load(d.data, word)
        self.talk.do(script)

    def config_changed(self, sectors: int) -> None:
        """The driver is told that the disk has another size."""
        script, d = self._driver()
        if self.polls:
            script.until(layout.slot_address(self.slot) + CONFIG, sectors)
        else:
            script.words += [f"slot={self.slot}", "isr"]
            script.expected.append("isr 2 then 0")
        d.peek(CONFIG, sectors)
        self.talk.do(script)

    def reset(self) -> None:
        """It lets go."""
        script, d = self._driver()
        d.reset()
        self.talk.do(script)


@contextmanager
def machine(folder: Path, guest: Path, **fields: Any) -> Iterator[tuple[Vm, Talk, QmpClient, VmHost]]:
    """A VM whose guest listens."""
    with vm_host(folder) as host:
        kernel = {"image": str(guest), "cmdline": "print=ready serial"}
        vm = host.start({"name": "plug", "memory": "32M", "kernel": kernel, **fields})
        talk = Talk(vm)
        with closing(talk), vm.qmp() as qmp:
            yield vm, talk, qmp, host
            qmp.execute("quit")
        assert vm.wait_end()["status"] == 0


def image(folder: Path, name: str, size: int = MIB) -> Path:
    path = folder / name
    path.write_bytes(struct.pack("<I", 0xC0FFEE) + bytes(size - 4))
    return path


def blockdev(qmp: QmpClient, name: str, path: Path, **more: object) -> None:
    file = {"driver": "file", "filename": str(path)}
    qmp.execute("blockdev-add", {"node-name": name, "driver": "raw", "file": file, **more})


def peek(talk: Talk, slot: int, register: int, value: int) -> None:
    script = Script()
    GuestDriver(script, slot).peek(register, value)
    talk.do(script)


def present(talk: Talk, *slots: int) -> None:
    """What the guest's ACPI would say is there."""
    script = Script()
    script.load(PRESENT, sum(1 << slot for slot in slots))
    talk.do(script)


def ids(qmp: QmpClient) -> list[str]:
    return sorted(s["id"] for s in qmp.execute("x-motorcade-sidecars") if s["kind"] != "pager")


def until_ids(qmp: QmpClient, *wanted: str) -> None:
    for _ in range(10_000):
        if ids(qmp) == sorted(wanted):
            return
    raise AssertionError(ids(qmp))


def test_a_disk_comes_goes_and_comes_again(tmp_path: Path, guest: Path) -> None:
    """Its queue goes on through it all, since the guest's driver stays bound; and ends with the driver's reset."""
    path, other = image(tmp_path, "a.img"), image(tmp_path, "b.img", 2 * MIB)
    with machine(tmp_path, guest) as (_vm, talk, qmp, _):
        peek(talk, 3, Reg.DEVICE_ID, EMPTY)
        present(talk)
        blockdev(qmp, "a", path)
        blockdev(qmp, "b", other)
        qmp.execute("device_add", {"id": "d", "driver": "virtio-blk-device", "drive": "a", "addr": "0x3"})
        present(talk, 3)
        peek(talk, 3, Reg.MAGIC, MAGIC)
        peek(talk, 3, Reg.DEVICE_ID, 2)
        disk = Disk(talk, 3)
        disk.request(IN, OK, 0xC0FFEE)
        disk.request(OUT, OK, 0x5EED, sector=1)
        with pytest.raises(QmpError, match=r"Slot 0x3 is in use by device 'd'"):
            qmp.execute("device_add", {"id": "e", "driver": "virtio-blk-device", "drive": "b", "addr": "0x3"})
        qmp.execute("device_del", {"id": "d"})
        assert qmp.events[-1]["data"] == {"device": "d", "path": "d"}
        present(talk)
        disk.config_changed(0)
        disk.request(IN, IOERR)
        disk.request(OUT, IOERR, 0xBAD, sector=1)
        disk.request(FLUSH, OK)
        assert path.read_bytes()[512:516] == struct.pack("<I", 0x5EED)
        assert ids(qmp) == ["ttyS0", "~3"]
        with pytest.raises(QmpError, match=r"'d' not found"):
            qmp.execute("device_del", {"id": "d"})
        qmp.execute("device_add", {"id": "d", "driver": "virtio-blk-device", "drive": "b", "lun": 2})
        present(talk, 3)
        disk.config_changed(2 * MIB // 512)
        disk.request(IN, OK, 0xC0FFEE)
        assert ids(qmp) == ["d", "ttyS0"]
        qmp.execute("device_del", {"id": "d"})
        disk.reset()
        until_ids(qmp, "ttyS0")
        peek(talk, 3, Reg.DEVICE_ID, EMPTY)
        qmp.execute("blockdev-del", {"node-name": "a"})
        qmp.execute("blockdev-del", {"node-name": "b"})


def test_a_reset_of_the_machine_empties_what_is_held(tmp_path: Path, guest: Path) -> None:
    root = {"id": "root", "path": str(image(tmp_path, "a.img"))}
    with machine(tmp_path, guest, disks=[root]) as (_vm, talk, qmp, _):
        disk = Disk(talk, 0)
        disk.request(IN, OK, 0xC0FFEE)
        qmp.execute("device_del", {"id": "root"})  # of machine.yaml
        disk.config_changed(0)
        disk.request(IN, IOERR)
        qmp.execute("system_reset")
        talk.await_start()
        until_ids(qmp, "ttyS0")
        peek(talk, 0, Reg.DEVICE_ID, EMPTY)
        present(talk)


def files_of(pid: int) -> list[str]:
    """What its descriptors are, without what tells instances apart."""
    return sorted(str(fd.readlink()).split("[")[0].split(":")[0] for fd in Path(f"/proc/{pid}/fd").iterdir())


def test_nothing_is_left_of_what_came_and_went(tmp_path: Path, guest: Path) -> None:
    """Descriptors, processes, mappings, locks, state.json: as before, whether the driver was bound or not."""
    path = image(tmp_path, "a.img")
    with machine(tmp_path, guest) as (vm, talk, qmp, _):
        core = next(p["pid"] for p in vm.started["processes"] if p["role"] == "core")

        def round_trip(*, bound: bool) -> None:
            blockdev(qmp, "a", path)
            qmp.execute("device_add", {"id": "a", "driver": "virtio-blk-mmio"})
            slot = next(s["slot"] for s in qmp.execute("x-motorcade-sidecars") if s["id"] == "a")
            if bound:
                disk = Disk(talk, slot)
                disk.request(IN, OK, 0xC0FFEE)
            qmp.execute("device_del", {"id": "a"})
            if bound:
                disk.reset()
                until_ids(qmp, "ttyS0")
            qmp.execute("blockdev-del", {"node-name": "a"})
            qmp.execute("x-motorcade-device-add", {"net": {"id": "lan", "unplugged": True}})
            qmp.execute("device_del", {"id": "lan"})

        def left() -> tuple[list[str], list[str], list[str]]:
            with pytest.raises(QmpError, match="No such file"):
                blockdev(qmp, "none", tmp_path / "none")  # when it answers, the supervisor has nothing else to do
            children = Path(f"/proc/{vm.pid}/task/{vm.pid}/children").read_text().split()
            return files_of(vm.pid), files_of(core), sorted(children)

        round_trip(bound=False)
        before = left()
        for _ in range(3):
            round_trip(bound=True)
            round_trip(bound=False)
        assert left() == before


def refused(qmp: QmpClient, command: str, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(QmpError, match=match):
        qmp.execute(command, arguments)


def test_what_cannot_be_plugged_is_refused_and_leaves_nothing(tmp_path: Path, guest: Path) -> None:
    path = image(tmp_path, "a.img")
    (tmp_path / "empty.img").touch()
    root = {"id": "root", "path": str(image(tmp_path, "r.img"))}
    with machine(tmp_path, guest, disks=[root]) as (vm, talk, qmp, _):
        before = files_of(vm.pid)
        file = {"driver": "file", "filename": str(tmp_path / "none.img")}
        refused(qmp, "blockdev-add", {"node-name": "n", "driver": "raw", "file": file}, "none.img: No such file")
        refused(qmp, "blockdev-add", {"node-name": "n", "driver": "qcow2", "file": file}, "disks are raw")
        refused(qmp, "blockdev-add", {"node-name": "-n", "driver": "raw", "file": file}, "identifier")
        file["filename"] = str(tmp_path / "r.img")
        refused(qmp, "blockdev-add", {"node-name": "n", "driver": "raw", "file": file}, "r.img is in use by VM plug")
        refused(qmp, "netdev_add", {"id": "n"}, "exactly one of ifname")
        refused(qmp, "netdev_add", {"id": "n", "ifname": "mc-none"}, "no such interface")
        refused(qmp, "netdev_add", {"id": "n", "fd": "none"}, "'none' not found")
        driver = {"driver": "virtio-blk-device"}
        refused(qmp, "device_add", {"id": "d", **driver}, "can't find drive 'd'")
        refused(qmp, "device_add", {"id": "d", "driver": "e1000"}, "not a valid device model")
        refused(qmp, "device_add", {"id": "d", "driver": "virtio-net-device", "mac": "01:00:00:00:00:00"}, "unicast")
        refused(qmp, "device_add", {"id": "d", "mac": "02:00:00:00:00:00", **driver}, "-device.mac' not found")
        assert files_of(vm.pid) == before
        blockdev(qmp, "a", path)
        refused(qmp, "blockdev-add", {"node-name": "a", "driver": "raw", "file": file}, "Duplicate node")
        refused(qmp, "device_add", {"id": "root", "drive": "a", **driver}, "Duplicate device ID 'root'")
        refused(qmp, "device_add", {"id": "d", "drive": "a", "addr": "0x0", **driver}, "in use by device 'root'")
        refused(qmp, "device_add", {"id": "d", "drive": "a", "addr": "0x10", **driver}, "Slot 0x10 is none")
        refused(qmp, "device_add", {"id": "d", "drive": "a", "addr": "five", **driver}, "'addr' expects a slot")
        refused(qmp, "device_add", {"id": "d", "drive": "a", "addr": "1", "lun": 0, **driver}, "give one")
        refused(qmp, "device_add", {"id": "d", "netdev": "a", **driver}, "'virtio-blk-device.netdev' not found")
        refused(qmp, "device_add", {"id": "d", "driver": "virtio-net-device", "netdev": "a"}, "it is a disk")
        refused(qmp, "device_del", {"id": "ttyS0"}, "does not support hot-unplug")
        # A sidecar that cannot start: nothing is left of the device, and the backend may be closed.
        blockdev(qmp, "empty", tmp_path / "empty.img")
        refused(qmp, "blockdev-add", {"node-name": "none", "driver": "raw", "file": file}, "in use")
        settled = files_of(vm.pid)
        refused(qmp, "device_add", {"id": "e", "drive": "empty", **driver}, "its sidecar ended: .*0 bytes, less than")
        refused(qmp, "blockdev-add", {"node-name": "none", "driver": "raw", "file": file}, "in use")
        assert files_of(vm.pid) == settled
        assert ids(qmp) == ["root", "ttyS0"]
        peek(talk, 1, Reg.DEVICE_ID, EMPTY)
        present(talk, 0)
        empty = {"disk": {"id": "e", "path": str(tmp_path / "empty.img")}}
        refused(qmp, "x-motorcade-device-add", empty, "in use")
        for name in ("empty", "a"):
            qmp.execute("blockdev-del", {"node-name": name})
        refused(qmp, "x-motorcade-device-add", empty, "0 bytes")
        refused(qmp, "x-motorcade-device-add", {"disk": {"id": "e", "pth": "/x"}}, "unknown key; did you mean 'path'")
        refused(qmp, "x-motorcade-device-add", {"net": {"id": "e", "user": True, "tap": "t"}}, "exactly one of tap")
        assert files_of(vm.pid) == before
        # A full bus.
        for n in range(NICS):
            qmp.execute("x-motorcade-device-add", {"net": {"id": f"n{n}", "unplugged": True}})
        refused(qmp, "x-motorcade-device-add", {"net": {"id": "more", "unplugged": True}}, "All 16 slots")
        qmp.execute("device_del", {"id": "n7"})
        qmp.execute("x-motorcade-device-add", {"net": {"id": "more", "unplugged": True}})
        assert next(s["slot"] for s in qmp.execute("x-motorcade-sidecars") if s["id"] == "more") == 16 + 7


def test_a_held_slot_takes_its_like_alone(tmp_path: Path, guest: Path) -> None:
    path = image(tmp_path, "a.img")
    with machine(tmp_path, guest) as (_vm, talk, qmp, _):
        qmp.execute("x-motorcade-device-add", {"disk": {"id": "d", "path": str(path), "queues": 2}})
        disk = Disk(talk, 0)
        disk.request(IN, OK, 0xC0FFEE)
        qmp.execute("device_del", {"id": "d"})
        add = {"disk": {"id": "d", "path": str(path), "slot": 0}}
        refused(qmp, "x-motorcade-device-add", add, "holds the slot, and it has 2 queues, the device 1; unbind it")
        disk.config_changed(0)
        disk.request(IN, IOERR)
        add["disk"] |= {"queues": 2, "readonly": True}
        qmp.execute("x-motorcade-device-add", add)  # this driver never asked whether it may write
        disk.config_changed(MIB // 512)
        disk.request(IN, OK, 0xC0FFEE)
        disk.request(OUT, IOERR, 1)


def test_templates_have_what_was_plugged_and_what_is_held(tmp_path: Path, guest: Path) -> None:
    """Frozen, both go on in the restored machine, and can go there."""
    kept, gone = image(tmp_path, "a.img"), image(tmp_path, "b.img")
    with machine(tmp_path, guest) as (vm, talk, qmp, host):
        for name, path, slot in (("kept", kept, 2), ("gone", gone, 5)):
            qmp.execute("x-motorcade-device-add", {"disk": {"id": name, "path": str(path), "slot": slot}})
        qmp.execute("x-motorcade-device-add", {"net": {"id": "lan", "unplugged": True, "slot": 3}})
        first, second = Disk(talk, 2), Disk(talk, 5)
        first.request(OUT, OK, 0x11, sector=1)
        second.request(IN, OK, 0xC0FFEE)
        qmp.execute("device_del", {"id": "gone"})
        second.config_changed(0)
        assert vm.snapshot(tmp_path / "template")["status"] == "completed"
        from motorcade.orchestrator import restore as plans

        described = plans.read(tmp_path / "template").machine
        assert [(d.id, d.slot) for d in described.disks] == [("kept", 2)]
        assert [(n.id, n.slot) for n in described.nets] == [("lan", 3)]
        assert [(r.kind, r.slot) for r in described.removed] == [("blk", 5)]
        clone = start_clone(host, tmp_path / "template")
        with closing(Talk(clone, fresh=False)) as words, clone.qmp() as again:
            for disk in (first, second):
                disk.talk = words
            first.request(IN, OK, 0x11, sector=1)
            second.request(IN, IOERR)
            present(words, 2, 19)
            assert ids(again) == ["kept", "lan", "ttyS0", "~5"]
            again.execute("device_del", {"id": "kept"})
            first.config_changed(0)
            second.reset()
            until_ids(again, "lan", "ttyS0", "~2")
            again.execute("quit")
        assert clone.wait_end()["status"] == 0


def start_clone(host: VmHost, template: Path) -> Vm:
    """The template's own machine, under another name."""
    import msgspec

    from motorcade.orchestrator import restore as plans
    from motorcade.orchestrator.machine import encode

    plan = plans.read(template)
    described = msgspec.json.decode(msgspec.json.encode(plan.machine, enc_hook=encode))
    return host.start({**described, "name": "clone"}, template=template)


def test_sidecars_of_what_was_plugged_are_replaced_when_they_die(tmp_path: Path, guest: Path) -> None:
    """A new disk's, what answers in a held slot, and that of a disk which came to a held slot."""
    path = image(tmp_path, "a.img")
    with machine(tmp_path, guest) as (vm, talk, qmp, _):

        def kill(device: str) -> None:
            pid = next(s["pid"] for s in qmp.execute("x-motorcade-sidecars") if s["id"] == device)
            os.kill(pid, signal.SIGKILL)
            assert vm.await_event("sidecar-died")["role"] == f"blk-{device}"
            while (event := qmp.wait_event(60)) is not None:
                if event["event"] == "SIDECAR_RESTARTED":
                    assert event["data"]["id"] == device
                    return
            raise AssertionError(f"{device} is not replaced")

        add = {"disk": {"id": "d", "path": str(path), "slot": 2}}
        qmp.execute("x-motorcade-device-add", add)
        disk = Disk(talk, 2, polls=True)
        disk.request(OUT, OK, 0x22, sector=1)
        kill("d")
        disk.request(IN, OK, 0x22, sector=1)
        qmp.execute("device_del", {"id": "d"})
        disk.config_changed(0)
        kill("~2")
        disk.request(IN, IOERR)
        qmp.execute("x-motorcade-device-add", add)
        disk.config_changed(MIB // 512)
        kill("d")
        disk.request(IN, OK, 0x22, sector=1)


def test_a_debugged_disk_takes_its_socket_along(tmp_path: Path, guest: Path) -> None:
    """One of machine.yaml, and one that came later."""
    debugged = {"path": str(image(tmp_path, "a.img")), "debug": True}
    with machine(tmp_path, guest, disks=[{"id": "root", **debugged}]) as (vm, _talk, qmp, _):
        for n in range(2):
            assert (vm.run_dir / "debug-root.sock").exists()
            qmp.execute("device_del", {"id": "root"})
            assert not (vm.run_dir / "debug-root.sock").exists()
            if not n:
                qmp.execute("x-motorcade-device-add", {"disk": {"id": "root", **debugged}})


def test_vmmctl_device(host: Host, guest: Path, tmp_path: Path) -> None:
    image(tmp_path, "a.img")
    host.vmmctl("up", "-d", str(write_machine(tmp_path, "web", guest, cmdline="serve=0:0")))
    host.vmmctl("device", "add", "web", "disk", "id=data", f"path={tmp_path / 'a.img'}", "readonly=true", "slot=4")
    host.vmmctl("device", "add", "web", "net", "id=lan", "unplugged=true", "mac=02:00:00:00:00:01")
    listed = [line.split()[:3] for line in host.vmmctl("device", "ls", "web").stdout.splitlines()]
    assert listed[1:] == [["data", "blk", "4"], ["lan", "net", "0"], ["ttyS0", "serial", "-"]]
    assert host.state("web")["locks"][0]["path"] == str(tmp_path / "a.img")
    bad = host.vmmctl("device", "add", "web", "disk", "id=d", "readonly=maybe", "path=x", check=2).stderr
    assert "readonly" in bad
    assert "did you mean 'path'" in host.vmmctl("device", "add", "web", "disk", "id=d", "pat=x", check=2).stderr
    assert "'x' is not KEY=VALUE" in host.vmmctl("device", "add", "web", "disk", "x", check=2).stderr
    assert "No such file" in host.vmmctl("device", "add", "web", "disk", "id=d", "path=/none", check=1).stderr
    assert "'d' not found" in host.vmmctl("device", "del", "web", "d", check=1).stderr
    host.vmmctl("device", "del", "web", "data")
    host.vmmctl("device", "del", "web", "lan")
    assert [d["id"] for d in host.state("web")["devices"]] == ["ttyS0"]
    assert host.state("web")["locks"] == []
    host.vmmctl("down", "--force", "web")

