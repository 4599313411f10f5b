"""Checkpoints of whole VMs in one file: saved, restored, damaged, moved; real guests on bare KVM."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.vmmctl import Host, write_machine
from motorcade.orchestrator import savefile
from motorcade.orchestrator.errors import UserError

pytestmark = pytest.mark.kvm

CMDLINE = "ram=16777216:256:100 print=hello echo=3 print=more irq=9 await=1 out=1540:52"
DISK = 1 << 20


class World:
    """A folder with a machine.yaml, a disk, and checkpoints."""

    def __init__(self, host: Host, folder: Path, guest: Path) -> None:
        self.host, self.folder, self.guest = host, folder, guest
        (folder / "disk.img").write_bytes(os.urandom(DISK))
        (folder / "base.img").write_bytes(os.urandom(DISK))

    def up(self, name: str = "web", **fields: Any) -> None:
        disks = [{"id": "raw", "path": "disk.img"}, {"id": "over", "path": "base.img", "overlay": True}]
        machine = write_machine(
            self.folder, name, self.guest, cmdline=CMDLINE, **{"memory": "32M", "disks": disks, **fields}
        )
        self.host.vmmctl("up", "-d", str(machine))
        self.hear(name, "hello")

    def hear(self, name: str, text: str, typed: str = "") -> str:
        """What its console has to say up to ``text``, when it gets what is typed."""
        with self.host.running("console", name, stdin=subprocess.PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(typed.encode())
            process.stdin.flush()
            said = b""
            while text.encode() not in said:
                some = os.read(process.stdout.fileno(), 4096)
                assert some, said
                said += some
        return said.decode().replace("\r", "")

    def goes_on(self, name: str = "web") -> bool:
        return "abcmore" in self.hear(name, "more", "abc")

    def save(self, *options: str, file: str = "web.save", name: str = "web", check: int = 0) -> str:
        done = self.host.vmmctl("save", name, str(self.folder / file), *options, check=check)
        return done.stderr

    def restore(self, *options: str, file: str = "web.save", check: int = 0) -> str:
        done = self.host.vmmctl("restore", "-d", *options, str(self.folder / file), check=check)
        return done.stderr

    def down(self, name: str = "web") -> None:
        self.host.vmmctl("down", "--force", name)


@pytest.fixture
def world(host: Host, guest: Path, tmp_path: Path) -> World:
    return World(host, tmp_path, guest)


def test_a_machine_goes_on_from_its_file(world: World) -> None:
    world.up()
    world.save()
    assert world.host.names() == []
    assert world.host.state("web")["ended"]["reason"] == "host-qmp-quit"
    assert [p.name for p in world.folder.glob("web.save*")] == ["web.save"]
    assert (world.folder / "web.save").stat().st_blocks * 512 < 8 << 20
    (world.folder / "web.yaml").unlink()  # nothing else is needed but the disks
    world.restore()
    assert world.goes_on()
    world.host.vmmctl("down", "web")
    assert world.host.state("web")["ended"]["reason"] == "guest-shutdown"


def test_it_begins_with_the_configuration(world: World) -> None:
    world.up()
    world.save()
    first, _, rest = (world.folder / "web.save").read_bytes()[: 64 << 10].partition(b"\n")
    assert first.startswith(b"MOTORCADE CHECKPOINT 1 ")
    header = json.loads(rest[: int(first.split()[3])])
    assert header["machine"]["name"] == "web"
    assert [d["path"] for d in header["machine"]["disks"]] == [str(world.folder / n) for n in ("disk.img", "base.img")]


def test_saved_again_before_it_runs_it_is_the_same(world: World) -> None:
    world.up()
    world.save()
    world.restore("--paused", "--same-id")
    world.save(file="again.save")
    assert (world.folder / "web.save").read_bytes() == (world.folder / "again.save").read_bytes()


def test_a_machine_that_is_left_running_goes_on(world: World) -> None:
    world.up()
    world.save("--leave-running")
    assert world.goes_on()
    world.down()
    world.restore("--name", "other", "--paused")  # its disks were not written to
    assert world.host.names() == ["other"]
    world.host.vmmctl("qmp", "other", "cont")
    assert world.goes_on("other")
    world.down("other")


def test_a_paused_machine_can_be_left_as_it_is(world: World) -> None:
    world.up()
    world.host.vmmctl("qmp", "web", "stop")
    world.save("--leave-running")
    assert json.loads(world.host.vmmctl("qmp", "web", "query-status").stdout)["status"] == "postmigrate"
    world.host.vmmctl("qmp", "web", "cont")
    assert world.goes_on()
    world.down()


def test_after_the_save_the_machine_rests_until_it_is_told(world: World) -> None:
    """What vmmctl does by quit may as well be undone by cont: nothing has changed meanwhile."""
    world.up()
    before = [(world.folder / n).stat().st_mtime_ns for n in ("disk.img", "web-over.overlay")]
    world.host.vmmctl("qmp", "web", "x-motorcade-save", json.dumps({"file": str(world.folder / "web.save")}))
    world.host.wait_for("the file", lambda: (world.folder / "web.save").exists())
    status: dict[str, Any] = {}
    while status.get("status") != "postmigrate":
        status = json.loads(world.host.vmmctl("qmp", "web", "query-status").stdout)
    assert [(world.folder / n).stat().st_mtime_ns for n in ("disk.img", "web-over.overlay")] == before
    world.host.vmmctl("qmp", "web", "cont")
    assert world.goes_on()
    world.down()


def test_disks_that_have_changed_are_named(world: World) -> None:
    world.up()
    world.save()
    disk = world.folder / "disk.img"
    with disk.open("r+b") as file:
        file.write(b"something else")
    assert f"disk raw: {disk} was modified after the machine was saved" in world.restore(check=1)
    disk.unlink()
    assert f"disk raw: {disk}: No such file or directory" in world.restore(check=1)
    assert world.host.names() == []


def test_a_clone_has_no_disk_to_name(world: World) -> None:
    world.up()
    world.host.vmmctl("snapshot", "web", str(world.folder / "t"))
    world.host.vmmctl("clone", str(world.folder / "t"), "--name", "c")
    assert "disk raw: what it writes goes to a file without a name" in world.save(name="c", check=1)
    assert world.goes_on("c")
    world.down("c")
    # One whose overlays stay has.
    world.host.vmmctl("clone", str(world.folder / "t"), "--name", "c", "--keep-overlays", str(world.folder))
    world.save(name="c", file="c.save")
    world.restore(file="c.save")
    assert world.goes_on("c")
    world.down("c")
    world.down()
    world.host.vmmctl("zygote", "stop", check=None)


def test_a_file_that_cannot_be_written_leaves_the_guest_as_it_was(world: World) -> None:
    world.up()
    (world.folder / "folder").mkdir()
    assert "exists, and is not a file" in world.save(file="folder", check=1)
    assert "there is no folder" in world.save(file="no/web.save", check=1)
    if os.geteuid() == 0:
        small = world.folder / "small"
        small.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", small], check=True)
        try:
            assert "No space left on device" in world.save(file="small/web.save", check=1)
            assert list(small.iterdir()) == []
        finally:
            subprocess.run(["umount", small], check=True)
    assert world.goes_on()
    world.down()


def test_a_state_that_cannot_be_written_ends_the_rest(world: World) -> None:
    """Memory is there, and the machine already rests for good."""
    world.up()
    limit = 32 << 20
    resource.prlimit(world.host.pid("web", "core"), resource.RLIMIT_FSIZE, (limit, limit))
    assert "File too large" in world.save(check=1)
    assert list(world.folder.glob("web.save*")) == []
    assert world.goes_on()
    world.down()


def test_ctrl_c_gives_up(world: World) -> None:
    """A disk's process that stands still keeps it from ending by itself."""
    world.up()
    blk = world.host.pid("web", "blk-raw")
    os.kill(blk, signal.SIGSTOP)
    with world.host.running("save", "web", str(world.folder / "web.save")) as process:
        world.host.wait_for("the file", lambda: list(world.folder.glob("web.save.*.part")))
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 128 + signal.SIGINT
    os.kill(blk, signal.SIGCONT)
    assert list(world.folder.glob("web.save*")) == []
    assert world.goes_on()
    world.down()


def _cut(data: bytearray, at: int) -> None:
    del data[at:]


def _flip(data: bytearray, at: int) -> None:
    data[at] ^= 4


@contextlib.contextmanager
def damaged(path: Path, how: Any, at: int) -> Iterator[Path]:
    copy = path.with_name("damaged")
    data = bytearray(path.read_bytes())
    how(data, at)
    copy.write_bytes(data)
    yield copy
    copy.unlink()


def test_damage_is_found_before_anything_runs(world: World) -> None:
    world.up(disks=[])
    world.save()
    path = world.folder / "web.save"
    size, header = path.stat().st_size, 128 << 10
    memory = header + (64 << 10)
    state = memory + (32 << 20)
    places = [0, 22, 30, 60, 400, header - 1, header, header + 1024, header + 1025, memory + (16 << 20), memory + 100]
    places += [memory + (30 << 20), state, state + 15, state + 60, state + 64, state + 1000, size - 1]
    for at in places:
        with damaged(path, _flip, at) as copy, pytest.raises(UserError, match="damaged:"):
            savefile.read(copy)
            savefile.verify(copy)
            print(f"a flipped bit at {at:#x} was not seen")
    for at in (0, 1, 20, 100, header - 1, header, memory, state - 1, state, state + 63, state + 64, size - 1):
        with damaged(path, _cut, at) as copy, pytest.raises(UserError, match="damaged:"):
            savefile.read(copy)
            print(f"a cut at {at:#x} was not seen")
    with damaged(path, bytearray.append, 0) as copy, pytest.raises(UserError, match="goes on after its end"):
        savefile.read(copy)
    # As a user sees it.
    with damaged(path, _flip, memory + (16 << 20)):
        assert world.restore(file="damaged", check=1) == (
            f"vmmctl: {world.folder}/damaged: its memory at 0x1000000 is damaged: its checksum is wrong\n"
        )
    assert world.restore(file="web.yaml", check=1) == f"vmmctl: {world.folder}/web.yaml: not a checkpoint\n"
    assert "No such file" in world.restore(file="nothing", check=1)
    newer = bytearray(path.read_bytes())
    newer[21:22] = b"2"
    (world.folder / "newer").write_bytes(newer)
    assert "its format is version 2, newer than this program" in world.restore(file="newer", check=1)
    machine = str(world.folder / "web.yaml")
    done = world.host.vmmctl("up", "-d", "--incoming", f"file:{path}", machine, check=1)
    assert done.stderr == f"vmmctl: {path}: a checkpoint; vmmctl restore goes on from it\n"
    assert world.host.names() == []
    world.restore()
    assert world.goes_on()
    world.down()


def test_the_file_may_go_while_the_machine_runs(world: World) -> None:
    world.up()
    world.save()
    world.restore("--paused")
    (world.folder / "web.save").unlink()
    world.host.vmmctl("qmp", "web", "cont")
    assert world.goes_on()
    world.down()
