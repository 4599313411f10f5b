"""Opening disk images for a VM, with locks that other VMs respect.

The lock is flock(2) on the image itself, so it holds whatever name the image is opened by: exclusive for a disk
that is written, shared for one that is only read (readonly, or the base under an overlay). It belongs to the open
file that the sidecar gets, and so lasts until the last process that could write is gone. A block device that is
written is opened with O_EXCL too, which the kernel refuses for one that is mounted or held under another node.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motorcade.orchestrator import rundir
from motorcade.orchestrator.errors import UserError
from motorcade.orchestrator.machine import Disk

_DYING = 2.0  # seconds for the processes of a VM that was just killed to be gone


class DiskInUse(UserError):
    """Another VM, or another program, has the image."""


@dataclass(frozen=True)
class OpenDisk:
    """Descriptors, owned by whoever called ``open_disk``, and how the image is known to other VMs."""

    disk: int
    overlay: int | None
    direct: bool  # as it came out: False where the file system has no O_DIRECT
    locks: tuple[dict[str, Any], ...]  # for state.json, so that others can name the holder


def open_disk(disk: Disk) -> OpenDisk:
    """Opens and locks what ``disk`` names; makes its overlay when missing. Errors: DiskInUse, UserError."""
    fds: list[int] = []
    try:
        writes = not (disk.readonly or disk.overlay)
        base, direct = _open(disk, disk.path, writes)
        fds.append(base)
        _lock(base, disk, disk.path, exclusive=writes)
        locks = [_identity(base, disk.path)]
        overlay = None
        if disk.overlay:
            overlay = _open_overlay(disk, base, fds)
            locks.append(_identity(overlay, str(disk.overlay)))
        return OpenDisk(base, overlay, direct, tuple(locks))
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def _open(disk: Disk, path: str, writes: bool) -> tuple[int, bool]:
    flags = os.O_CLOEXEC | (os.O_RDWR if writes else os.O_RDONLY)
    try:
        if stat.S_ISBLK(Path(path).stat().st_mode) and writes:
            flags |= os.O_EXCL
        if disk.direct:
            return os.open(path, flags | os.O_DIRECT), True
        return os.open(path, flags), False
    except OSError as e:
        if isinstance(e, BlockingIOError) or e.errno == errno.EBUSY:
            raise DiskInUse(f"disk {disk.id}: {path} is mounted, or another program has it") from None
        if disk.direct and e.errno == errno.EINVAL:
            raise UserError(f"disk {disk.id}: the file system of {path} cannot do direct I/O; drop direct") from None
        raise UserError(f"disk {disk.id}: {path}: {e.strerror}") from None


def _open_overlay(disk: Disk, base: int, fds: list[int]) -> int:
    from motorcade.sidecars.blk import overlay

    path = str(disk.overlay)
    try:
        if not Path(path).exists():
            overlay.create(path, base)
        fd, _ = _open(disk, path, True)
        fds.append(fd)
        _lock(fd, disk, path, exclusive=True)
        overlay.open_pair(fd, base)  # the sidecar looks, too; here it is said before anything has started
    except overlay.OverlayError as e:
        raise UserError(f"disk {disk.id}: overlay {path} over {disk.path}: {e}") from None
    except OSError as e:
        raise UserError(f"disk {disk.id}: overlay {path}: {e.strerror}") from None
    return fd


def _lock(fd: int, disk: Disk, path: str, *, exclusive: bool) -> None:
    """Takes the lock at once; waits only for processes of a VM that is dead already."""
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
        by = f"VM {holder.name}" if holder else "another program"
        how = "" if exclusive else ", which writes to it"
        raise DiskInUse(f"disk {disk.id}: {path} is in use by {by}{how}")


def lock_image(disk: Disk, path: str, *, exclusive: bool) -> dict[str, Any]:
    """Locks an image for this process's whole life without using it. Returns its identity. Errors: as open_disk."""
    fd, _ = _open(Disk(id=disk.id, path=path), path, False)
    _lock(fd, disk, path, exclusive=exclusive)
    return _identity(fd, path)


def _identity(fd: int, path: str) -> dict[str, Any]:
    info = os.fstat(fd)
    return {"path": path, "dev": info.st_dev, "ino": info.st_ino}


def _holder(fd: int) -> rundir.Vm | None:
    """The VM that says in its state.json that it has this image."""
    info = os.fstat(fd)
    for vm in rundir.vms():
        for lock in vm.state.get("locks", []):
            if (lock.get("dev"), lock.get("ino")) == (info.st_dev, info.st_ino):
                return vm
    return None
