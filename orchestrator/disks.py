"""Opening disk images for a VM, with locks that other VMs respect.

The lock is flock(2) on the image itself, so it holds whatever name the image is opened by: exclusive for a disk
that is written, shared for one that is only read (readonly, or the base under an overlay). It belongs to the open
file that the sidecar gets, and so lasts until the last process that could write is gone. A block device that is
written is opened with O_EXCL too, which the kernel refuses for one that is mounted or held under another node.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from motorcade.orchestrator import rundir
from motorcade.orchestrator.errors import UserError
from motorcade.orchestrator.frozendisks import Restored, Source, check_file
from motorcade.orchestrator.machine import Disk

if TYPE_CHECKING:
    from motorcade.sidecars.blk.overlay import Identity

_DYING = 2.0  # seconds for the processes of a VM that was just killed to be gone
_LOOK = 0.005  # seconds between two looks for what nobody announces


class DiskInUse(UserError):
    """Another VM, or another program, has the image."""


@dataclass(frozen=True)
class OpenDisk:
    """Descriptors, owned by whoever called ``open_disk``, and how the image is known to other VMs."""

    files: tuple[Source, ...]  # the base first, then the read-only overlays over it
    overlay: int | None
    direct: bool  # as it came out: False where the file system has no O_DIRECT
    locks: tuple[dict[str, Any], ...]  # for state.json, so that others can name the holder
    written: str  # where writes go, or the base of a disk that is only read
    unnamed: bool = False  # the overlay was made for this run alone

    @property
    def disk(self) -> int:
        """The base."""
        return self.files[0].fd


def open_disk(disk: Disk, restored: Restored | None = None) -> OpenDisk:
    """Opens and locks what ``disk`` names; makes its overlay when missing. ``restored``: a frozen disk, to be used in
    place of the image that ``disk`` names. Errors: DiskInUse, UserError."""
    fds: list[int] = []
    try:
        return _open_restored(disk, restored, fds) if restored else _open_named(disk, fds)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def _open_named(disk: Disk, fds: list[int]) -> OpenDisk:
    writes = not (disk.readonly or disk.overlay)
    files: list[Source] = []
    locks = []
    for path in (disk.path, *disk.layers):
        files.append(Source(_open(disk, path, writes), path))
        fds.append(files[-1].fd)
        _lock(files[-1].fd, disk, path, exclusive=writes)
        locks.append(_identity(files[-1].fd, path))
    _check_layers(disk, files)
    overlay = None
    if disk.overlay:
        overlay = _open_overlay(disk, str(disk.overlay), files, fds)
        locks.append(_identity(overlay, str(disk.overlay)))
    return OpenDisk(tuple(files), overlay, disk.direct, tuple(locks), str(disk.overlay or disk.path))


def _open_restored(disk: Disk, restored: Restored, fds: list[int]) -> OpenDisk:
    # A file that several clones read is better in the page cache; and a file without a name may be anywhere.
    disk = msgspec.structs.replace(disk, direct=disk.direct and restored.overlay is not None)
    files: list[Source] = []
    locks = []
    for recorded in restored.disk.files:
        path = restored.path(recorded)
        copied = "" if recorded.path.startswith("/") else recorded.path
        files.append(Source(_open(disk, path, False), path, copied))
        fds.append(files[-1].fd)
        _lock(files[-1].fd, disk, path, exclusive=False)
        locks.append(_identity(files[-1].fd, path))
        try:
            identity = check_file(files[-1].fd, path, recorded)
        except UserError as e:
            raise UserError(f"disk {disk.id}: {e}") from None
    _check_layers(disk, files)
    if disk.readonly:
        return OpenDisk(tuple(files), None, disk.direct, tuple(locks), files[0].path)
    if restored.overlay is None:
        fds.append(_unnamed_overlay(disk, files, identity))
        return OpenDisk(tuple(files), fds[-1], disk.direct, tuple(locks), "", unnamed=True)
    overlay = _open_overlay(disk, restored.overlay, files, fds)
    locks.append(_identity(overlay, restored.overlay))
    return OpenDisk(tuple(files), overlay, disk.direct, tuple(locks), restored.overlay)


def _open(disk: Disk, path: str, writes: bool) -> int:
    flags = os.O_CLOEXEC | (os.O_RDWR if writes else os.O_RDONLY)
    try:
        if stat.S_ISBLK(Path(path).stat().st_mode) and writes:
            flags |= os.O_EXCL
        return os.open(path, flags | os.O_DIRECT if disk.direct else flags)
    except OSError as e:
        if isinstance(e, BlockingIOError) or e.errno == errno.EBUSY:
            raise DiskInUse(f"disk {disk.id}: {path} is mounted, or another program has it") from None
        if disk.direct and e.errno == errno.EINVAL:
            raise UserError(f"disk {disk.id}: the file system of {path} cannot do direct I/O; drop direct") from None
        raise UserError(f"disk {disk.id}: {path}: {e.strerror}") from None


def _check_layers(disk: Disk, files: Sequence[Source]) -> None:
    """Each read-only overlay must belong to the file under it."""
    from motorcade.sidecars.blk import overlay

    for below, layer in itertools.pairwise(files):
        try:
            overlay.open_pair(layer.fd, below.fd)
        except overlay.OverlayError as e:
            raise UserError(f"disk {disk.id}: {layer.path} over {below.path}: {e}") from None
        except OSError as e:
            raise UserError(f"disk {disk.id}: {layer.path}: {e.strerror}") from None


def _open_overlay(disk: Disk, path: str, files: Sequence[Source], fds: list[int]) -> int:
    from motorcade.sidecars.blk import overlay

    below = files[-1]
    try:
        if not Path(path).exists():
            overlay.create(path, below.fd, layer=len(files) > 1)
        fd = _open(disk, path, True)
        fds.append(fd)
        _lock(fd, disk, path, exclusive=True)
        overlay.open_pair(fd, below.fd)  # the sidecar looks, too; here it is said before anything has started
    except overlay.OverlayError as e:
        raise UserError(f"disk {disk.id}: overlay {path} over {below.path}: {e}") from None
    except OSError as e:
        raise UserError(f"disk {disk.id}: overlay {path}: {e.strerror}") from None
    return fd


def _unnamed_overlay(disk: Disk, files: Sequence[Source], identity: Identity) -> int:
    """An empty overlay that no directory names, over the last file, which is known as that. The caller owns it."""
    from motorcade.sidecars.blk import overlay

    folder = overlay_folder()
    try:
        fd = _unnamed_file(folder)
        try:
            overlay.init(fd, files[-1].fd, identity, layer=len(files) > 1)
        except BaseException:
            os.close(fd)
            raise
    except OSError as e:
        raise UserError(f"disk {disk.id}: an overlay in {folder}: {e.strerror} (MOTORCADE_OVERLAY_DIR)") from None
    return fd


def overlay_folder() -> Path:
    """Where overlays without a name are: $MOTORCADE_OVERLAY_DIR, or /var/tmp."""
    return Path(os.environ.get("MOTORCADE_OVERLAY_DIR") or "/var/tmp")  # nothing there has a name


def _unnamed_file(folder: Path) -> int:
    try:
        return os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    except OSError as e:
        if e.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise
    # A file system without O_TMPFILE (overlayfs of old kernels, virtiofs): it has a name for a moment.
    import tempfile

    fd, name = tempfile.mkstemp(prefix="motorcade-", suffix=".overlay", dir=folder)
    Path(name).unlink()
    return fd


def _lock(fd: int, disk: Disk, path: str, *, exclusive: bool) -> None:
    """Takes the lock at once; waits only for what a VM that is dead already has left: processes, or a file that the
    kernel has not let go of yet (an io_uring's, which it takes apart some time after its process has ended)."""
    end = time.monotonic() + _DYING
    while True:
        try:
            fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            holder = _holder(fd)
        if holder is not None and not holder.alive and time.monotonic() < end:
            rundir.end_processes(holder.state)
            continue
        if holder is None and _is_left_over(fd) and time.monotonic() < end:
            time.sleep(_LOOK)
            continue
        by = f"VM {holder.name}" if holder else "another program"
        how = "" if exclusive else ", which writes to it"
        raise DiskInUse(f"disk {disk.id}: {path} is in use by {by}{how}")


def lock_image(disk: Disk, path: str, *, exclusive: bool) -> dict[str, Any]:
    """Locks an image for this process's whole life without using it. Returns its identity. Errors: as open_disk."""
    fd = _open(Disk(id=disk.id, path=path), path, False)
    _lock(fd, disk, path, exclusive=exclusive)
    return _identity(fd, path)


def _identity(fd: int, path: str) -> dict[str, Any]:
    info = os.fstat(fd)
    return {"path": path, "dev": info.st_dev, "ino": info.st_ino}


def _is_left_over(fd: int) -> bool:
    """Whether the lock is that of a process that has ended (proc_locks(5): who took it, and of which file)."""
    inode = f":{os.fstat(fd).st_ino}"
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if len(words) > 5 and words[1] == "FLOCK" and words[5].endswith(inode) and int(words[4]) > 0:
            return not Path(f"/proc/{words[4]}").exists()
    return True  # it has been let go of this very moment


def _holder(fd: int) -> rundir.Vm | None:
    """The VM that says in its state.json that it has this image."""
    info = os.fstat(fd)
    for vm in rundir.vms():
        for lock in vm.state.get("locks", []):
            if (lock.get("dev"), lock.get("ino")) == (info.st_dev, info.st_ino):
                return vm
    return None
