"""Where a snapshot goes: written beside its place, and renamed to it when it is whole.

The core writes to descriptors; names are made and removed here, by the supervisor. A partial target is called
``PLACE.PID.part``, and is locked (flock) as long as its supervisor or core lives: one whose lock is free is a leftover
of a process that was killed, and the next snapshot to the same place removes it.
"""

from __future__ import annotations

import abc
import contextlib
import fcntl
import logging
import os
import re
import select
import shutil
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

from motorcade.orchestrator.errors import UserError

log = logging.getLogger("motorcade.supervisor")

_PART = ".part"
_CONTENT = re.compile(r"memory|state|disk-[-_.A-Za-z0-9]+\.(raw|overlay)")  # what a partial template may hold


class TargetError(UserError):
    """There is no such place, or it could not be written: one clear line."""


class Target(abc.ABC):
    """Something that a snapshot is written to. Owns ``fds`` (by label, for the core) and what is on the disk until
    ``finish`` is through."""

    fds: dict[str, int]
    pending = -1  # a descriptor that is readable when ``finish`` is worth another call; this object's

    @abc.abstractmethod
    def finish(self, *, keep: bool) -> bool:
        """Gives it its name (``keep``) or removes it. False: not done yet, ``pending`` says when to ask again; what
        was asked may be changed from keep to not keep. Errors: TargetError, and nothing is left of it then."""

    def close(self) -> None:
        """Closes the descriptors. A second time is harmless."""
        for fd in self.fds.values():
            os.close(fd)
        self.fds = {}


class Folder(Target):
    """A template: a directory with ``memory`` and ``state`` and copies of disks."""

    def __init__(self, place: Path) -> None:
        """Makes ``PLACE.PID.part/``. Errors: TargetError."""
        self.place = place
        _check_place(place, folder=True)
        self.part = _part_name(place)
        self.fds = {}
        self.lock = -1
        try:
            self.part.mkdir(mode=0o700)
            self.lock = os.open(self.part, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for name in ("memory", "state"):
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                self.fds[name] = os.open(self.part / name, flags, 0o600)
            _clear_others(place)
        except OSError as e:
            self._remove()
            raise _error(self.part, e) from None
        except TargetError:
            self._remove()
            raise

    def finish(self, *, keep: bool) -> bool:
        """See Target."""
        if not keep:
            self._remove()
            return True
        try:
            os.fsync(self.lock)
            # Replaces an empty directory; anything that appeared there meanwhile stays, and this fails.
            self.part.rename(self.place)
            _sync_folder(self.place.parent)
        except OSError as e:
            self._remove()
            raise _error(self.place, e) from None
        self.close()
        return True

    def close(self) -> None:
        """See Target."""
        super().close()
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1

    def _remove(self) -> None:
        shutil.rmtree(self.part, ignore_errors=True)
        if os.path.lexists(self.part):
            log.error("%s cannot be removed", self.part)
        self.close()


class File(Target):
    """A single file: device states, a machine's state without its RAM, a dump."""

    def __init__(self, place: Path) -> None:
        """Makes ``PLACE.PID.part``. Errors: TargetError."""
        self.place = place
        _check_place(place, folder=False)
        self.part = _part_name(place)
        self.fds = {}
        try:
            fd = os.open(self.part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self.fds["state"] = fd
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _clear_others(place)
        except OSError as e:
            self._remove()
            raise _error(self.part, e) from None
        except TargetError:
            self._remove()
            raise

    def finish(self, *, keep: bool) -> bool:
        """See Target."""
        if not keep:
            self._remove()
            return True
        try:
            os.fsync(self.fds["state"])
            self.part.rename(self.place)
            _sync_folder(self.place.parent)
        except OSError as e:
            self._remove()
            raise _error(self.place, e) from None
        self.close()
        return True

    def _remove(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.part.unlink()
        self.close()


class Command(Target):
    """``exec:COMMAND``: a shell that reads the state on its standard input, with the rights of the VM's user."""

    def __init__(self, command: str) -> None:
        """Starts it. Errors: TargetError."""
        self.command = command
        reader, writer = os.pipe2(os.O_CLOEXEC)
        null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        try:
            self.pid = os.posix_spawn(
                "/bin/sh",
                ["sh", "-c", command],
                dict(os.environ),
                file_actions=[(os.POSIX_SPAWN_DUP2, reader, 0), (os.POSIX_SPAWN_DUP2, null, 1)],
                setsid=True,
                setsigmask=[],
                setsigdef=[signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGHUP],
            )
        except OSError as e:
            os.close(writer)
            raise TargetError(f"exec: {e.strerror}") from None
        finally:
            os.close(reader)
            os.close(null)
        self.fds = {"state": writer}
        self.pending = os.pidfd_open(self.pid)

    def finish(self, *, keep: bool) -> bool:
        """See Target. The command sees the end of its input when the core has closed its copy, too."""
        self.close()
        if not keep:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)  # it is the leader of a session of its own
        elif not select.select([self.pending], [], [], 0)[0]:
            return False
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.pending)
        self.pending = -1
        if keep and code:
            how = f"ended with status {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
            raise TargetError(f"exec: {self.command}: {how}")
        return True


class Given(Target):
    """``fd:NAME``: a descriptor that a client has given the core, whose it is. Nothing to open, name or remove."""

    def __init__(self) -> None:
        self.fds = {}

    def finish(self, *, keep: bool) -> bool:
        """See Target."""
        return True


def open_target(uri: str, what: str) -> Target:
    """What ``uri`` names, for ``what`` of boot.capnp's OpenTarget. Errors: TargetError."""
    kind, _, rest = uri.partition(":")
    if kind == "fd" and what not in ("template", "save"):
        return Given()
    if kind == "exec" and rest:
        if what == "template":
            raise TargetError("exec: takes a machine's state only; a template with its memory needs file:DIR")
        return Command(rest)
    place = place_of(uri)
    return Folder(place) if what == "template" else File(place)


def place_of(uri: str) -> Path:
    """Of ``file:PATH``. Errors: TargetError."""
    kind, _, rest = uri.partition(":")
    if kind != "file" or not rest:
        raise TargetError(f"{uri or 'nothing'}: a snapshot goes to file:PATH or exec:COMMAND")
    if "\0" in rest or not rest.startswith("/"):
        raise TargetError(f"file:{rest}: the path must be absolute")
    place = Path(os.path.normpath(rest))
    if not place.name:
        raise TargetError(f"{place}: not a place for a snapshot")
    return place


def _check_place(place: Path, *, folder: bool) -> None:
    """Errors: TargetError where there is something that must stay, or no folder to be in."""
    try:
        mode = place.lstat().st_mode
    except FileNotFoundError:
        if not place.parent.is_dir():
            raise TargetError(f"{place}: there is no folder {place.parent}") from None
        return
    except OSError as e:
        raise _error(place, e) from None
    if folder and not stat.S_ISDIR(mode):
        raise TargetError(f"{place}: exists, and is not a directory")
    if folder and any(place.iterdir()):
        raise TargetError(f"{place}: exists, and is not empty")
    if not folder and not stat.S_ISREG(mode):
        raise TargetError(f"{place}: exists, and is not a file")


def _part_name(place: Path) -> Path:
    return place.with_name(f"{place.name}.{os.getpid()}{_PART}")


def _parts(place: Path) -> Iterator[tuple[Path, int]]:
    """Partial targets of other processes for ``place``, and their pids."""
    pattern = re.compile(re.escape(place.name) + r"\.([0-9]+)" + re.escape(_PART))
    for entry in place.parent.iterdir():
        match = pattern.fullmatch(entry.name)
        if match and int(match[1]) != os.getpid():
            yield entry, int(match[1])


def _clear_others(place: Path) -> None:
    """Removes leftovers. Errors: TargetError where somebody alive writes to ``place``.

    Called with our own part made and locked: of two at once at least one sees the other.
    """
    for part, pid in list(_parts(place)):
        try:
            fd = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # it is just through
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_leftover(part)
        except BlockingIOError:
            raise TargetError(f"{place}: another VM's snapshot (process {pid}) goes there now") from None
        finally:
            os.close(fd)


def _remove_leftover(part: Path) -> None:
    """Only what a snapshot makes; a directory with anything else in it is somebody's and stays."""
    if part.is_dir():
        if not all(_CONTENT.fullmatch(entry.name) for entry in part.iterdir()):
            log.warning("%s looks like a partial template, but has other files in it: it stays", part)
            return
        shutil.rmtree(part)
    else:
        part.unlink()
    log.info("removed %s, which a killed process left", part)


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _error(path: Path, e: OSError) -> TargetError:
    return TargetError(f"{path}: {e.strerror}")
