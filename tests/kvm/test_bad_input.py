"""Hosts that lack something, and machines that ask for too much: what vmmctl and the guest are told."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from harness.disk import FLUSH, IN, IOERR, OK, OUT, small_tmpfs
from harness.guestdriver import F_FLUSH, POWER_OFF, GuestDriver, Script
from harness.vmmctl import Host, write_machine
from motorcade.orchestrator import hostcheck, resources
from motorcade.orchestrator.errors import UserError

pytestmark = pytest.mark.kvm

KIB, MIB = 1 << 10, 1 << 20
WORD = 0x6B657074

# As a container's seccomp profile does it. 425 is io_uring_setup on every architecture.
WITHOUT_IO_URING = """
import ctypes, os, sys
seccomp = ctypes.CDLL("libseccomp.so.2")
seccomp.seccomp_init.restype = ctypes.c_void_p
allow, errno_eperm = 0x7FFF0000, 0x00050001
context = ctypes.c_void_p(seccomp.seccomp_init(allow))
assert seccomp.seccomp_rule_add(context, errno_eperm, 425, 0) == 0
assert seccomp.seccomp_load(context) == 0
os.execv(sys.argv[1], sys.argv[1:])
"""


def read_script(sector: int, word: int) -> Script:
    """Reads a sector of the first disk, and powers off."""
    script = Script()
    disk = GuestDriver(script, 0, F_FLUSH)
    disk.request(IN, sector, OK)
    script.load(disk.data, word)
    script.words.append(POWER_OFF)
    return script


def machine(folder: Path, guest: Path, script: Script, **disk: object) -> Path:
    """A machine with one disk, whose guest does what ``script`` says."""
    return write_machine(
        folder, "web", guest, cmdline="initrd", initrd=str(script.write(folder)), disks=[{"id": "d", **disk}]
    )


def unshared(host: Host, script: str) -> subprocess.CompletedProcess[str]:
    """Runs a shell script that may mount what it likes."""
    return subprocess.run(
        ["unshare", "-m", "sh", "-ec", script], env=host.env, capture_output=True, text=True, timeout=60
    )


def test_more_ram_than_the_host_has(host: Host, guest: Path, tmp_path: Path) -> None:
    much = (hostcheck.host_memory() >> 20) + 1
    file = write_machine(tmp_path, "web", guest, memory=f"{much}M")
    done = host.vmmctl("up", str(file), check=2)
    assert f"memory: {much}M is more RAM than this host has" in done.stderr
    assert host.names() == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"initrd": "no"}, "kernel.initrd: no such file: "),
        ({"disks": [{"id": "d", "path": "no"}]}, "disks[0].path: no such file: "),
        ({"disks": [{"id": "d", "path": "x"}] * 2}, "disks[1].id: 'd' is already the id of disks[0]"),
        ({"cpus": "two"}, "cpus: expected a whole number, got 'two'"),
        ({"colour": "red"}, "colour: unknown key"),
    ],
    ids=["initrd", "disk", "twice", "type", "key"],
)  # fmt: skip
def test_machine_yaml(host: Host, guest: Path, tmp_path: Path, fields: dict[str, object], message: str) -> None:
    """Every mistake is in tests/unit/test_config.py; here is what reaches the terminal, and that nothing starts."""
    file = write_machine(tmp_path, "web", guest, **fields)
    done = host.vmmctl("up", str(file), check=2)
    assert done.stderr.startswith(f"vmmctl: {file}:1:")
    assert message in done.stderr
    assert host.names() == []


def test_kvm_that_is_not_permitted(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object, *_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=r"/dev/kvm: Permission denied \(join the group"),
    ):
        patch.setattr(os, "open", refuse)
        resources.open_kvm(1)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="hiding /dev/kvm needs root")
def test_no_dev_kvm(host: Host, guest: Path, tmp_path: Path) -> None:
    """Status 1, one line, no leftovers; doctor says the same and does not fail."""
    file = write_machine(tmp_path, "web", guest)
    hide = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && mknod -m 666 /dev/urandom c 1 9; exec "
    done = unshared(host, hide + shlex.join(host.command("up", str(file))))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("vmmctl: there is no /dev/kvm: ")
    assert done.stderr.count("\n") == 1
    assert host.names() == []
    report = unshared(host, hide + shlex.join(host.command("doctor")))
    assert report.returncode == 0, report.stderr
    assert "there is no /dev/kvm" in report.stdout


def test_no_io_uring(host: Host, guest: Path, tmp_path: Path) -> None:
    """auto: plain system calls, and the log says so. io_uring: the VM does not start, and the user hears why."""
    (tmp_path / "disk.img").write_bytes(bytes(512) + WORD.to_bytes(4, "little").ljust(512, b"\0"))
    script = read_script(1, WORD)

    def up(engine: str) -> subprocess.CompletedProcess[str]:
        file = machine(tmp_path, guest, script, path="disk.img", engine=engine)
        command = [sys.executable, "-c", WITHOUT_IO_URING, *host.command("up", str(file))]
        return subprocess.run(command, env=host.env, capture_output=True, text=True, timeout=60)

    done = up("auto")
    assert (done.returncode, done.stdout.split("\n")[:-1]) == (0, script.expected), done.stderr
    assert "io_uring is not permitted here" in host.vmmctl("logs", "web", "blk-d").stdout
    done = up("io_uring")
    assert done.returncode == 1
    assert "io_uring" in done.stderr
    assert "Operation not permitted" in done.stderr
    assert "Traceback" not in done.stderr
    assert host.names() == []


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a file system")
def test_a_full_disk_under_an_overlay(host: Host, guest: Path, tmp_path: Path) -> None:
    """The guest sees an I/O error and goes on; what it flushed before is there in the next VM."""
    with (tmp_path / "base.img").open("wb") as base:
        base.truncate(8 * MIB)
    script = Script()
    disk = GuestDriver(script, 0, F_FLUSH)
    script.store(disk.data, WORD)
    disk.request(OUT, 8, OK, size=4 * KIB)
    disk.request(FLUSH, 0, OK, size=0)
    script.say("the-rest-does-not-fit")
    disk.request(OUT, 2048, IOERR, size=2 * MIB, gpa=0xA00000)
    disk.request(IN, 8, OK)
    script.load(disk.data, WORD)
    script.words.append(POWER_OFF)
    with small_tmpfs(1 * MIB) as mount:
        where = f"/proc/{os.getpid()}/fd/{mount.name}/overlay"  # vmmctl is another process
        file = machine(tmp_path, guest, script, path="base.img", overlay=where)
        assert host.vmmctl("up", str(file)).stdout.split("\n")[:-1] == script.expected
        assert "No space left" in host.vmmctl("logs", "web", "blk-d").stdout
        again = read_script(8, WORD)
        file = machine(tmp_path, guest, again, path="base.img", overlay=where)
        assert host.vmmctl("up", str(file)).stdout.split("\n")[:-1] == again.expected
    assert not any((tmp_path / "base.img").read_bytes())
