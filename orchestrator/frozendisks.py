"""The disks of a template: what it says of them, and the copies that it keeps.

A disk is a pile of files, the raw base lowest, read-only overlays (sidecars/blk/overlay.py) above it. What the guest
could write to is copied into the template's directory, the rest is only named: by path, size, modification time and
a sample of its content, and nobody restores a machine on a file that has changed. The copying is done by a process of
its own (snapshots.py).
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from motorcade.orchestrator.errors import UserError

if TYPE_CHECKING:
    from motorcade.sidecars.blk.overlay import Identity

_COPIED = re.compile(r"disk-[-_.A-Za-z0-9]+\.(raw|overlay)")
_COPIED_AT = 10**18  # ns: the modification time that copies are given, so that equal disks have equal templates
_PIECE = 64 << 20  # bytes a copy_file_range at most: a copier that is killed ends after one
_BUFFER = 1 << 20
_NO_RANGE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}  # copy_file_range(2): not between these two


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of a disk, as it was when the template was made."""

    path: str  # absolute; or its name in the template's directory
    size: int
    mtime: int  # ns; 0: a block device, whose time says nothing
    sample: str  # hexadecimal, of overlay.Identity


class FrozenDisk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One disk in a template's ``disks``."""

    id: str
    readonly: bool
    size: int  # bytes that the guest sees
    files: list[File]  # the base first


class Restored(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A frozen disk as a restored machine gets it: everything of the template's is only read."""

    template: str  # its directory
    disk: FrozenDisk
    overlay: str | None = None  # where writes go, made when missing; None: to a file without a name

    def path(self, file: File) -> str:
        """Where ``file`` is."""
        return str(Path(self.template) / file.path)


class Incoming(msgspec.Struct, frozen=True):
    """What the supervisor of a restored machine has to know. Without ``template``: which one is said later, by
    migrate-incoming."""

    template: str = ""  # its directory; or the file of a state without memory, or of a checkpoint
    memory: list[str] = []  # its memory file, and those of the templates that it builds on, the nearest first
    disks: list[Restored] = []  # those that are not rebound
    generation_id: bytes = b""  # 16 bytes: a new VM generation ID
    start: int = 0  # bytes: where memory begins in the first file


@dataclass(frozen=True)
class Source:
    """An open file of a disk. ``copied``: its name in the template that it comes from, if that has it."""

    fd: int
    path: str
    copied: str = ""


def encode(disks: Sequence[FrozenDisk]) -> str:
    """For the template's state: equal disks give equal text."""
    return msgspec.json.encode(disks).decode()


def decode(text: str) -> list[FrozenDisk]:
    """From a template's state. Errors: UserError, without the template's name."""
    try:
        disks = msgspec.json.decode(text, type=list[FrozenDisk])
    except (msgspec.ValidationError, msgspec.DecodeError) as e:
        raise UserError(f"what it says of its disks is malformed: {e}") from None
    for disk in disks:
        for file in disk.files:
            if not (file.path.startswith("/") or _COPIED.fullmatch(file.path)):
                raise UserError(
                    f"disk {disk.id}: {file.path!r} is neither an absolute path nor a copy of the template's"
                )
        if not disk.files or disk.size <= 0:
            raise UserError(f"disk {disk.id} has no file")
    return disks


def check_file(fd: int, path: str, recorded: File) -> Identity:
    """Whether ``fd``, opened from ``path``, is still what ``recorded`` says: what it is. Errors: UserError; OSError."""
    from motorcade.sidecars.blk import overlay

    now = overlay.identify(fd)
    if now.size != recorded.size:
        raise UserError(f"{path} has {now.size} bytes now and had {recorded.size} when the template was made")
    if now.mtime != recorded.mtime:
        raise UserError(f"{path} was modified after the template was made (its modification time differs)")
    if now.sample.hex() != recorded.sample:
        raise UserError(f"{path} has another content than when the template was made")
    return now


@dataclass(frozen=True)
class Open:
    """A disk of a running VM, for ``freeze``. The descriptors are the supervisor's."""

    id: str
    readonly: bool
    files: tuple[Source, ...]  # what is only read, the base first; the written file of a raw disk last
    overlay: int | None  # what is written; None: the base is, unless ``readonly``
    unnamed: bool  # the overlay was made for this run
    written: str = ""  # the overlay's path, where it has one


def freeze(disk: Open, folder: Path) -> FrozenDisk:
    """Copies what has to be copied into ``folder``, and tells what there is. While its sidecar is quiet; blocks.

    Errors: UserError naming the file.
    """
    from motorcade.sidecars.blk import overlay

    try:
        size = os.lseek(disk.files[0].fd, 0, os.SEEK_END)
        files = [(source, "") for source in disk.files]
        if disk.overlay is not None:
            below = disk.files[-1]
            if disk.unnamed and below.copied and _is_empty(disk.overlay):
                # Nothing was written since the machine was restored: the disk is what that template has.
                files[-1] = (below, below.copied)
            else:
                files.append((Source(disk.overlay, ""), f"disk-{disk.id}.overlay"))
        elif not disk.readonly:
            files[-1] = (files[-1][0], f"disk-{disk.id}.raw")
        frozen: list[File] = []
        for source, copy in files:
            if copy:
                copy_file(source.fd, folder / copy)
            identity = overlay.identify(source.fd)
            path, mtime = (copy, _COPIED_AT) if copy else (source.path, identity.mtime)
            frozen.append(File(path, identity.size, mtime, identity.sample.hex()))
        return FrozenDisk(disk.id, disk.readonly, size, frozen)
    except (OSError, overlay.OverlayError) as e:
        what = e.filename if isinstance(e, OSError) and e.filename else folder
        why = e.strerror if isinstance(e, OSError) else str(e)
        raise UserError(f"disk {disk.id}: {what}: {why}") from None


def named(disk: Open) -> FrozenDisk:
    """The disk as it is, of which nothing is copied. While its sidecar is quiet. Errors: UserError, OSError."""
    from motorcade.sidecars.blk import overlay

    files = list(disk.files)
    if disk.overlay is not None:
        files.append(Source(disk.overlay, disk.written))
    frozen = []
    for source in files:
        identity = overlay.identify(source.fd)
        frozen.append(File(source.path, identity.size, identity.mtime, identity.sample.hex()))
    return FrozenDisk(disk.id, disk.readonly, os.lseek(disk.files[0].fd, 0, os.SEEK_END), frozen)


def _is_empty(overlay_fd: int) -> bool:
    from motorcade.sidecars.blk import overlay

    header = overlay.read_header(overlay_fd)
    with _again(overlay_fd) as fd:
        end = header.map_offset + header.map_size
        return all(
            offset >= end or not any(os.pread(fd, 4096, offset)) for offset in _pages(fd, header.map_offset, end)
        )


def _pages(fd: int, start: int, end: int) -> Iterator[int]:
    """Offsets of the pages from ``start`` to ``end`` that are no holes."""
    for first, last in _extents(fd, end):
        yield from range(max(first, start) // 4096 * 4096, min(last, end), 4096)


class _again:
    """``fd``'s file opened anew for reading: without O_DIRECT, with an offset of its own."""

    def __init__(self, fd: int) -> None:
        self.fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> int:
        return self.fd

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def copy_file(source_fd: int, target: Path) -> None:
    """A sparse copy of ``source_fd``'s file or block device as ``target``, made read-only, permanent on return.

    Its modification time is a fixed one: whoever writes to it shows.

    Where the file system can share the blocks of two files (btrfs, XFS), copy_file_range does: nothing is copied.
    Errors: OSError with ``filename``.
    """
    try:
        out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
        try:
            with _again(source_fd) as fd:
                size = os.lseek(fd, 0, os.SEEK_END)
                os.ftruncate(out, size)
                for first, last in _extents(fd, size):
                    _copy_range(fd, out, first, last)
            os.utime(out, ns=(_COPIED_AT, _COPIED_AT))
            os.fsync(out)
        finally:
            os.close(out)
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(target)) from None


def _extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """From and to of what is no hole; the whole of what cannot tell."""
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        yield 0, size
        return
    at = 0
    while at < size:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as e:
            if e.errno == errno.ENXIO:  # nothing but a hole follows
                return
            raise
        end = min(os.lseek(fd, at, os.SEEK_HOLE), size)
        yield at, end
        at = end


def _copy_range(source: int, target: int, at: int, end: int) -> None:
    block_device = stat.S_ISBLK(os.fstat(source).st_mode)  # which has no holes to skip: look for zeroes
    while at < end and not block_device:
        try:
            copied = os.copy_file_range(source, target, min(end - at, _PIECE), at, at)
        except OSError as e:
            if e.errno in _NO_RANGE:
                break
            raise
        if copied == 0:
            return  # it has shrunk; its identity says so
        at += copied
    zeroes = bytes(_BUFFER)
    while at < end:
        data = os.pread(source, min(end - at, _BUFFER), at)
        if not data:
            return
        view = memoryview(data)
        if data != zeroes[: len(data)]:
            done = 0
            while done < len(data):
                done += os.pwrite(target, view[done:], at + done)
        at += len(data)
