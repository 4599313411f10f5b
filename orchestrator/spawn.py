"""Forking the processes of a VM from the supervisor, and watching them.

The supervisor has one thread and no ZeroMQ context, so that a fork is a whole copy. Its modules are the child's
warm start: what children need is imported before the first fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from motorcade.orchestrator.rundir import process_start

if TYPE_CHECKING:
    from motorcade.sidecars.device import Device

_BOOT_FD = 3
_PR_SET_PDEATHSIG = 1  # linux/prctl.h; the number is part of the kernel's ABI, as every prctl option is
_LAST_FD = (1 << 31) - 1

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

    def describe(self) -> dict[str, Any]:
        """For state.json."""
        start = process_start(self.pid)
        return {"role": self.role, "device": None, "pid": self.pid, "start": start, "state": self.state}


@dataclass
class Helper(Process):
    """A program that a backend needs, such as passt."""

    state: str = "running"

    def end(self) -> None:
        """Kills it if it still runs (it keeps nothing), and lets go."""
        if self.alive:
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
    """Forks ``main`` as a process of its own; the caller owns ``log_fd``, which becomes the child's stderr."""
    from motorcade.proto import boot

    ours, theirs = boot.socketpair()
    supervisor = os.getpid()
    pid = os.fork()
    if pid == 0:
        _child(role, vm, main, theirs, log_fd, supervisor)
    theirs.close()
    return Child(role, pid, os.pidfd_open(pid), device_id=device_id, link=ours)


def _child(role: str, vm: str, main: Main, link: socket.socket, log_fd: int, supervisor: int) -> NoReturn:
    """The first steps of a forked process. Never returns into the supervisor's code: whatever objects that has are
    neither used nor finalized here, since their descriptors are gone and the numbers may be ours by then."""
    status = 1
    try:
        die_with(supervisor)
        default_signals()
        os.umask(0o077)
        null = os.open(os.devnull, os.O_RDWR)
        for source, target in ((null, 0), (null, 1), (log_fd, 2)):
            os.dup2(source, target)
        link_fd = link.detach()
        if link_fd != _BOOT_FD:
            os.dup2(link_fd, _BOOT_FD, inheritable=False)
        # Everything else is the supervisor's or another child's: a right that this process must not have.
        os.closerange(_BOOT_FD + 1, _LAST_FD)
        title(role, vm)
        status = main(socket.socket(fileno=_BOOT_FD))
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def die_with(parent: int) -> None:
    """Has the kernel kill this process when ``parent`` dies, and ends it at once if that has happened already."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0) != 0:
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


def title(role: str, vm: str) -> None:
    """What ps shows: "motorcade: blk-root (web)"."""
    import setproctitle

    setproctitle.setproctitle(f"motorcade: {role} ({vm})")


def load_mains(kinds: set[str]) -> dict[str, Main]:
    """What each kind of process runs."""
    from motorcade.core import main as core_main

    mains: dict[str, Main] = {"core": core_main.run}
    if kinds:
        from motorcade.sidecars import runtime

        for kind in kinds:
            device_class = _device_class(kind)
            mains[kind] = lambda link, device_class=device_class: runtime.run(device_class, link)  # type: ignore[misc]
    return mains


def _device_class(kind: str) -> type[Device]:
    if kind == "blk":
        from motorcade.sidecars.blk.device import BlkDevice

        return BlkDevice
    if kind == "net":
        from motorcade.sidecars.net.device import NetDevice

        return NetDevice
    from motorcade.sidecars.serial.device import SerialDevice

    return SerialDevice
