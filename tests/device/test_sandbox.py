"""From inside each sidecar's sandbox: what is tried ends the process, by name; and without that the device works."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.pager import Frozen, PagerProcess
from harness.prisoners import ATTEMPTS, EVERYWHERE, HARMLESS
from harness.sidecar import Sidecar, SidecarGone
from harness.toucher import Toucher
from motorcade.orchestrator.charbackend import open_socket
from motorcade.proto import messages as m
from motorcade.sidecars.sandbox import roles

STATUS = 159
NAMESPACES = ("user", "mnt", "ipc", "uts", "net")


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory with a path that fits a socket's address."""
    with tempfile.TemporaryDirectory(prefix="mc-") as directory:
        yield Path(directory)


@contextlib.contextmanager
def prisoner(kind: str, directory: Path, thread: str = "", what: str = "") -> Iterator[Sidecar]:
    """A sidecar of that kind which makes one attempt, or none."""
    fds: dict[str, int] = {}
    role: m.BlkBoot | m.NetBoot | m.SerialBoot | m.KitBoot
    with contextlib.ExitStack() as stack:
        queues = {"Blk": 1, "Net": 3, "Serial": 2, "Rng": 1}[kind]
        if kind == "Blk":
            fds["disk"] = os.memfd_create("disk")
            os.ftruncate(fds["disk"], 1 << 20)
            role = m.BlkBoot("dev0", "disk", queues=1)
        elif kind == "Net":
            role = m.NetBoot("dev0", bytes.fromhex("525400000001"), 1, "none", 0)
        elif kind == "Serial":
            console = open_socket(directory / "c")
            stack.callback(console.close)
            fds["console"] = os.dup(console.fd)
            role = m.SerialBoot("dev0", "virtio", "none", 4096)
        else:
            role = m.KitBoot("dev0", "rng")
        if what:
            fds["attempt"] = os.memfd_create("attempt")
            os.write(fds["attempt"], f"{thread} {what}".encode())
        for fd in fds.values():
            stack.callback(os.close, fd)
        yield stack.enter_context(Sidecar(f"harness.prisoners:{kind}", role, fds, queues=queues))


def fails(sidecar: Sidecar, thread: str) -> None:
    """Has the attempt made; the process ends by it."""
    with pytest.raises(SidecarGone):
        if thread == "data":
            sidecar.start()
        for _ in range(1000):  # the data thread's comes when it comes
            sidecar.stats()
    assert sidecar.exit_status == STATUS, sidecar.log_tail()


@pytest.mark.parametrize("what", ATTEMPTS)
def test_an_attempt_ends_the_process_and_is_named(short: Path, what: str) -> None:
    with prisoner("Rng", short, "main", what) as sidecar:
        fails(sidecar, "main")
        call = ATTEMPTS[what][0]
        assert sidecar.stopped == f"seccomp: {call}"
        last = sidecar.log_lines()[-1]
        assert (last["level"], last["role"]) == ("critical", "dev0")
        says = r"seccomp: \w+\((0x[0-9a-f]+(, )?){4}\): this process may not do that, and ends"
        assert re.fullmatch(says, last["msg"])
        assert re.fullmatch(r"20\d\d-[01]\d-[0-3]\dT[0-2]\d:[0-5]\d:[0-6]\d\.\d{3}Z", last["ts"])


@pytest.mark.parametrize("what", EVERYWHERE)
@pytest.mark.parametrize("kind", ["Blk", "Net", "Serial"])
def test_no_kind_may(short: Path, kind: str, what: str) -> None:
    with prisoner(kind, short, "main", what) as sidecar:
        fails(sidecar, "main")
        assert sidecar.stopped == f"seccomp: {ATTEMPTS[what][0]}"


# Not the console's data thread: it runs before there is anybody to be told.
@pytest.mark.parametrize("kind", ["Blk", "Net", "Rng"])
def test_nor_may_its_data_thread(short: Path, kind: str) -> None:
    with prisoner(kind, short, "data", "a file") as sidecar:
        fails(sidecar, "data")
        assert sidecar.stopped == "seccomp: openat"


@pytest.mark.parametrize("kind", ["Blk", "Net", "Serial", "Rng"])
def test_without_an_attempt_it_works_and_the_kernel_says_how_it_is_shut_in(short: Path, kind: str) -> None:
    with prisoner(kind, short) as sidecar:
        queues = sidecar.start()
        sidecar.stats()
        if kind == "Rng":
            assert queues[0].run(into=[16]).written == 16
        process = Path(f"/proc/{sidecar.pid}")
        status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines())
        assert (status["Seccomp"], status["NoNewPrivs"]) == ("2", "1")
        assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {0}
        assert list((process / "root").iterdir()) == []
        for name in NAMESPACES:
            assert (process / "ns" / name).readlink() != Path(f"/proc/self/ns/{name}").readlink(), name
        limits = (process / "limits").read_text()
        assert re.search(r"Max core file size +0 +0 ", limits)
        assert re.search(r"Max open files +512 +512 ", limits)
        assert sidecar.shutdown() == 0


@pytest.mark.parametrize("what", HARMLESS)
def test_what_the_c_library_does_by_itself_is_no_violation(short: Path, what: str) -> None:
    """It looks into /proc once, before it shrinks the heap that it makes for a thread: there may be none."""
    with prisoner("Rng", short, "main", what) as sidecar:
        sidecar.stats()
        assert sidecar.shutdown() == 0


def test_every_line_of_the_lists_has_a_reason_and_no_list_names_a_way_out() -> None:
    ways_out = {"open", "openat", "openat2", "execve", "execveat", "fork", "vfork", "ptrace", "process_vm_readv",
                "process_vm_writev", "kill", "mount", "bpf", "io_uring_setup", "userfaultfd", "pidfd_getfd", "unshare",
                "setns", "connect", "socket", "memfd_create", "personality", "keyctl", "kexec_load"}  # fmt: skip
    for role, calls in roles.ROLES.items():
        names = {call.name for call in calls if not call.fails}
        assert names & ways_out == ({"socket", "connect"} if role == "net-link" else set()), role
        assert all(call.why for call in calls)


@pytest.mark.parametrize(("thread", "what"), [*(("main", what) for what in EVERYWHERE), ("control", "a file")])
def test_nor_may_the_pager(monkeypatch: pytest.MonkeyPatch, thread: str, what: str) -> None:
    monkeypatch.setenv("MOTORCADE_TEST_ATTEMPT", f"{thread} {what}")
    with Frozen([1, 0, 1]) as frozen:
        memory = frozen.new_memory()
        with Toucher(memory, frozen.size) as core, PagerProcess(frozen, memory, module="harness.prisonpager") as pager:
            if thread == "control":
                pager.wait_hello()
                with contextlib.suppress(AssertionError):  # it is gone
                    pager.request(m.StatsRequest())
            else:
                pager.serve("core", core)
            assert pager.process.wait(30) == STATUS
            assert f"seccomp: {ATTEMPTS[what][0]}(0x" in pager.log_path.read_text()


def _second_line(uid: int) -> str:
    """In a child that has entered, with no filter: what it gets."""
    from motorcade.sidecars import sandbox
    from motorcade.sidecars._queue import ffi, lib

    sandbox.load("kit")
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    had = sandbox.enter(ffi, lib, "kit")
    said = [f"had {had:#x}", f"ids {os.getuid()} {os.getgid()}"]
    for what in ("a file", "/dev/kvm", "another process's memory", "to trace its parent"):
        ctypes.set_errno(0)
        try:
            result = ATTEMPTS[what][1]()
            said.append(f"{what}: {errno.errorcode.get(ctypes.get_errno()) if result == -1 else 'done'}")
        except OSError as e:
            said.append(f"{what}: {errno.errorcode[e.errno or 0]}")
    return "\n".join(said)


@pytest.mark.parametrize("uid", [0, 65534])
def test_without_a_filter_there_is_still_nothing_to_open_and_nobody_to_reach(uid: int) -> None:
    """For root, and for a user without any right."""
    if os.geteuid() != 0:
        pytest.skip("becoming nobody takes root")
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.write(write, _second_line(uid).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    said = dict(line.rsplit(" ", 1) for line in os.read(read, 4096).decode().replace("had ", "had: ").splitlines())
    os.close(read)
    from motorcade.sidecars._queue import lib

    every = lib.MC_SANDBOX_USER | lib.MC_SANDBOX_MOUNT | lib.MC_SANDBOX_IPC | lib.MC_SANDBOX_UTS | lib.MC_SANDBOX_NET
    assert int(said["had:"], 16) & every == every
    assert said[f"ids {uid}"] == str(uid)
    assert (said["a file:"], said["/dev/kvm:"]) == ("ENOENT", "ENOENT")
    assert said["another process's memory:"] == said["to trace its parent:"] == "EPERM"
