"""vmmctl and whole VMs on bare KVM: a micro-guest, the real core, the real sidecars."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from harness.vmmctl import Host, gone, write_machine
from motorcade.orchestrator import resources, rundir
from motorcade.orchestrator.errors import UserError
from motorcade.orchestrator.qmpclient import QmpClient

pytestmark = pytest.mark.kvm

POWER_OFF = "out=1540:52"  # to the ACPI sleep control register (core/pm.py)
WAIT_FOR_BUTTON = "irq=9 await=1"  # the ACPI event device's line


def test_a_guest_that_powers_off(host: Host, guest: Path, tmp_path: Path) -> None:
    """Its first and last words arrive however short its life, the status is 0, nothing is left."""
    file = write_machine(tmp_path, "web", guest, cmdline=f"print=hello_there {POWER_OFF}")
    done = host.vmmctl("up", str(file))
    assert done.stdout.replace("\r", "") == "hello there\n"
    assert done.stderr == ""
    assert host.names() == []
    assert "guest-shutdown, exit status 0" in host.vmmctl("status", "web").stdout


def test_a_guest_that_breaks(host: Host, guest: Path, tmp_path: Path) -> None:
    done = host.vmmctl("up", str(write_machine(tmp_path, "web", guest, cmdline="print=hello fault")), check=1)
    assert "hello" in done.stdout
    assert "web ended: triple-fault" in done.stderr
    assert "rip=" in done.stderr
    assert host.names() == []


def test_up_and_down(host: Host, guest: Path, tmp_path: Path) -> None:
    file = write_machine(
        tmp_path, "web", guest, cpus=2, cmdline=f"print=hello {WAIT_FOR_BUTTON} {POWER_OFF}", qmp=["unix:extra.sock"],
        consoles=[{"id": "hvc0", "backend": "pty"}, {"id": "file", "backend": {"file": "out.txt"}}],
    )  # fmt: skip
    assert "vmmctl console web attaches" in host.vmmctl("up", "-d", str(file)).stdout
    assert "web   running" in host.vmmctl("ps").stdout
    state = json.loads(host.vmmctl("status", "--json", "web").stdout)
    assert (state["alive"], state["machine"]["cpus"], state["accel"]) == (True, 2, "kvm")
    assert [(d["id"], d["slot"]) for d in state["devices"]] == [("ttyS0", None), ("hvc0", 32), ("file", 33)]
    assert [p["role"] for p in state["processes"]] == ["core", "serial-ttyS0", "serial-hvc0", "serial-file"]
    assert all(p["state"] == "running" for p in state["processes"])
    sidecars = json.loads(host.vmmctl("sidecar", "ls", "web", "--json").stdout)
    assert [s["device"] for s in sidecars] == ["ttyS0", "hvc0", "file"]
    assert (host.run_dir / "web" / "pty-hvc0").readlink().is_relative_to("/dev/pts")
    assert json.loads(host.vmmctl("qmp", "web", "query-status").stdout)["status"] == "running"
    assert json.loads(host.vmmctl("qmp", "web", stdin="query-name\n").stdout)["name"] == "web"
    with QmpClient(tmp_path / "extra.sock") as qmp:
        assert qmp.execute("query-status")["running"] is True
    for path in (host.run_dir / "web" / "qmp.sock", tmp_path / "extra.sock"):
        assert path.stat().st_mode & 0o777 == 0o600
    done = host.vmmctl("up", str(file), check=1)
    assert "web is running already" in done.stderr
    assert "no log of nobody (there are: core, serial-file" in host.vmmctl("logs", "web", "nobody", check=3).stderr
    host.vmmctl("down", "web")
    assert host.names() == []
    assert not (tmp_path / "extra.sock").exists()
    assert host.live_pids("web") == []
    host.vmmctl("up", "-d", str(file))
    host.vmmctl("down", "web")


def test_down_of_a_guest_that_does_not_listen(host: Host, guest: Path, tmp_path: Path) -> None:
    file = write_machine(tmp_path, "web", guest)
    host.vmmctl("up", "-d", str(file))
    done = host.vmmctl("down", "--timeout", "0.2", "web", check=4)
    assert "did not power off within 0.2 s" in done.stderr
    host.vmmctl("up", "-d", str(file))
    host.vmmctl("down", "--force", "web")
    assert host.names() == []


def test_paused(host: Host, guest: Path, tmp_path: Path) -> None:
    host.vmmctl("up", "-d", "--paused", str(write_machine(tmp_path, "web", guest, cmdline=f"print=x {POWER_OFF}")))
    assert json.loads(host.vmmctl("qmp", "web", "query-status").stdout)["running"] is False
    pid = host.pid("web", "supervisor")
    host.vmmctl("qmp", "web", "cont")
    gone([pid])
    assert host.state("web")["ended"]["reason"] == "guest-shutdown"


def test_a_late_console_sees_the_boot(host: Host, guest: Path, tmp_path: Path) -> None:
    host.vmmctl("up", "-d", str(write_machine(tmp_path, "web", guest, cmdline="print=hello echo=3 " + POWER_OFF)))
    done = host.vmmctl("console", "web", stdin="abc")  # ends with the VM
    assert done.stdout.replace("\r", "") == "hello\nabc"
    assert "has no console x" in host.vmmctl("console", "web", "x", check=3).stderr or host.names() == []
    # The console ends when its sidecar does; the supervisor has a little more to do.
    host.wait_for("the VM's end", lambda: host.names() == [])


def test_signals_press_the_power_button(host: Host, guest: Path, tmp_path: Path) -> None:
    file = write_machine(tmp_path, "web", guest, cmdline=f"irq=9 print=up await=1 print=bye {POWER_OFF}")
    with host.running("up", str(file)) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == b"up"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    assert host.names() == []


def test_in_a_terminal(host: Host, guest: Path, tmp_path: Path) -> None:
    """The processes, the console, the key that leaves, and the way back."""
    file = write_machine(tmp_path, "web", guest, cmdline=f"print=hello echo=1 print=more irq=9 await=1 {POWER_OFF}")
    terminal, ours = os.openpty()
    options = {"stdin": ours, "stdout": ours, "stderr": ours}
    with os.fdopen(terminal, "rb+", buffering=0) as master, host.running("up", str(file), **options) as process:
        os.close(ours)
        seen = b""

        def read_until(text: bytes) -> None:
            nonlocal seen
            while text not in seen:
                assert select.select([master], [], [], 60)[0], seen
                seen += master.read(4096)

        read_until(b"hello")
        for role in (b"supervisor", b"core", b"serial-ttyS0"):
            assert role in seen
        assert b"Ctrl-] leaves" in seen
        master.write(b"x")
        read_until(b"more")
        master.write(b"\x1d")
        read_until(b"vmmctl console web attaches")
        assert process.wait(timeout=60) == 0
    assert len(host.live_pids("web")) == 3, host.vmmctl("logs", "web").stdout
    host.vmmctl("down", "web")


def test_standard_input(host: Host, guest: Path, tmp_path: Path) -> None:
    file = write_machine(tmp_path, "web", guest, cmdline=POWER_OFF)
    host.vmmctl("up", "-", stdin=file.read_text())
    assert host.vmmctl("up", "-", stdin="name: 5", check=2).stderr.startswith("vmmctl: -:1:1: ")


def test_reports(host: Host, guest: Path, tmp_path: Path) -> None:
    """What stands for a VM outside the box relies on."""
    file = write_machine(tmp_path, "web", guest, cmdline=f"print=x {POWER_OFF}")
    reports = [json.loads(line) for line in host.vmmctl("up", "--report", str(file)).stdout.splitlines()]
    events = [r["event"] for r in reports if r["event"] != "progress"]
    assert events == ["started", "running", "ended"]
    failed = host.vmmctl("up", "--report", str(write_machine(tmp_path, "bad", "/etc/hostname")), check=1)
    assert json.loads(failed.stdout.splitlines()[-1])["event"] == "failed"
    with host.running("up", "--report", str(write_machine(tmp_path, "web", guest))) as process:
        assert process.stdout is not None
        while b'"running"' not in process.stdout.readline():
            pass
        process.send_signal(signal.SIGUSR1)
        assert json.loads(process.stdout.readline())["reason"] == "host-signal"
        assert process.wait(timeout=60) == 0


def test_a_second_signal_ends_it_at_once(host: Host, guest: Path, tmp_path: Path) -> None:
    with host.running("up", str(write_machine(tmp_path, "web", guest, cmdline="print=up"))) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().strip() == b"up"
        # The guest's word may be here before the core's: a VM that is not known to run yet ends with status 1.
        host.wait_for("state.json", lambda: host.state("web").get("status") == "running")
        process.send_signal(signal.SIGINT)
        assert b"powering web off" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0, process.stderr.read()
    assert host.state("web")["ended"]["reason"] == "host-signal"


def test_a_signal_to_the_supervisor_ends_the_vm(host: Host, guest: Path, tmp_path: Path) -> None:
    host.vmmctl("up", "-d", str(write_machine(tmp_path, "web", guest)))
    pids = host.live_pids("web")
    os.kill(host.pid("web", "supervisor"), signal.SIGTERM)
    gone(pids)
    assert host.state("web")["ended"] == {**host.state("web")["ended"], "status": 0, "reason": "host-signal"}


def test_reboot_can_end_it(host: Host, guest: Path, tmp_path: Path) -> None:
    reset = "print=once out=100:254"  # the keyboard controller's reset line
    done = host.vmmctl("up", str(write_machine(tmp_path, "web", guest, cmdline=reset, on_reboot="exit")), check=None)
    assert done.stdout.count("once") == 1
    assert host.state("web")["ended"]["reason"] == "guest-reset"


def test_processes_have_only_what_is_theirs(host: Host, guest: Path, tmp_path: Path) -> None:
    """Rights are descriptors: no KVM, disk or console of another's, no terminal, no socket of vmmctl's."""
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    file = write_machine(tmp_path, "web", guest, disks=[{"id": "root", "path": str(disk)}])
    host.vmmctl("up", "-d", str(file))

    def targets(role: str) -> list[str]:
        folder = Path(f"/proc/{host.pid('web', role)}/fd")
        return [str(p.readlink()) for p in folder.iterdir()]

    core, blk, serial = targets("core"), targets("blk-root"), targets("serial-ttyS0")
    assert any("kvm" in t for t in core)
    assert not any("kvm" in t for t in blk + serial)
    assert str(disk) in blk
    assert str(disk) not in core + serial
    for role in ("core", "blk-root", "serial-ttyS0"):
        status = Path(f"/proc/{host.pid('web', role)}/status").read_text()
        assert f"PPid:\t{host.pid('web', 'supervisor')}\n" in status
        title = Path(f"/proc/{host.pid('web', role)}/cmdline").read_bytes().rstrip(b"\0")
        assert title.decode() == f"motorcade: {role} (web)"
    maps = Path(f"/proc/{host.pid('web', 'supervisor')}/maps").read_text()
    assert "guest-memory" not in maps
    host.vmmctl("down", "--force", "web")


# Bad input.


def test_a_disk_in_use(host: Host, guest: Path, tmp_path: Path) -> None:
    """Whatever its name: one writer, or several readers."""
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    os.link(disk, tmp_path / "other.img")

    def machine(name: str, **disk: object) -> str:
        return str(write_machine(tmp_path, name, guest, disks=[{"id": "d", "path": "other.img", **disk}]))

    host.vmmctl("up", "-d", str(write_machine(tmp_path, "one", guest, disks=[{"id": "root", "path": "disk.img"}])))
    done = host.vmmctl("up", machine("two"), check=1)
    assert done.stderr == f"vmmctl: disk d: {tmp_path}/other.img is in use by VM one\n"
    done = host.vmmctl("up", machine("two", readonly=True), check=1)
    assert "is in use by VM one, which writes to it" in done.stderr
    assert host.names() == ["one"]
    host.vmmctl("down", "--force", "one")
    host.vmmctl("up", "-d", machine("two", readonly=True))
    host.vmmctl("up", "-d", machine("three", overlay=True))
    assert "is in use by VM t" in host.vmmctl("up", machine("four"), check=1).stderr
    for name in ("two", "three"):
        host.vmmctl("down", "--force", name)
    assert (tmp_path / "three-d.overlay").exists()


def test_an_overlay_of_another_disk(host: Host, guest: Path, tmp_path: Path) -> None:
    for name, size in (("a.img", 1 << 20), ("b.img", 2 << 20)):
        (tmp_path / name).write_bytes(bytes(size))

    def machine(image: str) -> str:
        disk = {"id": "d", "path": image, "overlay": "o"}
        return str(write_machine(tmp_path, "web", guest, disks=[disk], cmdline=POWER_OFF))

    host.vmmctl("up", machine("a.img"))
    done = host.vmmctl("up", machine("b.img"), check=1)
    assert f"disk d: overlay {tmp_path}/o over {tmp_path}/b.img: " in done.stderr
    (tmp_path / "o").write_bytes(b"no overlay")
    assert "overlay" in host.vmmctl("up", machine("a.img"), check=1).stderr
    assert host.names() == []


@pytest.mark.parametrize("content", [b"just text, not a kernel at all\n" * 100, b"\x7fELF" + bytes(2000)])
def test_a_kernel_that_is_none(host: Host, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "vmlinuz").write_bytes(content)
    done = host.vmmctl("up", str(write_machine(tmp_path, "web", "vmlinuz")), check=1)
    assert f"{tmp_path}/vmlinuz: " in done.stderr
    assert "Traceback" not in done.stderr
    assert host.names() == []


def test_an_initrd_that_does_not_fit(host: Host, guest: Path, tmp_path: Path) -> None:
    with (tmp_path / "initrd").open("wb") as f:
        f.truncate(32 << 20)
    file = write_machine(tmp_path, "web", guest, initrd="initrd")
    done = host.vmmctl("up", str(file), check=1)
    assert "initrd" in done.stderr
    assert "32 MiB" in done.stderr
    assert host.names() == []


def test_a_tap_that_does_not_exist(host: Host, guest: Path, tmp_path: Path) -> None:
    file = write_machine(tmp_path, "web", guest, nets=[{"id": "lan", "tap": "mc-none0"}])
    assert "tap mc-none0: there is no such interface" in host.vmmctl("up", str(file), check=1).stderr
    assert host.names() == []


def test_a_qmp_address_that_is_taken(host: Host, guest: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp:127.0.0.1:{taken.getsockname()[1]}"
        done = host.vmmctl("up", str(write_machine(tmp_path, "web", guest, qmp=[address])), check=1)
    assert f"qmp {address}: Address already in use" in done.stderr
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "q.sock"))
        listener.listen()
        done = host.vmmctl("up", str(write_machine(tmp_path, "web", guest, qmp=["unix:q.sock"])), check=1)
    assert "q.sock" in done.stderr
    assert (tmp_path / "q.sock").exists()
    # Nobody listens there any more: it is replaced.
    host.vmmctl("up", str(write_machine(tmp_path, "web", guest, qmp=["unix:q.sock"], cmdline=POWER_OFF)))


def test_something_else_as_kvm(host: Host, guest: Path, tmp_path: Path) -> None:
    """Another device under its name: not KVM."""
    file = write_machine(tmp_path, "web", guest)
    if os.geteuid() != 0:
        pytest.skip("hiding /dev/kvm needs root")
    script = f"mount --bind /dev/null /dev/kvm && exec {' '.join(host.command('up', str(file)))}"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], env=host.env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.startswith("vmmctl: /dev/kvm: ")


def test_no_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: object, *_: object, **__: object) -> int:
        raise FileNotFoundError(2, "No such file or directory", str(path))

    monkeypatch.setattr(os, "open", missing)
    with pytest.raises(UserError, match="there is no /dev/kvm"):
        resources.open_kvm(1)


def test_more_cpus_than_kvm_allows() -> None:
    with pytest.raises(UserError, match=r"cpus: 1000000 is more than this host's KVM allows \(\d+\)"):
        resources.open_kvm(1_000_000)


def test_many_at_once(host: Host, guest: Path, tmp_path: Path) -> None:
    """Several `up` of one name: one wins, the others say why not."""
    file = write_machine(tmp_path, "web", guest)
    results: list[subprocess.CompletedProcess[str]] = []

    def up() -> None:
        results.append(host.vmmctl("up", "-d", str(file), check=None))

    threads = [threading.Thread(target=up) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(r.returncode for r in results) == [0, 1, 1, 1]
    assert all("web is running" in r.stderr for r in results if r.returncode)
    host.vmmctl("down", "--force", "web")
    assert rundir.read_state(host.run_dir / ".ended" / "web")["status"] == "ended"
