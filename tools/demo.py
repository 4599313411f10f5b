"""``make demo``: boots an unmodified Debian kernel by ``vmmctl up`` and checks what is seen from inside it.

Everything goes through the commands that a user has. Where this host's KVM cannot boot a stock kernel the
machine runs in the box, and so do ping and the TCP transfer. Ends with a table; the exit status is 1 if any
check failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from harness import images  # noqa: E402
from harness.agent import Agent, AgentError  # noqa: E402
from motorcade.orchestrator import accel, rundir  # noqa: E402
from motorcade.orchestrator.box.session import run as run_in_box  # noqa: E402
from motorcade.orchestrator.box.vm import BoxError, ensure_box, find_box, stop_box  # noqa: E402

CPUS = 2
MIB = 1 << 20
BOOT_TIMEOUT = 180.0  # seconds; in the box, on a busy machine
_begun = time.monotonic()


class Failed(Exception):
    """A check failed, or the machine did not come up; the message says how."""


def say(text: str) -> None:
    print(f"demo: [{time.monotonic() - _begun:5.1f} s] {text}", flush=True)


def vmmctl(*args: str) -> str:
    """Runs the command as a user would; its progress goes to the terminal."""
    command = [sys.executable, "-m", "motorcade.orchestrator.cli", *args]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise Failed(f"vmmctl {' '.join(args)} ended with status {done.returncode}")
    return done.stdout


class Place:
    """Where the machine runs, and the tap's other end is: this host, or the box."""

    def __init__(self) -> None:
        choice = accel.choose("auto")
        self.in_box = choice.name == "box"
        self.reason = choice.reason
        self.started_box = self.in_box and find_box() is None

    def prepare(self) -> None:
        if self.in_box:
            self.box = ensure_box(say)

    def sh(self, script: str) -> str:
        """Runs a shell script there; its output. Raises Failed where it fails."""
        output = bytearray()
        if self.in_box:
            with open(os.devnull, "rb") as null:
                argv = ["sh", "-ec", script]
                status = run_in_box(self.box, argv, cwd=ROOT, stdin=null.fileno(), out=output.extend, err=output.extend)
        else:
            done = subprocess.run(
                ["sh", "-ec", script], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            status, output = done.returncode, bytearray(done.stdout)
        if status:
            raise Failed(f"{script!r} ended with status {status}: {output.decode(errors='replace').strip()}")
        return output.decode()

    def leave(self) -> None:
        if self.started_box:
            stop_box()


class Demo:
    """One machine, from its files to its end."""

    def __init__(self, folder: Path, place: Place) -> None:
        self.folder, self.place = folder, place
        self.name = f"demo-{os.getpid()}"
        self.tap = f"mcd{os.getpid() % 100_000_000}"
        self.subnet = f"10.77.{os.getpid() % 250}"
        self.rows: list[tuple[str, str, bool]] = []

    # Set-up.

    def write_files(self) -> None:
        kernel = images.kernel()
        images.copy_rootfs(self.folder / "root.img")
        (self.folder / "data.img").write_bytes(os.urandom(8 * MIB))
        (self.folder / "machine.yaml").write_text(
            f"""\
name: {self.name}
cpus: {CPUS}
memory: 512M
kernel:
  image: {kernel.image}
  initrd: {images.initrd()}
  cmdline: console=ttyS0 root=/dev/vda
disks:
  - {{id: root, path: root.img}}
  - {{id: data, path: data.img, readonly: true}}
nets:
  - {{id: lan, tap: {self.tap}}}
consoles:
  - {{id: ttyS0, type: uart}}
  - {{id: hvc0, type: virtio}}
"""
        )

    @contextlib.contextmanager
    def network(self) -> Iterator[None]:
        """The tap, with this side's address."""
        self.place.sh(
            f"ip tuntap add dev {self.tap} mode tap && ip addr add {self.subnet}.1/24 dev {self.tap}"
            f" && ip link set {self.tap} up"
        )
        try:
            yield
        finally:
            self.place.sh(f"ip link del {self.tap}")

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The machine, up; ended by force if a check raises."""
        vmmctl("up", "-d", str(self.folder / "machine.yaml"))
        say(f"vmmctl up: {self.name} runs; waiting for its first word")
        self.run_dir = rundir.root() / self.name
        try:
            self.consoles = {name: Agent.connect(self.run_dir / f"console-{name}.sock") for name in ("ttyS0", "hvc0")}
            try:
                yield
            finally:
                for console in self.consoles.values():
                    console.close()
        finally:
            if (vm := rundir.find(self.name)) is not None and vm.alive:
                vmmctl("down", "--force", self.name)

    # Checks. Each adds a row; one that does not hold makes the demo fail, but the others still run.

    def note(self, what: str, seen: str, good: bool) -> None:
        self.rows.append((what, seen, good))
        say(f"{'ok' if good else 'FAILED'}: {what}: {seen}")

    def attempt(self, what: str, check: Callable[[], tuple[str, bool]]) -> None:
        try:
            self.note(what, *check())
        except (Failed, AgentError, OSError) as error:
            self.note(what, str(error).splitlines()[0][:120], False)

    def guest(self, command: str, timeout: float = 120.0) -> str:
        return self.consoles["ttyS0"].check(command, timeout)

    def check_kernel(self) -> tuple[str, bool]:
        uname = self.guest("uname -a")
        return uname, images.kernel().release in uname and "Debian" in uname

    def check_cpus(self) -> tuple[str, bool]:
        model = self.guest("grep -m1 'model name' /proc/cpuinfo").partition(": ")[2]
        count = int(self.guest("nproc"))
        return f"{count} x {model}", count == CPUS

    def check_disk(self) -> tuple[str, bool]:
        here = hashlib.sha256((self.folder / "data.img").read_bytes()).hexdigest()
        there = self.guest("sha256sum /dev/vdb").split()[0]
        return f"{there[:16]}... in the guest, {here[:16]}... on the host", here == there

    def check_reboot(self) -> tuple[str, bool]:
        word = os.urandom(8).hex()
        first = self.guest("cat /proc/sys/kernel/random/boot_id")
        self.guest(f"echo {word} > /kept && sync")
        self.consoles["ttyS0"].send("reboot")
        for console in self.consoles.values():
            console.wait_ready(BOOT_TIMEOUT)
        second = self.guest("cat /proc/sys/kernel/random/boot_id")
        read = self.guest("cat /kept")
        return f"wrote {word}, rebooted, read {read}", read == word and first != second

    def set_up_nic(self) -> tuple[str, bool]:
        self.guest(f"ip addr add {self.subnet}.2/24 dev eth0 && ip link set eth0 up")
        mac = self.guest("cat /sys/class/net/eth0/address")
        return f"eth0 {mac} {self.subnet}.2", True

    def check_ping(self) -> tuple[str, bool]:
        output = self.place.sh(f"ping -c 3 -i 0.2 -W 20 {self.subnet}.2")
        times = [line.rpartition("time=")[2] for line in output.splitlines() if "time=" in line]
        return f"3 sent, {len(times)} answered ({', '.join(times)})", len(times) == 3

    def check_tcp(self) -> tuple[str, bool]:
        """A file each way; the sums are made by the receivers."""
        payload = self.folder / "payload"
        payload.write_bytes(os.urandom(2 * MIB))
        sent = hashlib.sha256(payload.read_bytes()).hexdigest()
        # Both ends are in the background: a command on the console returns only when it is done.
        self.guest("(nc -l -p 5000 > /tmp/received; echo done > /tmp/state) > /dev/null 2>&1 &")
        self.await_listener()
        source = self.folder / "payload"
        if self.place.in_box:
            # The box sees this folder as it is now, below its mount of the host's tree.
            source = Path(f"/run/box/live{source}")
        self.place.sh(f"socat -u {shlex.quote(f'OPEN:{source},rdonly')} TCP:{self.subnet}.2:5000")
        self.wait_in_guest("[ -e /tmp/state ]")
        received = self.guest("sha256sum /tmp/received").split()[0]
        self.guest("rm /tmp/state; (nc -l -p 5000 < /tmp/received > /dev/null 2>&1 &)")
        self.await_listener()
        back = self.place.sh(f"socat -u TCP:{self.subnet}.2:5000 STDOUT | sha256sum").split()[0]
        seen = f"2 MiB sent: {sent[:12]}..., received: {received[:12]}..., sent back: {back[:12]}..."
        return seen, sent == received == back

    def await_listener(self) -> None:
        self.wait_in_guest("netstat -ltn | grep -q :5000")

    def wait_in_guest(self, condition: str) -> None:
        """For what the guest's shell has no event for: looks ten times a second, a minute long."""
        self.guest(f"n=0; until {condition}; do usleep 100000; n=$((n+1)); [ $n -lt 600 ] || exit 1; done")

    def check_console(self, name: str) -> tuple[str, bool]:
        word = os.urandom(6).hex()
        line = self.consoles[name].check(f"echo {word} from $(uname -r)")
        return line, line == f"{word} from {images.kernel().release}"

    def check_qmp(self) -> tuple[str, bool]:
        from qemu.qmp import QMPClient

        async def ask() -> tuple[str, bool]:
            client = QMPClient(self.name)
            await asyncio.wait_for(client.connect(str(self.run_dir / "qmp.sock")), 30)
            try:
                answers = {c: await client.execute(c) for c in ("query-status", "query-cpus-fast", "query-name")}
                blocks = await client.execute("query-block")
            finally:
                await client.disconnect()
            status, cpus, name = (answers[c] for c in ("query-status", "query-cpus-fast", "query-name"))
            assert isinstance(status, dict) and isinstance(name, dict)
            assert isinstance(cpus, list) and isinstance(blocks, list)
            seen = f"{name['name']}: {status['status']}, {len(cpus)} CPUs, {len(blocks)} disks"
            good = status["running"] is True and len(cpus) == CPUS and len(blocks) == 2 and name["name"] == self.name
            return seen, good

        return asyncio.run(ask())

    def check_power_off(self) -> tuple[str, bool]:
        vmmctl("down", self.name)
        vm = rundir.find(self.name)
        ended = vm.state.get("ended", {}) if vm is not None and not vm.alive else {}
        return f"{ended.get('reason')}, status {ended.get('status')}", ended.get("reason") == "guest-shutdown"

    def run(self) -> bool:
        self.write_files()
        with self.network(), self.running():
            release = self.consoles["ttyS0"].wait_ready(BOOT_TIMEOUT)
            self.consoles["hvc0"].wait_ready(BOOT_TIMEOUT)
            say(f"Linux {release} is up in the guest")
            self.attempt("kernel, said by the guest", self.check_kernel)
            self.attempt("CPUs", self.check_cpus)
            self.attempt("sha256 of disk vdb", self.check_disk)
            self.attempt("data kept over a reboot", self.check_reboot)
            self.attempt("network card", self.set_up_nic)
            self.attempt("ping over the tap", self.check_ping)
            self.attempt("TCP over the tap", self.check_tcp)
            self.attempt("line echoed on ttyS0", lambda: self.check_console("ttyS0"))
            self.attempt("line echoed on hvc0", lambda: self.check_console("hvc0"))
            self.attempt("QMP, by qemu.qmp", self.check_qmp)
            self.attempt("power button", self.check_power_off)
        return all(good for _, _, good in self.rows)


def table(rows: list[tuple[str, str, bool]]) -> str:
    width = max(len(what) for what, _, _ in rows)
    lines = [f"  {'ok  ' if good else 'FAIL'}  {what:<{width}}  {seen}" for what, seen, good in rows]
    return "\n".join(["", "Seen from inside the guest:", "", *lines, ""])


def main() -> int:
    """0 if everything that was promised was seen."""
    folder = Path(tempfile.mkdtemp(prefix="motorcade-demo-"))
    place = Place()
    if place.reason:
        say(f"{place.reason}; the machine runs in the box")
    demo = Demo(folder, place)
    try:
        place.prepare()
        good = demo.run()
    except (Failed, AgentError, BoxError) as error:
        say(f"FAILED: {error}")
        good = False
    finally:
        place.leave()
        shutil.rmtree(folder)
    if demo.rows:
        print(table(demo.rows))
    say("all seen" if good else "not everything was as it should be")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
