"""Disks of a template: copies, and what is said of the rest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from motorcade.orchestrator import disks, frozendisks, pagers
from motorcade.orchestrator.errors import UserError
from motorcade.orchestrator.frozendisks import File, FrozenDisk, Open, Restored, Source, copy_file, freeze
from motorcade.orchestrator.machine import Disk
from motorcade.sidecars.blk import overlay
from motorcade.sidecars.pager import workingset

BLOCK = 4096


@pytest.fixture(autouse=True)
def overlay_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "overlays"
    folder.mkdir()
    monkeypatch.setenv("MOTORCADE_OVERLAY_DIR", str(folder))
    return folder


def image(path: Path, size: int = 1 << 20) -> Path:
    """Data, a hole, data at the very end."""
    with path.open("wb") as f:
        f.write(os.urandom(5 * BLOCK))
        f.seek(size - 512)
        f.write(os.urandom(512))
    return path


def opened(disk: Disk, restored: Restored | None = None) -> Open:
    found = disks.open_disk(disk, restored)
    return Open(disk.id, disk.readonly, found.files, found.overlay, found.unnamed)


def close(disk: Open) -> None:
    for fd in [source.fd for source in disk.files] + ([disk.overlay] if disk.overlay is not None else []):
        os.close(fd)


@pytest.mark.parametrize("flags", [0, os.O_DIRECT])
def test_a_copy_is_equal_sparse_and_read_only(tmp_path: Path, flags: int) -> None:
    source = image(tmp_path / "disk.img", 8 << 20)
    fd = os.open(source, os.O_RDWR | flags)
    offset = os.lseek(fd, 0, os.SEEK_CUR)
    copy_file(fd, tmp_path / "copy")
    assert os.lseek(fd, 0, os.SEEK_CUR) == offset
    os.close(fd)
    copy = tmp_path / "copy"
    assert copy.read_bytes() == source.read_bytes()
    assert copy.stat().st_blocks <= source.stat().st_blocks
    assert copy.stat().st_mode & 0o777 == 0o400
    assert copy.stat().st_mtime_ns == 10**18


def test_a_copy_to_another_file_system(tmp_path: Path) -> None:
    """Where copy_file_range may not do."""
    target = Path("/dev/shm") / f"motorcade-test-{os.getpid()}"
    fd = os.open(image(tmp_path / "disk.img"), os.O_RDONLY)
    try:
        copy_file(fd, target)
        assert target.read_bytes() == (tmp_path / "disk.img").read_bytes()
    finally:
        os.close(fd)
        target.unlink()


def test_a_copy_that_cannot_be_made_names_its_file(tmp_path: Path) -> None:
    image(tmp_path / "disk.img")
    disk = opened(Disk(id="d", path=str(tmp_path / "disk.img")))
    with pytest.raises(UserError, match=f"disk d: {tmp_path}/no/disk-d.raw: No such file or directory"):
        freeze(disk, tmp_path / "no")
    close(disk)


def test_what_can_be_written_is_copied_and_the_rest_is_named(tmp_path: Path) -> None:
    base = image(tmp_path / "disk.img")
    for fields, names in (
        ({"readonly": True}, []),
        ({"overlay": str(tmp_path / "o")}, ["disk-d.overlay"]),
        ({}, ["disk-d.raw"]),
    ):
        folder = tmp_path / f"t{len(names)}{bool(fields)}"
        folder.mkdir()
        disk = opened(Disk(id="d", path=str(base), **fields))  # type: ignore[arg-type]
        frozen = freeze(disk, folder)
        close(disk)
        assert sorted(p.name for p in folder.iterdir()) == names
        assert (frozen.id, frozen.size) == ("d", 1 << 20)
        wanted = names if names == ["disk-d.raw"] else [str(base), *names]
        assert [f.path for f in frozen.files] == wanted
        assert frozendisks.decode(frozendisks.encode([frozen])) == [frozen]


def test_a_restored_disk_writes_to_a_file_without_a_name(tmp_path: Path, overlay_folder: Path) -> None:
    template = tmp_path / "t"
    template.mkdir()
    image(tmp_path / "disk.img")
    definition = Disk(id="d", path=str(tmp_path / "disk.img"))
    disk = opened(definition)
    frozen = freeze(disk, template)
    close(disk)
    (tmp_path / "disk.img").unlink()
    again = opened(definition, Restored(str(template), frozen))
    assert again.unnamed
    assert list(overlay_folder.iterdir()) == []
    assert again.overlay is not None
    assert overlay.check(again.overlay, again.files[0].fd) == overlay.Usage(0, 0)
    # Untouched, it is frozen as it was; written to, as a pile.
    for n, name in enumerate(("disk-d.raw", "disk-d.overlay")):
        folder = tmp_path / f"t{n}"
        folder.mkdir()
        second = freeze(again, folder)
        assert [p.name for p in folder.iterdir()] == [name]
        assert (second == frozen) == (n == 0)
        header = overlay.read_header(again.overlay)
        os.pwrite(again.overlay, b"\x01", header.map_offset)
    assert [f.path for f in second.files] == [f"{template}/disk-d.raw", "disk-d.overlay"]
    close(again)


def test_layers_that_do_not_belong_together(tmp_path: Path) -> None:
    base, other = image(tmp_path / "a"), image(tmp_path / "b", 2 << 20)
    for name, below in (("la", base), ("lb", other)):
        fd = os.open(below, os.O_RDONLY)
        overlay.create(tmp_path / name, fd)
        os.close(fd)
    good = Disk(id="d", path=str(base), layers=[str(tmp_path / "la")], overlay=str(tmp_path / "top"))
    found = disks.open_disk(good)
    assert overlay.read_header(found.overlay or -1).size == 1 << 20
    for fd in (*(f.fd for f in found.files), found.overlay):
        os.close(fd or -1)
    bad = Disk(id="d", path=str(base), layers=[str(tmp_path / "lb")], overlay=str(tmp_path / "top2"))
    with pytest.raises(UserError, match=f"disk d: {tmp_path}/lb over {base}: its base has"):
        disks.open_disk(bad)
    with pytest.raises(UserError, match=f"disk d: {base} over {other}: it is not an overlay"):
        disks.open_disk(Disk(id="d", path=str(other), layers=[str(base)], overlay=str(tmp_path / "top3")))
    assert not (tmp_path / "top2").exists()


@pytest.mark.parametrize("path", ["../x", "x", "disk-/a.raw", "", "memory", "disk-a.raw/../../x"])
def test_names_that_lead_out_of_the_template(path: str) -> None:
    text = frozendisks.encode([FrozenDisk("d", False, 512, [File(path, 512, 0, "00")])])
    with pytest.raises(UserError, match="neither an absolute path nor a copy"):
        frozendisks.decode(text)


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '[{"id": "d"}]', '[{"id":"d","readonly":false,"size":1,"files":[]}]']
)
def test_disks_that_are_none(text: str) -> None:
    with pytest.raises(UserError):
        frozendisks.decode(text)


def test_the_first_working_set_is_kept(tmp_path: Path) -> None:
    for chunks in (b"\x01\0\0\0", b"\x02\0\0\0"):
        pagers.keep_working_set(tmp_path, chunks)
    assert (tmp_path / "working-set").read_bytes() == workingset.encode(b"\x01\0\0\0")
    pagers.keep_working_set(tmp_path / "gone", b"\x01\0\0\0")  # logged
    pagers.keep_working_set(tmp_path, b"odd")
    assert [p.name for p in tmp_path.glob("working*")] == ["working-set"]


def test_a_source_without_a_file_behind_it(tmp_path: Path) -> None:
    """An empty file is a disk of nothing; it is copied as that."""
    (tmp_path / "empty").touch()
    fd = os.open(tmp_path / "empty", os.O_RDWR)
    frozen = freeze(Open("d", False, (Source(fd, "empty"),), None, False), tmp_path)
    os.close(fd)
    assert frozen.size == 0
