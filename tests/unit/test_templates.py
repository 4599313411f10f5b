"""Where snapshots go: real files, directories and processes."""

from __future__ import annotations

import fcntl
import os
import select
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from motorcade.orchestrator import templates
from motorcade.orchestrator.templates import Command, File, Folder, TargetError, open_target


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    where = tmp_path / "small"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "none", where], check=True)
    yield where
    subprocess.run(["umount", where], check=True)


def test_a_template_appears_whole(tmp_path: Path) -> None:
    target = open_target(f"file:{tmp_path}/t", "template")
    assert isinstance(target, Folder)
    os.write(target.fds["memory"], b"ram")
    os.write(target.fds["state"], b"state")
    assert [p.name for p in tmp_path.iterdir()] == [f"t.{os.getpid()}.part"]
    assert target.finish(keep=True)
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    assert ((tmp_path / "t/memory").read_bytes(), (tmp_path / "t/state").read_bytes()) == (b"ram", b"state")
    assert target.fds == {}


def test_an_empty_directory_is_a_place(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    assert open_target(f"file:{tmp_path}/./x/../t/", "template").finish(keep=True)
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == ["memory", "state"]


def test_giving_up_leaves_nothing(tmp_path: Path) -> None:
    for what in ("template", "state", "devices", "dump"):
        target = open_target(f"file:{tmp_path}/t", what)
        os.write(target.fds["state"], b"half")
        assert target.finish(keep=False)
        assert list(tmp_path.iterdir()) == []


def test_a_file_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("old")
    target = open_target(f"file:{tmp_path}/t", "devices")
    os.write(target.fds["state"], b"new")
    assert (tmp_path / "t").read_text() == "old"
    assert target.finish(keep=True)
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    assert (tmp_path / "t").read_text() == "new"


@pytest.mark.parametrize(
    ("uri", "what", "message"),
    [
        ("", "template", "file:PATH or exec:COMMAND"),
        ("file:", "template", "file:PATH or exec:COMMAND"),
        ("exec:", "state", "file:PATH or exec:COMMAND"),
        ("tcp:host:1", "template", "file:PATH or exec:COMMAND"),
        ("exec:cat", "template", "needs file:DIR"),
        ("file:t", "template", "the path must be absolute"),
        ("file:./t", "state", "the path must be absolute"),
        ("file:/x\0y", "state", "the path must be absolute"),
        ("file:/", "template", "not a place for a snapshot"),
        ("file:@/no/t", "template", "there is no folder @/no"),
        ("file:@/no/t", "state", "there is no folder @/no"),
        ("file:@/full", "template", "@/full: exists, and is not empty"),
        ("file:@/file", "template", "@/file: exists, and is not a directory"),
        ("file:@/link", "template", "@/link: exists, and is not a directory"),
        ("file:@/full", "state", "@/full: exists, and is not a file"),
        ("file:@/fifo", "dump", "@/fifo: exists, and is not a file"),
        ("file:@/" + "n" * 250, "template", "File name too long"),
    ],
)
def test_places_that_are_none(tmp_path: Path, uri: str, what: str, message: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    os.mkfifo(tmp_path / "fifo")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(TargetError) as caught:
        open_target(uri.replace("@", str(tmp_path)), what)
    assert message.replace("@", str(tmp_path)) in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_place_that_is_taken_meanwhile(tmp_path: Path) -> None:
    target = open_target(f"file:{tmp_path}/t", "template")
    (tmp_path / "t").mkdir()
    (tmp_path / "t/somebody's").touch()
    with pytest.raises(TargetError, match=f"{tmp_path}/t: Directory not empty"):
        target.finish(keep=True)
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    assert [p.name for p in (tmp_path / "t").iterdir()] == ["somebody's"]


def test_no_permission(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(TargetError, match="Permission denied"):
        open_target(f"file:{tmp_path}/t", "template")


def test_no_space_for_a_directory(small_disk: Path) -> None:
    with (small_disk / "filler").open("wb", buffering=0) as f, pytest.raises(OSError, match="No space"):
        while True:
            f.write(bytes(4096))
    subprocess.run(["mount", "-o", "remount,nr_inodes=2", small_disk], check=False)
    before = sorted(small_disk.iterdir())
    with pytest.raises(TargetError, match="No space left on device"):
        open_target(f"file:{small_disk}/t", "template")
    assert sorted(small_disk.iterdir()) == before


def test_two_snapshots_to_one_place(tmp_path: Path) -> None:
    """Of two VMs: the lock is what says that the other one lives, not its process id."""
    other = tmp_path / "t.1.part"
    other.mkdir()
    lock = os.open(other, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    for what in ("template", "state"):
        with pytest.raises(TargetError, match=r"another VM's snapshot \(process 1\) goes there now"):
            open_target(f"file:{tmp_path}/t", what)
    open_target(f"file:{tmp_path}/u", "template").finish(keep=False)
    assert [p.name for p in tmp_path.iterdir()] == ["t.1.part"]
    os.close(lock)
    open_target(f"file:{tmp_path}/t", "template").finish(keep=True)
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_leftovers_of_the_dead_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in ("memory", "state", "disk-root.raw", "disk-a.b-c_d.overlay"):
        (tmp_path / "t.77.part").mkdir(exist_ok=True)
        (tmp_path / "t.77.part" / name).touch()
    (tmp_path / "t.78.part").write_text("a state")
    (tmp_path / "t.79.part").mkdir()
    (tmp_path / "t.79.part/thesis.tex").touch()
    for name in ("tt.80.part", "t.81.part.gz", "u.82.part", "t.x.part"):
        (tmp_path / name).touch()
    open_target(f"file:{tmp_path}/t", "template").finish(keep=True)
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["t", "t.79.part", "t.81.part.gz", "t.x.part", "tt.80.part", "u.82.part"]


def test_a_command_takes_the_state(tmp_path: Path) -> None:
    target = open_target(f"exec:cat > {tmp_path}/out", "state")
    assert isinstance(target, Command)
    os.write(target.fds["state"], b"state")
    while not target.finish(keep=True):  # it sees the end of its input when the descriptor is closed
        select.select([target.pending], [], [])
    assert (tmp_path / "out").read_bytes() == b"state"


def test_a_command_that_fails() -> None:
    target = open_target("exec:cat > /dev/null; exit 3", "state")
    with pytest.raises(TargetError, match=r"exec: cat > /dev/null; exit 3: ended with status 3"):
        while not target.finish(keep=True):
            select.select([target.pending], [], [])


def test_a_command_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    target = open_target(f"exec:sleep 1000 3> {fifo} & wait", "devices")
    reader = os.open(fifo, os.O_RDONLY)  # until the sleep has it open
    assert not target.finish(keep=True)
    assert target.finish(keep=False)
    assert os.read(reader, 1) == b""  # nobody has it any more
    os.close(reader)


def test_descriptors_are_closed(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    for keep in (True, False):
        for n, what in enumerate(("template", "state")):
            open_target(f"file:{tmp_path}/{keep}{n}", what).finish(keep=keep)
    with pytest.raises(TargetError):
        open_target(f"file:{tmp_path}/no/t", "template")
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208


def test_parts_are_told_apart_by_their_whole_name(tmp_path: Path) -> None:
    """A place whose name is a pattern's."""
    (tmp_path / "txx.5.part").mkdir()
    File(tmp_path / "t*").finish(keep=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t*", "txx.5.part"]
    assert list(templates._parts(tmp_path / "t*")) == []
