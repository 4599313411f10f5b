"""`vmmctl run` on bare KVM: StratoVirt's way to start, freeze and restore a VM, in the foreground and as a daemon."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.vmmctl import DEADLINE, Host, gone

pytestmark = pytest.mark.kvm

# It greets, sends back what it gets, then does as the power button says.
CMDLINE = "print=hello echo=3 print=more irq=9 await=1 out=1540:52"


class Raw:
    """QMP as StratoVirt's users speak it: a socket by its path, no qmp_capabilities."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(DEADLINE)
        self.sock.connect(str(path))
        self.lines = self.sock.makefile("rb")
        assert "QMP" in json.loads(self.lines.readline())

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.lines.close()
        self.sock.close()

    def __call__(self, command: str, **arguments: Any) -> Any:
        self.sock.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            answer = json.loads(self.lines.readline())
            if "event" not in answer:
                return answer["return"]

    def migrate(self, uri: str) -> dict[str, Any]:
        """What query-migrate says at the end."""
        assert self("migrate", uri=uri) == {}
        end = time.monotonic() + DEADLINE
        while (info := self("query-migrate"))["status"] in ("setup", "active"):
            assert time.monotonic() < end, info
        return dict(info)


def hear(path: Path, text: bytes, typed: bytes = b"") -> bytes:
    """What a console's socket says up to ``text``, without line ends."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(DEADLINE)
        sock.connect(str(path))
        sock.sendall(typed)
        said = b""
        while text not in said:
            some = sock.recv(4096)
            assert some, said
            said += some
    return said.replace(b"\r\n", b"\n")


@pytest.fixture
def tap() -> Iterator[str]:
    """A tap of this test's own."""
    if os.geteuid() != 0:
        pytest.skip("a tap needs root")
    name = f"mcr{os.getpid()}"
    subprocess.run(["ip", "tuntap", "add", name, "mode", "tap", "vnet_hdr"], check=True)
    try:
        yield name
    finally:
        subprocess.run(["ip", "link", "del", name], check=True)


@pytest.fixture
def place(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the command lines are typed, with a disk in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rootfs.img").write_bytes(os.urandom(1 << 20))
    (tmp_path / "out").touch()
    return tmp_path


def test_stratovirts_way(host: Host, guest: Path, place: Path, tap: str) -> None:
    """Started, frozen by migrate, ended; and restored by the same command line and -incoming."""
    line = [
        *("run", "--", "-machine", "microvm,accel=kvm", "-kernel", str(guest), "-smp", "1", "-m", "64"),
        *("-append", CMDLINE),
        *("-drive", "file=rootfs.img,id=rootfs,readonly=off,direct=off"),
        *("-device", "virtio-blk-device,drive=rootfs,id=rootfs"),
        *("-netdev", f"tap,id=net0,ifname={tap}"),
        *("-device", "virtio-net-device,netdev=net0,id=net0,mac=52:54:00:12:34:56"),
        *("-device", "virtio-serial-device", "-chardev", "socket,path=console.sock,id=console0,server,nowait"),
        *("-device", "virtconsole,chardev=console0,id=console0"),
        *("-object", "rng-random,id=objrng0,filename=/dev/random"),
        *("-device", "virtio-rng-device,rng=objrng0,max-bytes=1234,period=1000"),
        *("-qmp", "unix:vm.sock,server,nowait", "-serial", "socket,path=serial.sock,server,nowait"),
        *("-daemonize", "-pidfile", "vm.pid", "-D", "vm.log"),
    ]
    assert host.vmmctl(*line).stdout == ""
    [name] = host.names()
    pid = int((place / "vm.pid").read_text())
    assert pid == host.pid(name, "core")
    assert Path(f"/proc/{pid}/cmdline").read_bytes().startswith(f"motorcade: core ({name})".encode())
    assert hear(place / "serial.sock", b"hello\n") == b"hello\n"
    with socket.socket(socket.AF_UNIX) as console:
        console.connect(str(place / "console.sock"))
    processes = host.live_pids(name)
    with Raw(place / "vm.sock") as qmp:
        assert [b["device"] for b in qmp("query-block")] == ["rootfs"]
        assert qmp("stop") == {}
        assert qmp.migrate(f"file:{place}/template")["status"] == "completed"
        assert qmp("quit") == {}
    gone(processes)
    assert not (place / "vm.pid").exists()
    logged = [json.loads(text) for text in (place / "vm.log").read_text().splitlines()]
    assert {"core", "supervisor"} <= {entry["role"] for entry in logged}
    done = host.vmmctl(*line, "-incoming", "file:template")
    assert f"disk rootfs goes on from {place}/template" in done.stderr
    assert host.names() == [name]  # no -name: the same line gives the same one
    assert hear(place / "serial.sock", b"more\n", b"abc").endswith(b"abcmore\n")
    with Raw(place / "vm.sock") as qmp:
        assert qmp("query-status")["status"] == "running"
        qmp("system_powerdown")
    gone([int((place / "vm.pid").read_text()), *host.live_pids(name)])
    host.wait_for("the end", lambda: not host.names())
    assert host.state(name)["ended"]["reason"] == "guest-shutdown"
    assert not (place / "vm.pid").exists()
    assert sorted(p.name for p in place.iterdir()) == ["out", "rootfs.img", "template", "vm.log"]
    # Its writes to be kept, or to a copy of the disk that is the user's own.
    (place / "overlays").mkdir()
    (place / "copy.img").write_bytes((place / "rootfs.img").read_bytes())
    copied = [word.replace("file=rootfs.img", "file=copy.img") for word in line]
    for words in (["run", "--keep-overlays", "overlays", *line[1:]], copied):
        done = host.vmmctl(*words, "-incoming", "file:template", "-S")
        assert "forgotten" not in done.stderr
        with Raw(place / "vm.sock") as qmp:
            assert qmp("query-status")["status"] == "paused"
            [disk] = qmp("query-block")
            file = "copy.img" if words is copied else f"{name}-rootfs.overlay"
            assert disk["inserted"]["file"].endswith(file)
            pids = host.live_pids(host.names()[0])
            qmp("quit")
        gone(pids)
    assert [p.name for p in (place / "overlays").iterdir()] == [f"{name}-rootfs.overlay"]


def kvm(guest: Path, *more: str, cmdline: str = CMDLINE) -> list[str]:
    """The least that starts here."""
    return ["run", "-enable-kvm", "-m", "16", "-kernel", str(guest), "-append", cmdline, *more]


def test_in_the_foreground_on_pipes(host: Host, guest: Path, place: Path) -> None:
    with host.running(*kvm(guest, "-serial", "stdio"), stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"abc")
        process.stdin.flush()
        said = b""
        while b"more" not in said:
            some = os.read(process.stdout.fileno(), 4096)
            assert some, said
            said += some
        process.send_signal(signal.SIGTERM)  # the power button
        assert process.wait(timeout=DEADLINE) == 0
    assert said.replace(b"\r\n", b"\n").startswith(b"hello\nabcmore")
    assert host.names() == []


def test_without_a_console_it_just_runs(host: Host, guest: Path, place: Path) -> None:
    line = kvm(guest, "-serial", "file:out", "-name", "web", cmdline="irq=9 print=hello await=1 out=1540:52")
    with host.running(*line) as process:
        host.wait_for("the guest's words", lambda: b"hello" in (place / "out").read_bytes())
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=DEADLINE)
        assert process.returncode == 0, err
    assert out == b""
    assert (place / "out").read_bytes().startswith(b"hello")


def test_a_disk_that_comes_later(host: Host, guest: Path, place: Path) -> None:
    """Its path starts where the command was typed."""
    host.vmmctl(*kvm(guest, "-S", "-daemonize", "-name", "web", "-qmp", "unix:q,server,nowait"))
    assert host.state("web")["config"] == f"{place}/vmmctl run"
    with Raw(place / "q") as qmp:
        qmp("blockdev-add", **{"node-name": "d", "driver": "raw", "file": {"driver": "file", "filename": "rootfs.img"}})
        qmp("device_add", id="d", driver="virtio-blk-mmio", drive="d", addr="0x1")
        assert [disk["inserted"]["file"] for disk in qmp("query-block")] == [f"{place}/rootfs.img"]
        pids = host.live_pids("web")
        qmp("quit")
    gone(pids)


def test_paused_until_cont(host: Host, guest: Path, place: Path) -> None:
    host.vmmctl(*kvm(guest, "-S", "-daemonize", "-serial", "file:out", "-qmp", "unix:q,server=on,wait=off"))
    with Raw(place / "q") as qmp:
        assert qmp("query-status")["status"] == "prelaunch"
        qmp("cont")
        host.wait_for("the guest's words", lambda: b"hello" in (place / "out").read_bytes())
        qmp("quit")
    host.wait_for("the end", lambda: not host.names())


def test_sigterm_to_the_pid_in_the_pidfile_ends_it_in_good_order(host: Host, guest: Path, place: Path) -> None:
    host.vmmctl(*kvm(guest, "-daemonize", "-pidfile", "p", "-name", "web"))
    pids = host.live_pids("web")
    os.kill(int((place / "p").read_text()), signal.SIGTERM)
    gone(pids)
    assert host.state("web")["ended"]["reason"] == "host-signal"
    assert host.state("web")["ended"]["status"] == 0
    assert not (place / "p").exists()


def test_a_pidfile_is_one_vms(host: Host, guest: Path, place: Path) -> None:
    """A killed VM's is taken over; another file in its place is left alone."""
    host.vmmctl(*kvm(guest, "-daemonize", "-pidfile", "p", "-name", "a"))
    done = host.vmmctl(*kvm(guest, "-daemonize", "-pidfile", "p", "-name", "b"), check=1)
    assert done.stderr.splitlines()[-1] == f"vmmctl: pidfile: {place}/p: another VM has it"
    assert host.names() == ["a"]
    first = (place / "p").read_text()
    assert int(first) == host.pid("a", "core")
    pids = host.live_pids("a")
    os.kill(host.pid("a", "supervisor"), signal.SIGKILL)
    gone(pids)
    assert (place / "p").read_text() == first
    host.vmmctl(*kvm(guest, "-daemonize", "-pidfile", "p", "-name", "b"))
    assert int((place / "p").read_text()) == host.pid("b", "core")
    (place / "p").unlink()
    (place / "p").write_text("mine")
    host.vmmctl("down", "--force", "b")
    host.vmmctl("down", "a")
    assert (place / "p").read_text() == "mine"


def test_a_log_that_cannot_be_written(host: Host, guest: Path, place: Path) -> None:
    done = host.vmmctl(*kvm(guest, "-daemonize", "-D", str(place)), check=1)
    assert done.stderr.splitlines()[-1] == f"vmmctl: log: {place}: Is a directory"
    done = host.vmmctl(*kvm(guest, "-daemonize", "-D", "no/log"), check=2)
    assert done.stderr == f"vmmctl: -D no/log: no such folder: {place}/no\n"
    assert host.names() == []


def test_what_is_wrong_names_the_option(host: Host, guest: Path, place: Path) -> None:
    """What the host does not have is told by the option that wants it."""
    (place / "odd.img").write_bytes(b"x")
    drives = ["-drive", "file=no.img,id=a", "-device", "virtio-blk-device,drive=a", "-drive", "file=odd.img,id=b",
              "-device", "virtio-blk-device,drive=b"]  # fmt: skip
    done = host.vmmctl(*kvm(guest, *drives, "-initrd", "none", "-qmp", "unix:no/q,server,nowait"), check=2)
    assert done.stderr.splitlines() == [
        f"vmmctl: -initrd none: no such file: {place}/none",
        f"vmmctl: -drive file=no.img,id=a: no such file: {place}/no.img",
        f"vmmctl: -drive file=odd.img,id=b: {place}/odd.img has 1 bytes, not a whole number of 512-byte sectors",
        f"vmmctl: -qmp unix:no/q,server,nowait: no such folder: {place}/no",
    ]
    host.vmmctl(*kvm(guest, "-daemonize", "-name", "web"))
    done = host.vmmctl(*kvm(guest, "-daemonize", "-name", "web"), check=1)
    assert done.stderr == "vmmctl: web is running already; -name gives this one another\n"
    host.vmmctl("down", "--force", "web")


@pytest.fixture
def state(host: Host, guest: Path, place: Path) -> Iterator[Path]:
    """A state without RAM, as x-ignore-shared writes it, and its RAM in a file; the VM is gone."""
    with contextlib.ExitStack() as stack:
        ram = Path(f"/dev/shm/mc-{os.getpid()}")
        stack.callback(lambda: ram.unlink(missing_ok=True))
        host.vmmctl(*kvm(guest, *shared(ram, True), "-daemonize", "-serial", "file:out"))
        host.wait_for("the guest's words", lambda: b"hello" in (place / "out").read_bytes())
        [name] = host.names()
        pids = host.live_pids(name)
        with Raw(place / "q") as qmp:
            qmp("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])
            assert qmp.migrate(f"file:{place}/state")["status"] == "completed"
            qmp("quit")
        gone(pids)
        yield ram


def shared(ram: Path, share: bool) -> list[str]:
    """QEMU's way to templates (and Kata's)."""
    backend = f"memory-backend-file,id=mem,mem-path={ram},size=16M,share={'on' if share else 'off'}"
    return ["-object", backend, "-machine", "microvm,memory-backend=mem", "-qmp", "unix:q,server,nowait"]


def test_ram_in_a_file_and_its_state_from_anywhere(host: Host, guest: Path, place: Path, state: Path) -> None:
    """And what does not come is told, with the reason."""
    before = state.read_bytes()
    line = kvm(guest, *shared(state, False), "-daemonize", "-serial", "unix:s,server,nowait", "-name", "again")
    for way in ("file", "exec", "fd", "defer"):
        if way == "fd":
            with open(place / "state", "rb") as file:
                command = host.command(*line, "-incoming", f"fd:{file.fileno()}")
                done = subprocess.run(
                    command,
                    env=host.env,
                    stdout=subprocess.PIPE,
                    timeout=DEADLINE,
                    pass_fds=[file.fileno()],
                    check=True,
                )
            assert done.stdout == b""
        else:
            uri = {"file": f"file:{place}/state", "exec": f"exec:cat {place}/state", "defer": "defer"}[way]
            host.vmmctl(*line, "-incoming", uri)
        pids = host.live_pids("again")
        with Raw(place / "q") as qmp:
            if way == "defer":
                assert qmp("query-status")["status"] == "inmigrate"
                qmp("migrate-incoming", uri=f"file:{place}/state")
            assert hear(place / "s", b"more\n", b"abc").endswith(b"abcmore\n")
            qmp("quit")
        gone(pids)
        assert state.read_bytes() == before
    done = host.vmmctl(*line, "-incoming", "exec:exit 3", check=1)
    assert done.stderr.endswith("vmmctl: migrate-incoming: exec:exit 3: ended with status 3\n")
    host.wait_for("the end", lambda: not host.names())
    done = host.vmmctl(*line, "-incoming", "fd:999", check=2)
    assert done.stderr == "vmmctl: -incoming fd:999: no such descriptor was inherited\n"
    done = host.vmmctl(*line, "-smp", "2", "-incoming", f"file:{place}/state", check=2)
    assert done.stderr == f"vmmctl: -smp 2: 2, but the template {place}/state was made with 1\n"
    assert host.names() == []


def test_memory_that_is_set_aside(host: Host, guest: Path, place: Path) -> None:
    """-mem-prealloc: all of it is there before the guest runs."""
    with contextlib.ExitStack() as stack:
        ram = Path(f"/dev/shm/mc-{os.getpid()}")
        stack.callback(lambda: ram.unlink(missing_ok=True))
        sizes = []
        for more in ([], ["-mem-prealloc"]):
            host.vmmctl(*kvm(guest, "-mem-path", str(ram), *more, "-daemonize", "-S", "-name", "web"))
            sizes.append(ram.stat().st_blocks * 512)
            host.vmmctl("down", "--force", "web")
        assert sizes[0] < 16 << 20
        assert sizes[1] == 16 << 20
