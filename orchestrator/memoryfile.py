"""RAM as a named file, on tmpfs or hugetlbfs: it outlives its VM, so that a state without RAM is enough to go on
(QEMU's x-ignore-shared).

The file belongs to one VM that writes to it, or to any number that are filled from it: a lock (flock) tells, and lasts
until the last process that has the file is gone. Nobody may change its size meanwhile: the VM's processes would die of
SIGBUS, as QEMU would.
"""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

from motorcade.orchestrator.errors import UserError


def problem(path: Path, size: int, *, needed: bool) -> str:
    """What is wrong with a RAM of ``size`` bytes in ``path``, or empty. ``needed``: it must be there already."""
    try:
        info = path.stat()
    except FileNotFoundError:
        if needed:
            return f"no such file: {path}"
        return "" if path.parent.is_dir() else f"no such folder: {path.parent}"
    except OSError as e:
        return f"{path}: {e.strerror}"
    return _problem(info, path, size, needed=needed)


def _problem(info: os.stat_result, path: Path, size: int, *, needed: bool) -> str:
    if stat.S_ISDIR(info.st_mode):
        return f"not a file but a folder: {path}; name one in it (it stays when the VM is gone)"
    if not stat.S_ISREG(info.st_mode):
        return f"not a file: {path}"
    if info.st_size != size and (needed or info.st_size):
        return f"{path} has {info.st_size} bytes, the machine's memory has {size}"
    return ""


def open_fresh(path: Path, size: int) -> int:
    """For a machine that starts: made when missing, zero in any case. The caller's. Errors: UserError."""
    fd = _open(path, size, needed=False)
    try:
        os.ftruncate(fd, 0)  # what the last machine left there is not what a machine's RAM is at its start
        os.ftruncate(fd, size)
    except OSError as e:
        os.close(fd)
        raise UserError(f"memory_file: {path}: {e.strerror}") from None
    return fd


def open_in_place(path: Path, size: int) -> int:
    """For a machine that goes on with what is in it. The caller's. Errors: UserError."""
    return _open(path, size, needed=True)


def lock_template(fd: int, path: str) -> None:
    """Has the file ``fd``, from ``path``, stay as it is while machines are filled from it. Errors: UserError."""
    _lock(fd, path, exclusive=False)


def _open(path: Path, size: int, *, needed: bool) -> int:
    flags = os.O_CLOEXEC | os.O_RDWR | (0 if needed else os.O_CREAT)
    try:
        fd = os.open(path, flags, 0o600)
    except OSError as e:
        raise UserError(f"memory_file: {path}: {e.strerror}") from None
    try:
        _lock(fd, path, exclusive=True)
        if wrong := _problem(os.fstat(fd), path, size, needed=needed):
            raise UserError(f"memory_file: {wrong}")
    except BaseException:
        os.close(fd)
        raise
    return fd


def _lock(fd: int, path: str | Path, *, exclusive: bool) -> None:
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        by = "another VM" if exclusive else "the VM that writes to it; end that first"
        raise UserError(f"memory_file: {path} is in use by {by}") from None
