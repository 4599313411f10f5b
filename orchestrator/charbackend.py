"""Opens what stands behind a console: a pty, a listening unix socket, a file.

For the supervisor, which keeps every descriptor and hands the serial sidecar a copy (docs/internals.md: ``backend`` and
``console``).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import struct
import termios
import tty
from dataclasses import dataclass, field
from pathlib import Path

SUN_PATH_MAX = 107  # bytes in sockaddr_un.sun_path, without the terminating 0


class CharBackendError(Exception):
    """A backend that cannot be opened. The text names the path and says why."""


Identity = tuple[int, int, int]


def _identity(path: Path) -> Identity:
    """Tells a file from a later one of the same name, which may have got the same inode number."""
    st = path.lstat()
    return st.st_dev, st.st_ino, st.st_mtime_ns


@dataclass
class CharBackend:
    """``fd`` is the owner's to close; ``close`` also removes what was made in the file system."""

    fd: int
    path: str  # for people: /dev/pts/3, the socket, the file
    _made: list[tuple[Path, Identity]] = field(default_factory=list)  # what close() removes
    watch: int = -1  # of a pty: readable when somebody has opened it; closed by close()

    def close(self) -> None:
        """Closes ``fd`` and removes the link or socket, if it is still the one that was made here. Once is enough."""
        for fd in (self.fd, self.watch):
            if fd >= 0:
                os.close(fd)
        self.fd = self.watch = -1
        for path, identity in self._made:
            with contextlib.suppress(FileNotFoundError):
                if _identity(path) == identity:
                    path.unlink()


def open_pty(link: Path | None = None, size: tuple[int, int] | None = None) -> CharBackend:
    """A raw pty; ``fd`` is its master, ``watch`` tells when its slave was opened. ``link`` becomes a symbolic link to
    the slave, replacing an older link; ``size`` is (columns, rows), which the guest's virtio console is then told.

    The slave is not kept open: its absence is how the sidecar knows that nobody reads.
    """
    from motorcade.sidecars import _serial

    try:
        master, slave = os.openpty()
    except OSError as e:
        raise CharBackendError(f"no pty: {e.strerror}") from e
    watch = -1
    try:
        name = os.ttyname(slave)
        # cfmakeraw(3), which the kernel keeps as long as the master is open.
        tty.setraw(slave)
        if size is not None:
            fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
        watch = _serial.lib.mc_serial_watch_pty(master)
        if watch < 0:
            raise CharBackendError(f"{name} cannot be watched: {os.strerror(-watch)}")
        made = [] if link is None else [(link, _make_link(link, name))]
    except BaseException:
        for fd in (master, watch):
            if fd >= 0:
                os.close(fd)
        raise
    finally:
        os.close(slave)
    os.set_inheritable(master, False)
    return CharBackend(master, name, made, watch)


def _make_link(link: Path, target: str) -> Identity:
    """Makes the link by rename, so that there is no moment without it."""
    temporary = link.with_name(f"{link.name}.{os.getpid()}.new")
    try:
        if os.path.lexists(link) and not link.is_symlink():
            raise CharBackendError(f"{link}: exists and is not a symbolic link")
        temporary.symlink_to(target)
        temporary.replace(link)
        return _identity(link)
    except OSError as e:
        raise CharBackendError(f"{link}: {e.strerror}") from e


def open_socket(path: Path) -> CharBackend:
    """A listening unix stream socket at ``path``, mode 0600. A socket there that nobody listens on is replaced."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    with sock:
        if len(os.fsencode(path)) > SUN_PATH_MAX:
            raise CharBackendError(f"{path}: longer than the {SUN_PATH_MAX} bytes of a unix socket's path")
        # The mode at bind is that of the descriptor, less the umask: set before, there is no moment of a wider one.
        os.fchmod(sock.fileno(), 0o600)
        try:
            try:
                sock.bind(os.fspath(path))
            except OSError as e:
                if e.errno != errno.EADDRINUSE:
                    raise
                _remove_stale(path)
                sock.bind(os.fspath(path))
            sock.listen(128)
            return CharBackend(sock.detach(), str(path), [(path, _identity(path))])
        except OSError as e:
            raise CharBackendError(f"{path}: {e.strerror}") from e


def _remove_stale(path: Path) -> None:
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise CharBackendError(f"{path}: exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        # EAGAIN: somebody listens there, with a full backlog.
        if probe.connect_ex(os.fspath(path)) != errno.ECONNREFUSED:
            raise CharBackendError(f"{path}: in use by another process")
    path.unlink()


def open_file(path: Path) -> CharBackend:
    """A file opened for appending, made with mode 0600 if it is not there. A FIFO or a device is not accepted: it could
    block the sidecar's writer for ever."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK, 0o600)
    except OSError as e:
        why = "is a FIFO that nobody reads" if e.errno == errno.ENXIO else e.strerror
        raise CharBackendError(f"{path}: {why}") from e
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CharBackendError(f"{path}: not a regular file")
    return CharBackend(fd, str(path))
