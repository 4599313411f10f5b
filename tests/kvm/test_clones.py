"""Templates from vmmctl's side, on bare KVM: frozen, restored, cloned, and what can go wrong with them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.vmmctl import Host, gone, write_machine

pytestmark = pytest.mark.kvm

# It greets, sends back what it gets, then does as the power button says.
CMDLINE = "print=hello echo=3 print=more irq=9 await=1 out=1540:52"
DISK = 1 << 20  # bytes


class World:
    """A folder with a machine.yaml, a disk, templates and overlays."""

    def __init__(self, host: Host, folder: Path, guest: Path) -> None:
        self.host, self.folder, self.guest = host, folder, guest
        self.overlays = folder / "overlays"
        self.overlays.mkdir()
        host.env["MOTORCADE_OVERLAY_DIR"] = str(self.overlays)
        (folder / "disk.img").write_bytes(os.urandom(DISK // 2) + bytes(DISK // 2))

    def machine(self, name: str = "web", **fields: Any) -> str:
        fields = {"disks": [{"id": "root", "path": "disk.img"}], "consoles": [{"id": "hvc0"}], **fields}
        return str(write_machine(self.folder, name, self.guest, **{"cmdline": CMDLINE, **fields}))

    def up(self, *args: str, check: int | None = 0) -> subprocess.CompletedProcess[str]:
        return self.host.vmmctl("up", "-d", *args, check=check)

    def freeze(self, name: str = "web", template: str = "t", *options: str) -> Path:
        self.host.vmmctl("snapshot", name, str(self.folder / template), *options)
        return self.folder / template

    def template(self, **fields: Any) -> Path:
        """Of a machine that has greeted; it is gone."""
        self.up(self.machine(**fields))
        path = self.freeze()
        self.end("web")
        return path

    def end(self, *names: str) -> None:
        for name in names:
            self.host.vmmctl("down", "--force", name)

    def says(self, name: str, text: str = "abc") -> str:
        """What its console has to say, old words first, when it gets this, until its guest has said more."""
        with self.host.running("console", name, stdin=subprocess.PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(text.encode())
            process.stdin.flush()
            said = b""
            while not re.search(rb"more\r?\n", said):
                some = os.read(process.stdout.fileno(), 4096)
                assert some, said
                said += some
        return said.decode().replace("\r", "")

    def qmp(self, name: str, *words: str) -> Any:
        return json.loads(self.host.vmmctl("qmp", name, *words).stdout)


@pytest.fixture
def world(host: Host, guest: Path, tmp_path: Path) -> Iterator[World]:
    w = World(host, tmp_path, guest)
    yield w
    host.vmmctl("zygote", "stop", check=None)
    assert list(w.overlays.iterdir()) == []


# Snapshots.


def test_a_guest_goes_on_after_its_snapshot_and_from_it(world: World) -> None:
    world.up(world.machine())
    template = world.freeze()
    assert sorted(p.name for p in template.iterdir()) == ["disk-root.raw", "memory", "state"]
    assert (template / "disk-root.raw").read_bytes() == (world.folder / "disk.img").read_bytes()
    assert (template / "memory").stat().st_blocks * 512 < 8 << 20
    assert world.says("web") == "hello\nabcmore\n"
    world.end("web")
    world.up("--incoming", f"file:{template}")
    assert world.says("web") == "hello\nabcmore\n"
    assert world.host.state("web")["config"] == f"{template}/state"
    world.host.vmmctl("down", "web")
    assert world.host.state("web")["ended"]["reason"] == "guest-shutdown"


def test_frozen_again_before_it_runs_it_is_the_same(world: World) -> None:
    """Byte for byte: the disk too, since nothing was written to it."""
    disks = [
        {"id": "raw", "path": "disk.img"},
        {"id": "over", "path": "base.img", "overlay": True},
        {"id": "ro", "path": "ro.img", "readonly": True},
    ]
    for name in ("base.img", "ro.img"):
        (world.folder / name).write_bytes(os.urandom(DISK))
    first = world.template(disks=disks)
    world.up("--paused", "--incoming", f"file:{first}")
    second = world.freeze("web", "second")
    world.end("web")
    names = ["disk-over.overlay", "disk-raw.raw", "memory", "state"]
    assert sorted(p.name for p in second.iterdir()) == names
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_a_base_saves_space(world: World) -> None:
    world.up(world.machine())
    base = world.freeze("web", "base")
    child = world.freeze("web", "child", "--base", str(base), "--live")
    assert (child / "memory").stat().st_blocks < (base / "memory").stat().st_blocks / 2
    world.end("web")
    world.up("--incoming", f"file:{child}")
    assert world.says("web") == "hello\nabcmore\n"
    world.end("web")
    # Both moved: the base is found beside.
    moved = world.folder / "moved"
    moved.mkdir()
    for path in (base, child):
        path.rename(moved / path.name)
    world.up("--incoming", f"file:{moved}/child")
    world.end("web")
    shutil.rmtree(moved / "base")
    done = world.up("--incoming", f"file:{moved}/child", check=1)
    assert done.stderr == f"vmmctl: {moved}/child: it builds on the template {base}, which is missing\n"


def test_a_cancelled_snapshot_leaves_nothing(world: World) -> None:
    """A disk's process that stands still keeps it from ending by itself."""
    world.up(world.machine())
    blk = world.host.pid("web", "blk-root")
    os.kill(blk, signal.SIGSTOP)
    with world.host.running("snapshot", "web", str(world.folder / "t")) as process:
        world.host.wait_for("the target", lambda: list(world.folder.glob("t.*.part/state")))
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 128 + signal.SIGINT
    os.kill(blk, signal.SIGCONT)
    assert list(world.folder.glob("t*")) == []
    assert world.qmp("web", "query-migrate")["status"] == "cancelled"
    assert world.says("web") == "hello\nabcmore\n"
    world.freeze()
    world.end("web")


def test_targets_that_are_none(world: World) -> None:
    world.up(world.machine())
    (world.folder / "full/x").mkdir(parents=True)
    for where, why in (("no/t", "there is no folder"), ("full", "exists, and is not empty"), ("web.yaml", "not a dir")):
        done = world.host.vmmctl("snapshot", "web", str(world.folder / where), check=1)
        assert why in done.stderr
        assert world.qmp("web", "query-status")["running"] is True
    done = world.host.vmmctl("snapshot", "web", str(world.folder / "t"), "--base", str(world.folder / "full"), check=1)
    assert "full: not a template: there is no state in it" in done.stderr
    assert list(world.folder.glob("*.part")) == []
    world.end("web")


@pytest.mark.parametrize("size", ["256k", "1500k"])
def test_no_space_left(world: World, size: str) -> None:
    """For the memory, for the disk: the guest goes on, and nothing is left."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    small = world.folder / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", small], check=True)
    try:
        (world.folder / "disk.img").write_bytes(os.urandom(DISK * 2))
        world.up(world.machine())
        done = world.host.vmmctl("snapshot", "web", str(small / "t"), check=1)
        assert "No space left on device" in done.stderr
        assert list(small.iterdir()) == []
        assert world.says("web") == "hello\nabcmore\n"
        world.end("web")
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.parametrize("victim", ["core", "supervisor"])
def test_what_a_killed_vm_left_is_removed_by_the_next_snapshot(world: World, victim: str) -> None:
    """The core's death is the supervisor's to clean up after; what that one leaves itself, another VM finds."""
    world.up(world.machine())
    disk = world.host.pid("web", "blk-root")
    os.kill(disk, signal.SIGSTOP)
    pids = world.host.live_pids("web")
    with world.host.running("snapshot", "web", str(world.folder / "t")) as process:
        world.host.wait_for("the target", lambda: list(world.folder.glob("t.*.part/state")))
        other = world.up(world.machine("other", disks=[]))
        busy = world.host.vmmctl("snapshot", "other", str(world.folder / "t"), check=1)
        assert re.search(r"/t: another VM's snapshot \(process \d+\) goes there now", busy.stderr), other
        os.kill(world.host.pid("web", victim), signal.SIGKILL)
        if victim == "core":
            os.kill(disk, signal.SIGCONT)  # who waits for its end; a supervisor's death has killed it
        assert process.wait(timeout=60) == 1
    for pid in pids:
        gone([pid])
    assert len(list(world.folder.glob("t.*.part"))) == (victim == "supervisor")
    world.freeze("other")
    assert [p.name for p in world.folder.glob("t*")] == ["t"]
    world.end("other")


# Clones.


def test_clones_have_all_of_their_own(world: World) -> None:
    template = world.template()
    done = world.host.vmmctl("clone", str(template), "-n", "3", "--fresh-serial")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["web-1", "web-2", "web-3"] or len(
        set(done.stdout.split())
    )
    names = ["web-1", "web-2", "web-3"]
    assert sorted(world.host.names()) == names
    assert len({world.qmp(name, "query-uuid")["UUID"] for name in names}) == 3
    for name in names:
        assert world.says(name) == "hello\nabcmore\n"
    assert list(world.overlays.iterdir()) == []
    more = world.host.vmmctl("clone", str(template), "-n", "2", "--paused")
    assert sorted(line.split()[0] for line in more.stdout.splitlines()) == ["web-4", "web-5"]
    assert world.qmp("web-4", "query-status")["running"] is False
    assert "disk d" not in done.stderr
    world.end(*names, "web-4", "web-5")
    assert world.host.names() == []


def test_clones_survive_their_template(world: World) -> None:
    """Its files are open; that its directory is gone does not matter to those who run."""
    template = world.template()
    world.host.vmmctl("clone", str(template), "--name", "c")
    shutil.rmtree(template)
    os.kill(world.host.pid("c", "pager"), signal.SIGKILL)
    assert world.says("c") == "hello\nabcmore\n"
    world.end("c")
    assert world.host.state("c")["ended"]["status"] == 0


def test_kill_9_of_everything_leaves_no_file(world: World) -> None:
    template = world.template()
    before = sorted(p.name for p in world.folder.iterdir())
    world.host.vmmctl("clone", str(template), "-n", "2")
    pids = [pid for name in ("web-1", "web-2") for pid in world.host.live_pids(name)]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    gone(pids)
    assert sorted(p.name for p in world.folder.iterdir()) == before
    assert "killed" in world.host.vmmctl("ps").stdout
    # Their names are free again, and what they left in the run directory goes with that.
    world.host.vmmctl("clone", str(template), "-n", "2")
    world.end("web-1", "web-2")
    assert world.host.names() == []


def test_some_fail_and_the_others_run(world: World) -> None:
    template = world.template()
    keep = world.folder / "keep"
    keep.mkdir()
    (keep / "web-2-root.overlay").write_text("no overlay")
    done = world.host.vmmctl("clone", str(template), "-n", "3", "--keep-overlays", str(keep), check=1)
    assert sorted(line.split()[0] for line in done.stdout.splitlines()) == ["web-1", "web-3"]
    assert re.search(rf"vmmctl: web-2: disk root: overlay {keep}/web-2-root.overlay over .*: it is not an", done.stderr)
    assert sorted(p.name for p in keep.iterdir()) == [f"web-{n}-root.overlay" for n in (1, 2, 3)]
    world.end("web-1", "web-3")
    assert sorted(p.name for p in keep.iterdir()) == [f"web-{n}-root.overlay" for n in (1, 2, 3)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-n", "0"], "-n 0: 1 to"),
        (["-n", "2", "--name", "x"], "several clones need a {n} in their names"),
        (["--name", "a/b"], "'a/b': letters, digits"),
        (["--tap", "lan"], "--tap lan: not ID=PATTERN"),
        (["--tap", "wan=tap0"], "the template has no NIC wan (it has: lan)"),
    ],
)
def test_command_lines_that_are_wrong(world: World, words: list[str], message: str) -> None:
    template = world.template(nets=[{"id": "lan", "unplugged": True}])
    assert message in world.host.vmmctl("clone", str(template), *words, check=2).stderr
    assert world.host.names() == []


def test_a_tap_that_is_missing(world: World) -> None:
    template = world.template(nets=[{"id": "lan", "unplugged": True}])
    done = world.host.vmmctl("clone", str(template), "--tap", "lan=mc-none{n}", check=1)
    assert "vmmctl: web-1: tap mc-none1: there is no such interface" in done.stderr


def test_consoles_and_links_of_the_template_are_not_shared(world: World) -> None:
    """Two VMs cannot both have a file, a socket or one end of a cable."""
    consoles = [{"id": "log", "backend": {"file": "log.txt"}}, {"id": "s", "backend": {"socket": "s.sock"}}]
    world.up(world.machine(consoles=consoles, nets=[{"id": "lan", "link": "cable"}], qmp=["unix:extra.sock"]))
    template = world.freeze()
    world.host.vmmctl("clone", str(template), "-n", "2")  # while the first one has them
    for name in ("web-1", "web-2"):
        backends = {d["id"]: d["backend"] for d in world.host.state(name)["devices"]}
        assert backends["lan"] == "unplugged"
        assert backends["log"] == f"vmmctl console {name} log"
    world.end("web", "web-1", "web-2")


# Disks.


def test_a_disk_that_is_missing_or_changed_is_named(world: World) -> None:
    base = world.folder / "base.img"
    base.write_bytes(os.urandom(DISK))
    template = world.template(disks=[{"id": "root", "path": "base.img", "overlay": True}])
    incoming = ("--incoming", f"file:{template}")
    overlay = template / "disk-root.overlay"
    world.up(*incoming)
    world.end("web")
    good = base.read_bytes()
    times = (base.stat().st_atime_ns, base.stat().st_mtime_ns)
    base.write_bytes(good[:-1] + b"x")
    done = world.up(*incoming, check=1)
    assert f"disk root: {base} was modified after the template was made" in done.stderr
    os.utime(base, ns=times)
    base.write_bytes(b"x" + good[1:])
    os.utime(base, ns=times)
    assert f"disk root: {base} has another content" in world.up(*incoming, check=1).stderr
    base.write_bytes(good[:-512])
    assert f"disk root: {base} has {DISK - 512} bytes now and had {DISK}" in world.up(*incoming, check=1).stderr
    base.unlink()
    assert f"disk root: {base}: No such file or directory" in world.up(*incoming, check=1).stderr
    base.write_bytes(good)
    os.utime(base, ns=times)
    overlay.chmod(0o600)
    with overlay.open("r+b") as f:
        f.write(b"x")
    assert f"disk root: {overlay} was modified after" in world.up(*incoming, check=1).stderr
    overlay.unlink()
    assert f"disk root: {overlay}: No such file or directory" in world.up(*incoming, check=1).stderr


def test_disks_can_be_rebound(world: World) -> None:
    """To a copy, to an overlay with a name; of another size they cannot."""
    template = world.template()
    (world.folder / "copy.img").write_bytes((world.folder / "disk.img").read_bytes())
    (world.folder / "small.img").write_bytes(bytes(DISK // 2))
    incoming = ("--incoming", f"file:{template}")
    world.up(*incoming, world.machine(disks=[{"id": "root", "path": "copy.img"}]))
    assert world.host.state("web")["devices"][0]["backend"] == f"{world.folder}/copy.img"
    world.end("web")
    named = world.machine(disks=[{"id": "root", "path": "disk.img", "overlay": "mine"}])
    for _ in range(2):  # made, and used again
        world.up(*incoming, named)
        backend = world.host.state("web")["devices"][0]["backend"]
        assert backend == f"{template}/disk-root.raw + overlay {world.folder}/mine"
        world.end("web")
    small = world.machine(disks=[{"id": "root", "path": "small.img"}])
    done = world.up(*incoming, small, check=2)
    where = "web.yaml:1:"
    assert where in done.stderr
    assert (
        f"disks[0].path: {world.folder}/small.img has {DISK // 2} bytes, the template's disk has {DISK}" in done.stderr
    )


def test_templates_of_restored_machines_pile_up(world: World) -> None:
    """A disk of three files and more, each of which is read only."""
    (world.folder / "base.img").write_bytes(os.urandom(DISK))
    world.template(disks=[{"id": "root", "path": "base.img", "overlay": True}])
    keep = world.folder / "keep"
    keep.mkdir()
    last = world.folder / "t"
    for n in range(3):
        world.up("--incoming", f"file:{last}", "--name", f"v{n}", "--keep-overlays", str(keep))
        last = world.freeze(f"v{n}", f"t{n}")
        backend = world.host.state(f"v{n}")["devices"][0]["backend"]
        assert backend.count(" + ") == 2 + n
        world.end(f"v{n}")


# Restoring.


def test_a_machine_that_is_not_the_templates_is_told_by_file_and_line(world: World) -> None:
    template = world.template()
    (world.folder / "web.yaml").write_text(
        f"name: web\nmemory: 32M\ncpus: 2\naccel: kvm\nkernel: {{image: {world.guest}}}\n"
        "disks:\n- {id: root, path: disk.img, queues: 2}\nconsoles:\n- {id: other}\n"
    )
    done = world.up("--incoming", f"file:{template}", str(world.folder / "web.yaml"), check=2)
    lines = [line.removeprefix(f"vmmctl: {world.folder}/web.yaml:") for line in done.stderr.splitlines()]
    with_template = f"but the template {template}"
    assert lines == [
        f"2:1: memory: 32M, {with_template} was made with 16M",
        f"3:1: cpus: 2, {with_template} was made with 1",
        f"7:30: disks[0].queues: 2, {with_template} was made with 1",
        f"8:1: consoles: ttyS0, other, {with_template} has consoles ttyS0, hvc0",
    ]


def test_templates_that_are_none(world: World) -> None:
    template = world.template()
    state = (template / "state").read_bytes()
    for content, message in ((b"", "not a template"), (state[:-1], "truncated"), (state[:-1] + b"x", "damaged")):
        (template / "state").write_bytes(content)
        assert message in world.up("--incoming", f"file:{template}", check=1).stderr
        assert message in world.host.vmmctl("clone", str(template), check=1).stderr
    assert "not a template: there is no state in it" in world.up("--incoming", "file:/tmp", check=1).stderr
    assert "a template is named by file:DIR" in world.up("--incoming", "tcp:x", check=1).stderr
    (template / "state").write_bytes(state)
    (template / "memory").unlink()
    done = world.up("--incoming", f"file:{template}", check=1)
    assert done.stderr == f"vmmctl: {template}/memory: No such file or directory\n"
    assert "go with --incoming" in world.up("--same-id", world.machine(), check=2).stderr


@pytest.mark.parametrize("how", ["flipped", "truncated"])
def test_damaged_memory_ends_the_vm_with_its_reason(world: World, how: str) -> None:
    template = world.template()
    memory = template / "memory"
    data = bytearray(memory.read_bytes())
    if how == "flipped":
        for at in range(0, len(data), 4096):
            if any(data[at : at + 4096]):
                data[at] ^= 1
        memory.write_bytes(data)
    else:
        with memory.open("r+b") as f:
            f.truncate(4096)
    done = world.host.vmmctl("up", "--incoming", f"file:{template}", check=1)
    assert "template" in done.stderr
    assert "Traceback" not in done.stderr
    assert world.host.names() == []


def test_a_pager_that_is_killed_is_replaced(world: World) -> None:
    template = world.template()
    world.up("--paused", "--incoming", f"file:{template}")
    for _ in range(3):
        pager = world.host.pid("web", "pager")
        os.kill(pager, signal.SIGKILL)
        world.host.wait_for("another pager", lambda: world.host.pid("web", "pager") != pager)  # noqa: B023
    world.qmp("web", "cont")
    assert world.says("web") == "hello\nabcmore\n"
    world.host.wait_for("it to run", lambda: "running" in str(processes(world, "pager")))
    world.freeze("web", "again")  # which has it fetch everything
    world.end("web")


def processes(world: World, role: str) -> list[str]:
    return [p["state"] for p in world.host.state("web")["processes"] if p["role"] == role]


def test_a_working_set_is_kept_beside_the_template(world: World) -> None:
    template = world.template()
    world.up("--incoming", f"file:{template}")
    world.host.wait_for("the working set", (template / "working-set").exists)
    world.end("web")
    kept = (template / "working-set").read_bytes()
    world.up("--incoming", f"file:{template}")
    assert world.says("web") == "hello\nabcmore\n"
    world.end("web")
    assert (template / "working-set").read_bytes() == kept
    assert sorted(p.name for p in template.iterdir()) == ["disk-root.raw", "memory", "state", "working-set"]


def test_a_machine_can_wait_for_its_template(world: World) -> None:
    template = world.template()
    disk = {"id": "root", "path": str(template / "disk-root.raw"), "overlay": "mine"}
    world.up("--incoming", "defer", world.machine(disks=[disk]))
    assert world.host.state("web")["status"] == "incoming"
    assert world.qmp("web", "query-status")["status"] == "inmigrate"
    no = world.host.vmmctl("qmp", "web", "migrate-incoming", "uri=file:/nowhere", check=1)
    assert "/nowhere: no such directory" in no.stderr
    world.qmp("web", "migrate-incoming", f"uri=file:{template}")
    assert world.says("web") == "hello\nabcmore\n"
    assert "does not wait" in world.host.vmmctl("qmp", "web", "migrate-incoming", "uri=file:/x", check=1).stderr
    world.end("web")
    world.up("--incoming", "defer", world.machine(disks=[disk]))
    world.end("web")
    assert world.host.names() == []


def test_without_userfaultfd_the_memory_is_copied_first(world: World) -> None:
    """No /dev/userfaultfd, and no right to the system call."""
    if os.geteuid() != 0:
        pytest.skip("dropping capabilities needs root")
    template = world.template()
    command = " ".join(world.host.command("up", "-d", "--incoming", f"file:{template}"))
    script = f"mount --bind /dev/null /dev/userfaultfd && exec setpriv --bounding-set=-sys_ptrace {command}"
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], env=world.host.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "all of the memory is copied" in world.host.vmmctl("logs", "web", "supervisor").stdout
    assert world.says("web") == "hello\nabcmore\n"
    world.end("web")
