"""Guest memory that fills itself: the side of the processes that use it. The other side is the pager (sidecars/pager/).

A page that is missing stops whoever touches it, a vCPU in KVM and io_uring's workers too, until the pager has put it
there. ``register`` therefore comes before anything touches the memory, and before the capabilities are dropped that the
system call may need (native/uffd.h says what else to mind).
"""

from __future__ import annotations

import errno
import functools
import mmap
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from motorcade.proto import messages
    from motorcade.proto.memory import GuestMemory

DEVICE = "/dev/userfaultfd"


class LazyMemoryError(OSError):
    """Guest memory cannot be filled on demand here. The text says what is missing."""


def register(
    ffi: Any, lib: Any, memory: GuestMemory, fds: Mapping[str, int]
) -> tuple[int, tuple[messages.Mapping, ...]]:
    """Registers this process's mapping of guest memory for pages that are missing.

    ``ffi`` and ``lib`` are the caller's C extension, whichever (native/uffd.h is in all); ``fds["userfaultfd"]``, an
    open /dev/userfaultfd, is used where there is one, else the system call. Returns the userfaultfd, the caller's to
    send with ``LazyReady`` and to close (the registration lives as long as any copy does), and what to say in it.

    Errors: LazyMemoryError.
    """
    from motorcade.proto import messages

    uffd = _open(lib, fds.get("userfaultfd", -1))
    mappings = []
    for index, region in enumerate(memory.regions):
        address = memory.host_address(index)
        if error := lib.mc_uffd_register(uffd, address, region.size):
            os.close(uffd)
            raise LazyMemoryError(
                -error, f"guest memory cannot be registered with userfaultfd: {os.strerror(-error)} at {region.gpa:#x}"
            )
        mappings.append(messages.Mapping(address, region.size, region.offset))
    return uffd, tuple(mappings)


def open_device() -> int | None:
    """/dev/userfaultfd for the descriptor of that label, the caller's to close; None where this user may not open it or
    the kernel (before 6.1) has none."""
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as e:
        if e.errno not in (errno.ENOENT, errno.ENXIO, errno.ENODEV, errno.EACCES, errno.EPERM):
            raise
        return None


@functools.cache
def permitted() -> str:
    """Empty where this process may use userfaultfd on a memfd, with faults of the kernel's; else the reason. Tried out
    once a process, and its forks."""
    from motorcade.core._native import lib

    device = open_device()
    try:
        uffd = _open(lib, -1 if device is None else device)
    except LazyMemoryError as e:
        return str(e.strerror)
    finally:
        if device is not None:
            os.close(device)
    try:
        return _try(lib, uffd)
    finally:
        os.close(uffd)


def _try(lib: Any, uffd: int) -> str:
    """Registers a page: some sandboxes and kernels have the call, but not for a memfd."""
    import ctypes

    memfd = os.memfd_create("userfaultfd-probe", os.MFD_CLOEXEC)
    try:
        os.ftruncate(memfd, mmap.PAGESIZE)
        with mmap.mmap(memfd, mmap.PAGESIZE) as page:
            address = ctypes.addressof(ctypes.c_char.from_buffer(page))
            if error := lib.mc_uffd_register(uffd, address, mmap.PAGESIZE):
                return f"userfaultfd does not work on a memfd: {os.strerror(-error)}"
    finally:
        os.close(memfd)
    return ""


def _open(lib: Any, device: int) -> int:
    """A userfaultfd of this process."""
    uffd: int = lib.mc_uffd_open(device)
    if uffd >= 0:
        return uffd
    text = f"userfaultfd: {os.strerror(-uffd)}"
    if -uffd == errno.EPERM:
        text = f"userfaultfd is not permitted: it takes access to {DEVICE}, or sysctl vm.unprivileged_userfaultfd=1"
    raise LazyMemoryError(-uffd, text)
