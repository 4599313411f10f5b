"""vmmctl doctor: what this host can do for VMs, and what each lack costs. Within a second."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Level = Literal["ok", "note", "lack"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. ``cost``: what its lack means; empty when there is none."""

    name: str
    level: Level  # note: works, with less; lack: something does not work at all
    found: str
    cost: str = ""


def examine() -> list[Finding]:
    """Everything, in the order in which a person should read it. A check that fails says so as its finding."""
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("kvm", _kvm),
        ("userfaultfd", _userfaultfd),
        ("io_uring", _io_uring),
        ("tun", _tun),
        ("passt", lambda: _program("passt", "passt", "nets with `user: true` do not work")),
        ("namespaces", _namespaces),
        ("landlock", _landlock),
        ("seccomp", _seccomp),
        ("huge pages", _huge_pages),
        ("cgroup v2", _cgroup),
        ("memfd", _memory),
        ("qemu", lambda: _program("qemu", "qemu-system-x86_64", "there is no box for hosts without hardware KVM")),
    ]
    findings = []
    for name, check in checks:
        try:
            findings.append(check())
        except OSError as e:
            findings.append(Finding(name, "lack", f"cannot be told: {e}", "unknown"))
    return findings


def report() -> dict[str, Any]:
    """For --json."""
    findings = examine()
    kvm = next(f for f in findings if f.name == "kvm")
    return {
        "host": {"kernel": platform.release(), "cpus": os.cpu_count(), "machine": platform.machine()},
        "accel": "kvm" if kvm.level == "ok" else "box",
        "findings": [asdict(f) for f in findings],
    }


def _kvm() -> Finding:
    from motorcade.orchestrator.kvmprobe import probe

    p = probe()
    if p.boots_linux:
        return Finding("kvm", "ok", p.summary)
    if p.runs_guests:
        return Finding(
            "kvm", "note", p.summary, "a stock kernel cannot boot on it; accel: auto takes the box, which is slower"
        )
    return Finding("kvm", "lack", p.summary, "VMs run in the box only, emulated by QEMU: several times slower")


# Syscall numbers and constants that the C library has no names for (linux/io_uring.h, linux/landlock.h). They are
# the kernel's ABI on every architecture that has them at the same numbers (>= 5.x).
_SYS_IO_URING_SETUP = 425
_SYS_LANDLOCK_CREATE_RULESET = 444
_LANDLOCK_CREATE_RULESET_VERSION = 1
_CLONE_FLAGS = {"user": 0x10000000, "mnt": 0x00020000, "net": 0x40000000, "ipc": 0x08000000, "uts": 0x04000000}


def _syscall(number: int, *args: Any) -> int:
    """The result, or -errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    result: int = libc.syscall(ctypes.c_long(number), *args)
    return -ctypes.get_errno() if result < 0 else result


def _userfaultfd() -> Finding:
    from motorcade.sidecars import lazymem

    if reason := lazymem.permitted():
        return Finding("userfaultfd", "note", reason, "clones of a template copy all their memory before they start")
    return Finding("userfaultfd", "ok", "permitted on shared memory, kernel faults too")


def _io_uring() -> Finding:
    params = (ctypes.c_uint32 * 30)()  # struct io_uring_params: 120 bytes, zeros
    fd = _syscall(_SYS_IO_URING_SETUP, ctypes.c_uint(4), ctypes.byref(params))
    if fd >= 0:
        os.close(fd)
        return Finding("io_uring", "ok", "permitted")
    return Finding("io_uring", "note", os.strerror(-fd), "disks do plain reads and writes, one at a time: slower")


def _tun() -> Finding:
    cost = "nets with `tap` do not work; `user` and `link` do"
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return Finding("tun", "lack", "there is no /dev/net/tun (modprobe tun)", cost)
    except OSError as e:
        return Finding("tun", "lack", f"/dev/net/tun: {e.strerror}", cost)
    return Finding("tun", "ok", "/dev/net/tun opens")


def _program(name: str, program: str, cost: str) -> Finding:
    path = shutil.which(program)
    return Finding(name, "ok", path) if path else Finding(name, "lack", f"{program} is not installed", cost)


def _namespaces() -> Finding:
    """Tried, in a child: sysctls, LSMs and seccomp filters all have a say."""
    missing = [kind for kind in _CLONE_FLAGS if not _can_unshare(kind)]
    if not missing:
        return Finding("namespaces", "ok", "user, mount, network, ipc, uts")
    cost = "a VM's processes share these with the host (docs/sandbox.md)"
    return Finding("namespaces", "note", f"no new {', '.join(missing)} namespace", cost)


def _can_unshare(kind: str) -> bool:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            flags = _CLONE_FLAGS[kind] | (_CLONE_FLAGS["user"] if os.geteuid() else 0)
            status = 0 if ctypes.CDLL(None).unshare(ctypes.c_int(flags)) == 0 else 1
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1] == 0


def _landlock() -> Finding:
    abi = _syscall(
        _SYS_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_LANDLOCK_CREATE_RULESET_VERSION)
    )
    if abi > 0:
        return Finding("landlock", "ok", f"ABI {abi}")
    return Finding("landlock", "note", os.strerror(-abi), "the file system is not closed to sidecars by Landlock")


def _huge_pages() -> Finding:
    free = _number(Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages"))
    shmem = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    chosen = shmem.read_text().partition("[")[2].partition("]")[0] if shmem.exists() else "none"
    found = f"{free} free of 2 MiB; for memfds: {chosen}"
    if free or chosen in {"always", "within_size", "advise", "force"}:
        return Finding("huge pages", "ok", found)
    return Finding("huge pages", "note", found, "guest memory is in 4 KiB pages: more TLB misses")


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except FileNotFoundError:
        return 0


def _seccomp() -> Finding:
    actions = Path("/proc/sys/kernel/seccomp/actions_avail")
    if actions.exists() and "trap" in actions.read_text().split():
        return Finding("seccomp", "ok", "filters, and violations can be named")
    return Finding("seccomp", "lack", "this kernel has no filters", "no VM starts: its processes insist on theirs")


def _cgroup() -> Finding:
    from motorcade.orchestrator import cgroups

    if why := cgroups.missing():
        return Finding("cgroup v2", "note", why, "`limits` in machine.yaml are an error")
    return Finding("cgroup v2", "ok", f"limits can be set in {cgroups.parent()}")


def _memory() -> Finding:
    available = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) << 10
    found = f"{available >> 20} MiB available for guests"
    if available < 512 << 20:
        return Finding("memory", "note", found, "guests will swap or be killed")
    return Finding("memory", "ok", found)
