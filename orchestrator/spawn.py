"""Forking the processes of a VM from the supervisor, and watching them.

The supervisor has one thread and no ZeroMQ context, so that a fork is a whole copy. Its modules are the child's
warm start: what children need is imported before the first fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from motorcade.orchestrator import footprint
from motorcade.orchestrator.footprint import Ranges
from motorcade.orchestrator.rundir import is_exiting, process_start

if TYPE_CHECKING:
    from motorcade.orchestrator.ahead import Ahead
    from motorcade.sidecars.device import Device

_BOOT_FD = 3
_PR_SET_PDEATHSIG = 1  # linux/prctl.h; the number is part of the kernel's ABI, as every prctl option is
_LAST_FD = (1 << 31) - 1
_GENTLE = 5.0  # seconds for a program to end by itself when it is told to
_MAX_NAMES = 4096  # bytes of a role and a VM's name

# Made here, once: in a child it would be made in pages of the child's own, 80 of them.
_prctl = ctypes.CDLL(None, use_errno=True).prctl
_prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]

Main = Callable[[socket.socket], int]


@dataclass
class Process:
    """A child of the supervisor. Owns the pidfd until ``close``."""

    role: str  # core, blk-root, passt-lan, ...
    pid: int
    pidfd: int
    state: str = "starting"

    @property
    def alive(self) -> bool:
        """Not reaped yet."""
        return not self.state.startswith(("exited", "killed"))

    @property
    def dying(self) -> bool:
        """Whether its end has begun, though there is nothing to reap yet: its sockets are closed some time before its
        pidfd is readable (the kernel's PF_EXITING)."""
        return is_exiting(self.pid)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal; one that has ended is left alone."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def reap(self) -> str:
        """Waits for its end: how it ended, such as "exited with status 1", "killed by SIGSEGV"."""
        _, status = os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        self.state = f"exited with status {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        return self.state

    def close(self) -> None:
        """Lets go of the pidfd."""
        os.close(self.pidfd)

    @functools.cached_property
    def start(self) -> int | None:
        """rundir.process_start; asked for first while it is not reaped."""
        return process_start(self.pid)

    def describe(self) -> dict[str, Any]:
        """For state.json."""
        return {"role": self.role, "device": None, "pid": self.pid, "start": self.start, "state": self.state}


@dataclass
class Helper(Process):
    """A program that a backend needs, such as passt. ``gentle``: it may have something to write before it ends."""

    state: str = "running"
    gentle: bool = False

    def end(self) -> None:
        """Ends it if it still runs, and lets go."""
        if self.alive:
            if self.gentle:
                self.kill(signal.SIGTERM)
                select.select([self.pidfd], [], [], _GENTLE)
            self.kill()
            self.reap()
        self.close()


@dataclass
class Child(Process):
    """A process forked from us. Owns the supervisor's end of its boot socket, too."""

    device_id: str = ""  # empty: the core
    link: socket.socket = field(kw_only=True)
    failure: str = ""  # what it said itself before it ended

    def close(self) -> None:
        """Lets go of the descriptors."""
        super().close()
        self.link.close()

    def describe(self) -> dict[str, Any]:
        """For state.json."""
        return {**super().describe(), "device": self.device_id or None}


def spawn(role: str, device_id: str, vm: str, main: Main, log_fd: int) -> Child:
    """Starts ``main`` as a process of its own; the caller owns ``log_fd``, which becomes the child's stderr. It is one
    that ``prepare`` has forked already, where one is left, else a new one."""
    for waiting in _take(main):
        if _adopt(waiting, role, vm, log_fd):
            waiting.role, waiting.device_id = role, device_id
            return waiting
        waiting.reap()  # it did not live to see this
        waiting.close()

    def start(link: socket.socket) -> int:
        title(role, vm)
        return main(link)

    return _fork(role, start, log_fd, device_id)


def execute(role: str, device_id: str, kind: str, log_fd: int, path: str) -> Child:
    """Starts a sidecar as a new interpreter, which runs the code that is on disk now: in the directory ``path`` first,
    where one is named. The caller owns ``log_fd``."""
    places = [path, os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    own = kind in ("blk", "net", "serial")
    module = [f"motorcade.sidecars.{kind}"] if own else ["motorcade.sidecars.kinds", kind]
    # -P: whatever lies in the supervisor's working directory is no module of ours.
    command = [sys.executable, "-P", "-m", *module, "--boot-fd", str(_BOOT_FD)]

    def start(link: socket.socket) -> int:
        os.set_inheritable(link.fileno(), True)
        os.execve(sys.executable, command, environment)

    return _fork(role, start, log_fd, device_id)


def prepare(kind: str, name: str, ahead: Ahead | None, ranges: Ranges) -> None:
    """Forks a process ahead of the VM that will need it: it waits for ``spawn`` to say which one it is. ``name`` is
    shown by ps meanwhile. ``ahead``: the RAM that it will have, which stays the caller's. ``ranges``: of footprint.py,
    the pages that it is going to write to."""
    main = load_main(kind)
    keep = () if ahead is None else (ahead.memory, *([] if ahead.userfaultfd is None else [ahead.userfaultfd]))
    child = _fork(kind, lambda link: _await_adoption(link, kind, name, main, ranges))
    _waiting.setdefault(main, []).append(child)
    how = b"nothing" if ahead is None else b"lazy" if ahead.lazy else b"ready"
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it is gone, as ``spawn`` will find
        socket.send_fds(child.link, [how], keep)


def dismiss() -> None:
    """Ends the processes that wait: the VM has not the RAM that they were prepared for."""
    for main in list(_waiting):
        for child in _take(main):
            child.kill()
            child.reap()
            child.close()


_waiting: dict[Main, list[Child]] = {}  # of this process


def _take(main: Main) -> Iterator[Child]:
    """The children that wait, one by one, to be kept or closed."""
    while _waiting.get(main):
        yield _waiting[main].pop(0)


def _adopt(child: Child, role: str, vm: str, log_fd: int) -> bool:
    """Tells a child that waits what it is; False where it is gone."""
    try:
        socket.send_fds(child.link, [f"{role}\n{vm}".encode()], [log_fd])
    except (BrokenPipeError, ConnectionResetError):
        return False
    return True


def _await_adoption(link: socket.socket, kind: str, name: str, main: Main, ranges: Ranges) -> int:
    """In the child: waits, and then goes on as one that has just been forked."""
    title(kind, name)
    how, fds, _, _ = socket.recv_fds(link, _MAX_NAMES, 2)
    if fds:
        main = _set_up(kind, main, dict(zip(("memory", "userfaultfd"), fds, strict=False)), lazy=how == b"lazy")
        for fd in fds:
            os.close(fd)
    footprint.copy_ahead(ranges)
    data, fds, _, _ = socket.recv_fds(link, _MAX_NAMES, 1)
    if not data:
        return 0  # the VM has no use for us
    role, vm = data.decode().split("\n")
    os.dup2(fds[0], 2)
    os.close(fds[0])
    title(role, vm)
    return main(link)


def _set_up(kind: str, main: Main, fds: dict[str, int], *, lazy: bool) -> Main:
    """In the child: ``main`` with all done that needs nothing but the RAM."""
    from motorcade.proto.memory import layout

    regions = layout(os.fstat(fds["memory"]).st_size)
    if kind == "core":
        from motorcade.core import blank
        from motorcade.core import main as core_main
        from motorcade.orchestrator.resources import open_kvm

        return functools.partial(core_main.run, blank=blank.make({**fds, "kvm": open_kvm(1)}, regions, lazy=lazy))
    if kind == "pager":  # it has no mapping of guest memory
        from motorcade.sidecars.pager import main as pager

        return functools.partial(pager.main, client=pager.prepare())
    from motorcade.sidecars import runtime

    device = _device_class(kind)
    return functools.partial(runtime.run, device, ahead=runtime.prepare(device, fds, regions, lazy=lazy))


def _fork(role: str, main: Main, log_fd: int | None = None, device_id: str = "") -> Child:
    """Forks ``main``; its stderr is ``log_fd``, or /dev/null."""
    from motorcade.proto import boot

    ours, theirs = boot.socketpair()
    supervisor = os.getpid()
    pid = os.fork()
    if pid == 0:
        _child(main, theirs, log_fd, supervisor)
    theirs.close()
    return Child(role, pid, os.pidfd_open(pid), device_id=device_id, link=ours)


def _child(main: Main, link: socket.socket, log_fd: int | None, supervisor: int) -> NoReturn:
    """The first steps of a forked process. Never returns into the supervisor's code: whatever objects that has are
    neither used nor finalized here, since their descriptors are gone and the numbers may be ours by then."""
    status = 1
    try:
        die_with(supervisor)
        default_signals()
        os.umask(0o077)
        null = os.open(os.devnull, os.O_RDWR)
        for source, target in ((null, 0), (null, 1), (null if log_fd is None else log_fd, 2)):
            os.dup2(source, target)
        link_fd = link.detach()
        if link_fd != _BOOT_FD:
            os.dup2(link_fd, _BOOT_FD, inheritable=False)
        # Everything else is the supervisor's or another child's: a right that this process must not have.
        os.closerange(_BOOT_FD + 1, _LAST_FD)
        status = main(socket.socket(fileno=_BOOT_FD))
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def die_with(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Has the kernel end this process when ``parent`` dies, and ends it at once if that has happened already."""
    if _prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "PR_SET_PDEATHSIG")
    # A parent that died before the prctl sends nothing any more; we belong to init or a subreaper then.
    if os.getppid() != parent:
        os._exit(1)


def default_signals() -> None:
    """Undoes what the supervisor (and whoever started it) set: handlers, ignored signals, the mask, the wake-up fd."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # Python's own default: an OSError where it happens
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def is_traced(pid: int) -> bool:
    """Whether somebody debugs this process (proc(5), TracerPid)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False  # it has ended
    return any(line.startswith("TracerPid:") and line.split()[1] != "0" for line in status.splitlines())


def title(role: str, vm: str) -> None:
    """What ps shows: "motorcade: blk-root (web)"."""
    import setproctitle

    setproctitle.setproctitle(f"motorcade: {role} ({vm})")


def load_mains(kinds: Iterable[str]) -> dict[str, Main]:
    """What each kind of process runs, "core" always among them; the same function for the same kind every time."""
    return {kind: load_main(kind) for kind in ("core", *kinds)}


@functools.cache
def load_main(kind: str) -> Main:
    """What a process of this kind runs, its modules imported and its filter of system calls made."""
    from motorcade.sidecars import sandbox

    if kind == "core":
        from motorcade.core import main as core_main

        sandbox.load("core")
        return core_main.run
    if kind == "pager":
        sandbox.load("pager")
        pager = importlib.import_module("motorcade.sidecars.pager.main")
        pager_main: Main = pager.main
        return pager_main
    from motorcade.sidecars import runtime

    device = _device_class(kind)
    sandbox.load(device.sandbox_role, tuple(device.system_calls), tuple(device.late_imports))
    return functools.partial(runtime.run, device)


def _device_class(kind: str) -> type[Device]:
    if kind == "blk":
        from motorcade.sidecars.blk.device import BlkDevice

        return BlkDevice
    if kind == "net":
        from motorcade.sidecars.net.device import NetDevice

        return NetDevice
    if kind == "serial":
        from motorcade.sidecars.serial.device import SerialDevice

        return SerialDevice
    from motorcade.sidecars import kinds

    return kinds.find(kind)
