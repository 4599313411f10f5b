"""Run directories: where the processes of a VM meet, and how their leftovers are told from the living.

The layout is in docs/internals.md. A VM lives exactly as long as its ``lock`` is held: the kernel lets go of it
when the supervisor dies, however it dies. Whoever gets the lock of a directory with something in it has found
the leftovers of a VM that was killed.

How a VM ended is kept after it: ``.ended/NAME/`` beside the run directories has its last ``state.json`` and its
logs, until a VM of that name ends again; the newest KEEP_ENDED are kept.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from motorcade.orchestrator.errors import UserError
from motorcade.orchestrator.pidfile import PidFile

_PF_EXITING = 0x4
KEEP_ENDED = 20
MAX_SOCKET_PATH = 107  # sockaddr_un.sun_path, less the NUL
_ENDED = ".ended"  # no VM can have this name: names begin with a letter or digit


class RunDirError(UserError):
    """The run directory cannot be used; the message says what to do about it."""


class Running(RunDirError):
    """A VM of that name is running."""


def root() -> Path:
    """The directory of run directories; made when missing.

    $MOTORCADE_RUN_DIR, or /run/motorcade (root), or $XDG_RUNTIME_DIR/motorcade, or /tmp/motorcade-UID.
    Errors: RunDirError where it is not a directory of ours that only we can enter.
    """
    if configured := os.environ.get("MOTORCADE_RUN_DIR"):
        path = Path(configured).absolute()
    elif os.geteuid() == 0:
        path = Path("/run/motorcade")
    elif runtime := os.environ.get("XDG_RUNTIME_DIR"):
        path = Path(runtime) / "motorcade"
    else:
        path = Path(f"/tmp/motorcade-{os.geteuid()}")
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = path.lstat() if configured is None else path.stat()
    except OSError as e:
        raise RunDirError(f"cannot make the run directory {path}: {e.strerror} (set MOTORCADE_RUN_DIR)") from None
    # Whoever can write here can replace the sockets that carry QMP and the consoles.
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
        raise RunDirError(f"{path} is not a directory of ours (set MOTORCADE_RUN_DIR)")
    if info.st_mode & 0o077:
        path.chmod(0o700)
    return path


@dataclass
class RunDir:
    """The run directory of one VM, locked: this process is its supervisor until ``release``."""

    path: Path
    lock_fd: int = field(repr=False)
    log_file: str = ""  # instead of a log for each process, an absolute path
    pidfile: PidFile | None = field(default=None, repr=False)

    @classmethod
    def acquire(cls, name: str, sockets: tuple[str, ...] = ()) -> RunDir:
        """Makes and locks the directory; what a killed VM left there is removed, and its processes ended.

        ``sockets``: names of sockets to come, whose paths must fit. Errors: Running; RunDirError.
        """
        path = root() / name
        longest = max((len(os.fsencode(path / s)) for s in ("core.sock", "qmp.sock", *sockets)), default=0)
        if longest > MAX_SOCKET_PATH:
            raise RunDirError(
                f"{path} is too long for the sockets in it by {longest - MAX_SOCKET_PATH} bytes; "
                "set MOTORCADE_RUN_DIR to a shorter path"
            )
        while True:
            with contextlib.suppress(FileExistsError):  # mkdir's exist_ok looks once more, and may find it just gone
                path.mkdir(mode=0o700)
            lock = path / "lock"
            try:
                fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except FileNotFoundError:
                continue  # a VM that ends removed the directory under us
            except OSError as e:
                raise RunDirError(f"{lock}: {e.strerror}") from None
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held = _is_held(fd)
                os.close(fd)
                if not held:  # somebody only looked, for a moment
                    continue
                pid = read_state(path).get("pid")
                by = f" (pid {pid})" if pid else ""
                raise Running(f"{name} is running{by}; vmmctl down {name} ends it") from None
            try:
                same = os.path.samestat(os.fstat(fd), lock.stat())
            except FileNotFoundError:
                same = False
            if same:
                break
            os.close(fd)  # locked, but it is the lock of a directory that is gone
        run = cls(path, fd)
        run._clear_leftovers()
        (path / "log").mkdir(mode=0o700)
        return run

    def _clear_leftovers(self) -> None:
        """Ends what a killed VM left running, and empties the directory. Its logs go to .ended."""
        state = read_state(self.path)
        end_processes(state)
        if state:
            state["status"] = "killed"
            how = {"status": 1, "reason": "killed", "detail": "the supervisor was killed", "time": time.time()}
            state["ended"] = how
            self.write_state(state)
            self._keep_record()
        for entry in self.path.iterdir():
            if entry.name == "lock":
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def write_state(self, state: dict[str, Any]) -> None:
        """Replaces state.json: a reader sees the old one or the new one, whole."""
        temporary = self.path / "state.json.new"
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(state), indent=1) + b"\n")
        temporary.rename(self.path / "state.json")

    def open_log(self, role: str) -> int:
        """The log of one process, for appending; the caller owns it."""
        path = self.path / "log" / f"{role}.log"
        if self.log_file:
            path = self.path / "log" / "vm.log"  # where vmmctl logs looks; each line says whose it is
            with contextlib.suppress(FileExistsError):
                path.symlink_to(self.log_file)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def _keep_record(self) -> None:
        ended = self.path.parent / _ENDED
        ended.mkdir(mode=0o700, exist_ok=True)
        record = ended / self.path.name
        shutil.rmtree(record, ignore_errors=True)
        record.mkdir(mode=0o700)
        for name in ("state.json", "log"):
            with contextlib.suppress(FileNotFoundError):
                (self.path / name).rename(record / name)
        old = sorted(ended.iterdir(), key=lambda p: p.stat().st_mtime, reverse=True)[KEEP_ENDED:]
        for path in old:
            shutil.rmtree(path, ignore_errors=True)  # another VM's end may be removing it too

    def release(self) -> None:
        """Keeps the record if there is a state, removes the directory and lets go of the lock."""
        if self.pidfile is not None:
            self.pidfile.close()
        if (self.path / "state.json").exists():
            self._keep_record()
        # The lock's file goes last, and the lock itself after it: until then nobody else starts in here.
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != "lock":
                entry.unlink()
        (self.path / "lock").unlink()
        with contextlib.suppress(OSError):  # another `up` may have made its own lock in it already
            self.path.rmdir()
        os.close(self.lock_fd)


@dataclass(frozen=True)
class Vm:
    """A VM as its run directory or its record shows it to somebody else."""

    name: str
    path: Path
    alive: bool
    state: dict[str, Any]

    @property
    def status(self) -> str:
        """starting, running, stopping; or, no longer alive: ended, failed, killed."""
        status = str(self.state.get("status", "starting"))
        return status if self.alive or status in {"ended", "failed"} else "killed"


def find(name: str) -> Vm | None:
    """The VM of that name: the living one, or leftovers, or the record of the last one; None if there is none."""
    if not name or name.startswith(".") or "/" in name:
        return None
    base = root()
    if (base / name / "lock").exists():
        return Vm(name, base / name, is_locked(base / name), read_state(base / name))
    if (base / _ENDED / name).is_dir():
        return Vm(name, base / _ENDED / name, False, read_state(base / _ENDED / name))
    return None


def vms(*, ended: bool = False) -> Iterator[Vm]:
    """Every VM of this user that runs, or was killed and has not been cleaned up; with ``ended`` the records too."""
    base = root()
    names = {p.name for p in base.iterdir() if p.is_dir() and not p.name.startswith(".") and (p / "lock").exists()}
    if ended and (base / _ENDED).is_dir():
        names |= {p.name for p in (base / _ENDED).iterdir()}
    for name in sorted(names):
        if vm := find(name):
            yield vm


def is_locked(path: Path) -> bool:
    """Whether a supervisor lives in this run directory."""
    try:
        fd = os.open(path / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return _is_held(fd)
    finally:
        os.close(fd)


def _is_held(fd: int) -> bool:
    """Whether a supervisor has the lock. A shared lock, so that two lookers do not take each other for one."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


def read_state(path: Path) -> dict[str, Any]:
    """state.json in ``path``; empty when there is none yet."""
    try:
        state = json.loads((path / "state.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def process_start(pid: int) -> int | None:
    """When ``pid`` began, in clock ticks since boot (proc_pid_stat(5), field 22): tells it from a later process
    of the same pid. None when it is gone, or a zombie."""
    fields = _stat(pid)
    return None if fields is None or fields[0] in (b"Z", b"X") else int(fields[19])


def is_exiting(pid: int) -> bool:
    """Whether ``pid`` is gone, or is about to be: PF_EXITING (linux/sched.h) in proc_pid_stat(5)'s field 9."""
    fields = _stat(pid)
    return fields is None or bool(int(fields[6]) & _PF_EXITING)


def _stat(pid: int) -> list[bytes] | None:
    """proc_pid_stat(5) from field 3 on; None when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def end_processes(state: dict[str, Any], timeout: float = 5.0) -> None:
    """Kills those of a dead supervisor's processes that still live, and waits until they are gone.

    PR_SET_PDEATHSIG does this at once; here it is made sure of, since they may hold a disk or a socket. ``timeout``
    is in seconds. Errors: RunDirError for a process that does not die.
    """
    waiting: list[tuple[int, int]] = []
    for process in state.get("processes", []):
        pid, start = process.get("pid"), process.get("start")
        if not isinstance(pid, int) or start is None:
            continue
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        if process_start(pid) != start:  # checked with the pidfd held: it cannot become another process's now
            os.close(pidfd)
            continue
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        waiting.append((pid, pidfd))
    end = time.monotonic() + timeout
    for pid, pidfd in waiting:
        try:
            if not select.select([pidfd], [], [], max(0.0, end - time.monotonic()))[0]:
                raise RunDirError(f"process {pid} of a killed VM does not go away")
        finally:
            os.close(pidfd)
