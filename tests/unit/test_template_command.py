"""vmmctl template on real directories, made without a VM."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.vmmctl import Host
from motorcade.core.snapshot.ram import Base, RamWriter
from motorcade.orchestrator.frozendisks import File, FrozenDisk
from motorcade.orchestrator.frozendisks import encode as encode_disks
from motorcade.proto import template
from motorcade.proto.template import CHUNK, Component, Cpu, Parent, Template
from motorcade.sidecars.blk import overlay

SIZE = 40 * CHUNK


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as h:
        yield h


def _disk(path: Path) -> FrozenDisk:
    fd = os.open(path, os.O_RDONLY)
    now = overlay.identify(fd)
    os.close(fd)
    return FrozenDisk("root", True, now.size, [File(str(path), now.size, now.mtime, now.sample.hex())])


def _chain(folder: Path) -> list[Path]:
    """The directories of a template and of those that it builds on."""
    fd = os.open(folder / "state", os.O_RDONLY)
    parents = template.read(fd).parents
    os.close(fd)
    return [folder, *(Path(parent.path) for parent in parents)]


def make(folder: Path, data: bytes, disk: Path, base: Path | None = None, **fields: Any) -> Path:
    """A template whose RAM begins with ``data``."""
    folder.mkdir()
    memfd = os.memfd_create("ram")
    os.ftruncate(memfd, SIZE)
    os.pwrite(memfd, data, 0)
    fd = os.open(folder / "memory", os.O_RDWR | os.O_CREAT)
    of: Base | None = None
    parents: tuple[Parent, ...] = ()
    fds: tuple[int, ...] = ()
    if base is not None:
        state = os.open(base / "state", os.O_RDONLY)
        below = template.read(state)
        fds = tuple(os.open(place / "memory", os.O_RDONLY) for place in _chain(base))
        of, parents = Base.of(below, fds), (Parent(str(base), template.identity(state)), *below.parents)
        os.close(state)
    writer = RamWriter(memfd, SIZE, fd, of)
    writer.start_all()
    writer.finish()
    machine: dict[str, Any] = {
        "name": "web",
        "cpus": 2,
        "memory": SIZE,
        "kernel": {"image": "/boot/vmlinuz"},
        "disks": [{"id": "root", "path": str(disk), "readonly": True}],
        "consoles": [{"id": "con", "type": "uart"}],
    }
    parts: dict[str, Any] = {
        "description": json.dumps(machine),
        "cpu": Cpu(b"", (0x10, 0x174), 4096),
        "memory_size": SIZE,
        "layers": writer.layers,
        "sums": writer.sums,
        "parents": parents,
        "disks": encode_disks([_disk(disk)]),
        "components": (Component("vm", 1, b"x"), Component("vcpu.0", 1, b"y")),
    }
    (folder / "state").write_bytes(template.encode(Template(**{**parts, **fields})))
    writer.close()
    for one in (memfd, fd, *fds):
        os.close(one)
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(1 << 20))
    return path


@pytest.fixture
def pair(tmp_path: Path, disk: Path) -> tuple[Path, Path]:
    """A template, and one that is based on it."""
    folder = tmp_path / "templates"
    folder.mkdir()
    data = os.urandom(10 * CHUNK)
    base = make(folder / "base", data, disk)
    return base, make(folder / "next", b"changed" + data[7:], disk, base)


def test_ls_shows_the_templates_of_a_folder(host: Host, pair: tuple[Path, Path]) -> None:
    base, following = pair
    (base.parent / "notes.txt").write_text("not a template")
    (base.parent / "empty").mkdir()
    rows = host.vmmctl("template", "ls", str(base.parent)).stdout.splitlines()
    assert rows[0].split() == ["NAME", "SIZE", "RAM", "DATE", "DEVICES", "BASE"]
    name, taken, ram = rows[1].split()[:3]
    assert (name, ram) == ("base", "2560K")
    assert 640 <= int(taken.removesuffix("K")) < 700
    assert rows[1].split()[-2:] == ["root,con", "-"]
    name, taken, ram = rows[2].split()[:3]
    assert (name, ram) == ("next", "2560K")
    assert 64 <= int(taken.removesuffix("K")) < 128
    assert rows[2].split()[-1] == "base"
    assert len(rows) == 3
    alone = host.vmmctl("template", "ls", str(following), str(base.parent)).stdout.splitlines()
    assert [row.split()[0] for row in alone[1:]] == [str(following), str(base), str(following)]


def test_ls_for_programs_and_of_what_cannot_be_read(host: Host, pair: tuple[Path, Path]) -> None:
    base, following = pair
    state = (base / "state").read_bytes()
    (base / "state").write_bytes(state[:-1] + bytes([state[-1] ^ 1]))
    done = host.vmmctl("template", "ls", "--json", str(base.parent), check=1)
    [one] = json.loads(done.stdout)
    assert one["path"] == str(following)
    assert one["devices"] == ["root", "con"]
    assert one["parents"][0]["path"] == str(base)
    assert done.stderr == f"vmmctl: {base}/state: the state is damaged: its checksum is wrong\n"
    rows = host.vmmctl("template", "ls", str(base.parent), check=1).stdout.splitlines()
    assert rows[1].endswith(f"{base} (missing)")
    assert host.vmmctl("template", "ls", str(base / "memory"), check=3).stderr.count("neither") == 1
    assert "No such file" in host.vmmctl("template", "ls", str(base / "no"), check=1).stderr


def test_inspect_says_what_is_in_one(host: Host, pair: tuple[Path, Path], disk: Path) -> None:
    base, following = pair
    text = host.vmmctl("template", "inspect", str(following)).stdout
    for said in ("web: 2 CPUs, 2560K", "64K here, 1.9M zero", f"{base}: 576K", str(disk), "vm v1, vcpu.0 v1"):
        assert said in text
    whole = json.loads(host.vmmctl("template", "inspect", "--json", str(following)).stdout)
    assert whole["machine"]["kernel"]["image"] == "/boot/vmlinuz"
    assert whole["chunks"] == {"size": CHUNK, "zero": 30, "layers": [1, 9]}
    assert whole["components"][1] == {"name": "vcpu.0", "version": 1, "size": 1}
    assert whole["cpu"]["msrs"] == [16, 372]


def test_a_state_without_memory_is_inspected(host: Host, tmp_path: Path, disk: Path) -> None:
    bare = make(tmp_path / "bare", b"", disk, layers=b"", sums=b"", description="[]")
    assert "none of it is here" in host.vmmctl("template", "inspect", str(bare)).stdout
    assert json.loads(host.vmmctl("template", "inspect", "--json", str(bare)).stdout)["chunks"] is None
    assert "no memory" in host.vmmctl("template", "verify", str(bare), check=1).stderr


def test_verify_reads_everything(host: Host, pair: tuple[Path, Path], disk: Path) -> None:
    base, following = pair
    text = host.vmmctl("template", "verify", str(following)).stdout
    assert text == f"{following}: whole (2560K of memory, 1 disk, 1 template below it)\n"
    with (base / "memory").open("r+b") as f:  # in each of two chunks a bit, far apart
        for at in (2 * CHUNK + 77, 9 * CHUNK):
            f.seek(at)
            byte = f.read(1)[0]
            f.seek(at)
            f.write(bytes([byte ^ 4]))
    said = host.vmmctl("template", "verify", str(following), check=1).stderr
    assert said == f"vmmctl: {base}/memory: 2 chunks of 64 KiB damaged or missing, from offset 0x20000 on\n"
    os.truncate(following / "memory", 100)
    disk.write_bytes(b"another disk")
    said = host.vmmctl("template", "verify", str(following), check=1).stderr
    assert f"{following}/memory has 100 bytes, the machine's memory has {SIZE}" in said
    assert f"{following}/memory: 1 chunk of 64 KiB damaged or missing, from offset 0x0 on" in said
    assert "disk root: " in said


def test_verify_says_what_is_missing(host: Host, pair: tuple[Path, Path], disk: Path) -> None:
    base, following = pair
    disk.rename(disk.with_name("elsewhere"))
    assert f"disk root: {disk}: No such file" in host.vmmctl("template", "verify", str(base), check=1).stderr
    (base / "memory").unlink()
    assert f"{base}/memory: No such file" in host.vmmctl("template", "verify", str(following), check=1).stderr
    base.rename(base.with_name("moved"))
    said = host.vmmctl("template", "verify", str(following), check=1).stderr
    assert f"builds on the template {base}, which is missing" in said
    assert "not a template" in host.vmmctl("template", "verify", str(disk.parent), check=3).stderr


def test_rm_keeps_what_others_are_based_on(host: Host, pair: tuple[Path, Path]) -> None:
    base, following = pair
    assert "next is based on it" in host.vmmctl("template", "rm", str(base), check=1).stderr
    assert (base / "memory").exists()
    (following / "working-set").write_bytes(b"")
    (following / "working-set.77.part").write_bytes(b"")  # of a supervisor that was killed
    host.vmmctl("template", "rm", str(following))
    host.vmmctl("template", "rm", str(base))
    assert list(base.parent.iterdir()) == []
    assert "no such template" in host.vmmctl("template", "rm", str(base), check=3).stderr


def test_rm_with_force(host: Host, pair: tuple[Path, Path]) -> None:
    base, following = pair
    host.vmmctl("template", "rm", "--force", str(base))
    assert list(base.parent.iterdir()) == [following]


def test_rm_takes_a_damaged_template_and_one_of_a_newer_format(host: Host, pair: tuple[Path, Path]) -> None:
    _, following = pair
    (following / "state").write_bytes(template.MAGIC + b"\xff" * 100)
    host.vmmctl("template", "rm", str(following))
    assert not following.exists()


def test_rm_removes_nothing_but_templates(host: Host, pair: tuple[Path, Path], tmp_path: Path) -> None:
    _, following = pair
    (following / "notes.txt").write_text("mine")
    assert "has notes.txt in it" in host.vmmctl("template", "rm", str(following), check=1).stderr
    (following / "notes.txt").unlink()
    (following / "disk-x.raw").mkdir()
    assert "has disk-x.raw in it" in host.vmmctl("template", "rm", str(following), check=1).stderr
    (following / "disk-x.raw").rmdir()
    link = tmp_path / "link"
    link.symlink_to(following)
    assert "not a directory" in host.vmmctl("template", "rm", str(link), check=1).stderr
    assert "not a template" in host.vmmctl("template", "rm", str(tmp_path), check=1).stderr
    assert (following / "state").exists()
