"""Programs in the place of a sidecar, the pager or the core, that try what their sandbox is to forbid.

Each sidecar is one of Motorcade's, and works; with a descriptor ``attempt``, a file that says "THREAD WHAT", it makes
that attempt when its statistics are asked for (thread main) or when its driver is ready (thread data).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motorcade.sidecars.blk.device import BlkDevice
from motorcade.sidecars.net.device import NetDevice
from motorcade.sidecars.rng.device import RngDevice
from motorcade.sidecars.serial.device import SerialDevice

if TYPE_CHECKING:
    from motorcade.proto.memory import GuestMemory
    from motorcade.proto.messages import Boot, StatsReport

_libc = ctypes.CDLL(None, use_errno=True)
_libc.malloc.restype = ctypes.c_void_p
_libc.free.argtypes = [ctypes.c_void_p]
_PARENT = os.getpid()
_buffer = ctypes.create_string_buffer(64)
_iov = (ctypes.c_uint64 * 2)(ctypes.addressof(_buffer), 8)  # struct iovec; a fork has it where its parent has it
_UNSHARE_USER = 0x10000000
_SYS = {"process_vm_readv": 310, "userfaultfd": 323, "io_uring_setup": 425, "pidfd_getfd": 438}  # x86-64


def _call(name: str, *args: Any) -> int:
    result: int = _libc.syscall(ctypes.c_long(_SYS[name]), *args)
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result


def _thread_that_is_none() -> None:
    # CLONE_PARENT_SETTID and SIGCHLD: a process.
    _libc.syscall(ctypes.c_long(56), ctypes.c_ulong(0x00100000 | signal.SIGCHLD), 0, _buffer, 0, 0)


# What is tried, and the call that it is by.
ATTEMPTS: dict[str, tuple[str, Callable[[], object]]] = {
    "a file": ("openat", lambda: os.open("/etc/passwd", os.O_RDONLY)),
    "its own memory's file": ("openat", lambda: os.open("/proc/self/mem", os.O_RDWR)),
    "/dev/kvm": ("openat", lambda: os.open("/dev/kvm", os.O_RDWR)),
    "a directory": ("openat", lambda: list(Path("/").iterdir())),
    "an internet socket": ("socket", lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM)),
    "a netlink socket": ("socket", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)),
    "another process's memory": ("process_vm_readv", lambda: _call("process_vm_readv", _PARENT, _iov, 1, _iov, 1, 0)),
    "to trace its parent": ("ptrace", lambda: _libc.ptrace(16, _PARENT, None, None)),
    "exec": ("execve", lambda: os.execv("/bin/true", ["true"])),
    "fork": ("clone", os.fork),
    "a process by clone": ("clone", _thread_that_is_none),
    "a signal to its parent": ("kill", lambda: os.kill(_PARENT, 0)),
    "a signal to a thread of its parent": ("tgkill", lambda: _libc.tgkill(_PARENT, _PARENT, 0)),
    "another process's descriptor": ("pidfd_getfd", lambda: _call("pidfd_getfd", 0, 0, 0)),
    "memory to execute": ("mmap", lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)),
    "a ring of its own": ("io_uring_setup", lambda: _call("io_uring_setup", 4, _buffer)),
    "user faults": ("userfaultfd", lambda: _call("userfaultfd", 0)),
    "a namespace": ("unshare", lambda: _libc.unshare(_UNSHARE_USER)),
    "another handler for violations": ("rt_sigaction", lambda: signal.signal(signal.SIGSYS, signal.SIG_IGN)),
    "to listen": ("bind", lambda: _libc.bind(0, _buffer, 16)),
}


def _memory_of_a_thread() -> None:
    """Takes so much, and gives it back, that the C library thinks of returning it to the kernel."""
    pieces = [_libc.malloc(100_000) for _ in range(300)]
    for piece in reversed(pieces):
        _libc.free(piece)


def _in_a_thread(work: Callable[[], object]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


# Of these, what is tried in every kind of process.
EVERYWHERE = ("a file", "/dev/kvm", "an internet socket", "another process's memory", "exec", "fork")


# What is done by libraries without anybody's asking for it, and must be no violation.
HARMLESS: dict[str, Callable[[], object]] = {
    "memory": _memory_of_a_thread,
    "memory of a thread": lambda: _in_a_thread(_memory_of_a_thread),
}


def attempt(fds: Mapping[str, int], thread: str) -> None:
    """What the descriptor says, if it says this thread."""
    if "attempt" in fds:
        where, _, what = os.pread(fds["attempt"], 100, 0).decode().partition(" ")
        if where == thread:
            (HARMLESS.get(what) or ATTEMPTS[what][1])()


class _Attempting:
    fds: Mapping[str, int]

    def stats(self) -> StatsReport:
        """The main thread's."""
        attempt(self.fds, "main")
        return super().stats()  # type: ignore[misc,no-any-return]

    def run(self) -> None:
        """The data thread's."""
        attempt(self.fds, "data")
        super().run()  # type: ignore[misc]


class Blk(_Attempting, BlkDevice):
    """A disk."""


class Net(_Attempting, NetDevice):
    """A NIC."""


class Serial(_Attempting, SerialDevice):
    """A console."""


class Rng(_Attempting, RngDevice):
    """A device of the kit."""

    def __init__(self, boot: Boot, fds: Mapping[str, int], memory: GuestMemory) -> None:
        super().__init__(boot, fds, memory)
