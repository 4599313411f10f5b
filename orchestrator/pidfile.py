"""A file that says which process a VM is, for tools that look for one: its core's pid, as long as the VM lives.

Its lock (flock) tells a file of a VM that lives from what a killed one left behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from motorcade.orchestrator.errors import UserError


class PidFile:
    """Owned until ``close``, which removes it."""

    def __init__(self, path: str) -> None:
        """Takes the file, and empties it. Errors: UserError, where another VM has it or it cannot be made."""
        self._path = Path(path)
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        except OSError as e:
            raise UserError(f"pidfile: {path}: {e.strerror}") from None
        try:
            os.fchmod(self._fd, 0o644)  # pids are no secret, and whoever looks for one may be another user
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._fd, 0)
        except OSError as e:
            os.close(self._fd)
            why = "another VM has it" if isinstance(e, BlockingIOError) else e.strerror
            raise UserError(f"pidfile: {path}: {why}") from None

    def write(self, pid: int) -> None:
        """Says who it is. Errors: UserError."""
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{pid}\n".encode(), 0)
        except OSError as e:
            raise UserError(f"pidfile: {self._path}: {e.strerror}") from None

    def close(self) -> None:
        """Removes it, unless somebody has put another file there."""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self._fd), self._path.lstat()):
                self._path.unlink()
        os.close(self._fd)
