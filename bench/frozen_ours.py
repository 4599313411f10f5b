"""Our side of the template benches: ``vmmctl snapshot`` makes the template; the zygote is asked for clones.

A request is what ``vmmctl clone`` does once its own modules are imported: a supervisor from the zygote (prepared, where
one waits), its order, and the words that come back. "cold" is ``vmmctl up --incoming`` without any zygote.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import sides
from bench.frozen import DEADLINE, DISK, Console, Way, cmdline
from bench.frozen_qemu import Monitor
from motorcade.orchestrator import daemon, lifeline, pool, restore, zygoteclient

GUEST = "memfd:motorcade-guest-memory"  # its mappings' name
UART = "ttyS0"
WORKING_SET = "working-set"


class Host:
    """A run directory of the bench's own, with vmmctl bound to it. A context manager, which ends its zygote."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="mc-bench-", dir="/tmp"))
        self.run = self.path / "run"
        self.run.mkdir(mode=0o700)
        self.env = {**os.environ, "MOTORCADE_RUN_DIR": str(self.run), "PYTHONPATH": str(sides.REPO)}

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        if (self.run / "zygote.sock").exists():
            self.vmmctl("zygote", "stop")
        shutil.rmtree(self.path)

    def start_zygote(self) -> None:
        """Starts one, which requests of this process go to from now on."""
        os.environ.update(self.env)
        zygoteclient.start().close()

    def command(self, *args: str) -> list[str]:
        """vmmctl's command line."""
        return [sys.executable, "-m", "motorcade.orchestrator.cli", *args]

    def vmmctl(self, *args: str) -> str:
        """Runs it to its end; its output. SystemExit with what it said where it fails."""
        done = subprocess.run(self.command(*args), env=self.env, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise SystemExit(f"vmmctl {' '.join(args)}: status {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def console(self, name: str) -> Console:
        """Of a running VM."""
        return Console.connect(str(self.run / name / f"console-{UART}.sock"))

    @contextlib.contextmanager
    def monitor(self, name: str) -> Iterator[Monitor]:
        """QMP of a running VM."""
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.run / name / "qmp.sock"))
        monitor = Monitor(sock)
        try:
            monitor.hello()
            yield monitor
        finally:
            monitor.close()

    @contextlib.contextmanager
    def source(self, folder: Path, memory: int, kernel: Path, line: str = "") -> Iterator[Console]:
        """The machine ``source``, which fills its RAM and then beats, on its console. Its disk is in ``folder``."""
        with (folder / "disk").open("wb") as disk:
            disk.truncate(DISK)
        machine = {
            "name": "source",
            "memory": memory,
            "accel": "kvm",
            "kernel": {"image": str(kernel), "cmdline": line or cmdline(memory)},
            "disks": [{"id": "disk", "path": str(folder / "disk")}],
            "nets": [{"id": "net", "unplugged": True}],
        }
        file = folder / "machine.yaml"
        file.write_text(json.dumps(machine))
        self.vmmctl("up", "-d", str(file))
        console = self.console("source")
        try:
            console.until(rb"ram [0-9a-f]+\n")
            yield console
        finally:
            console.close()
            self.vmmctl("down", "--force", "source")


@dataclass
class Clone:
    """A machine that was asked for. Owns ``line`` and the console."""

    name: str
    pid: int
    line: socket.socket
    console: Console | None = None
    processes: list[dict[str, Any]] | None = None

    def hear(self, event: str) -> dict[str, Any]:
        """The supervisor's words up to ``event``; the console is joined as soon as it can be."""
        while True:
            message = lifeline.receive(self.line)
            if message is None or message["event"] in {"failed", "ended"}:
                raise SystemExit(f"{self.name} did not start: {message}")
            if message["event"] == "started":
                self.processes = message["processes"]
                self.console = Console.connect(message["console"])
            if message["event"] == event:
                return message

    @property
    def joined(self) -> Console:
        """Its console; it has to be "started"."""
        assert self.console is not None
        return self.console

    def pids(self) -> list[int]:
        """Of its processes."""
        return [self.pid, *(process["pid"] for process in self.processes or [])]

    def end(self) -> None:
        """Ends it, and returns when its supervisor is gone."""
        pidfd = lifeline.pidfd(self.line, self.pid)
        if self.console is not None:
            self.console.close()
        self.line.close()  # without the tie a supervisor ends its VM
        if pidfd is not None:
            gone = select.select([pidfd], [], [], DEADLINE)[0]
            os.close(pidfd)
            if not gone:
                raise SystemExit(f"{self.name} does not end")


class Template:
    """A frozen machine in ``folder``, as read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plan = restore.read(folder)
        self._count = 0
        self.old = 0  # bytes that a clone's console shows first; ``learn`` looks

    @property
    def shape(self) -> dict[str, Any]:
        """For the zygote's pool."""
        return pool.shape(self.plan.machine, pager=True)

    def request(self, *, paused: bool = False) -> Clone:
        """Asks for one clone, whose name is new."""
        self._count += 1
        machine = restore.renamed(self.plan.machine, name=f"c{self._count}", accel=None)
        incoming = restore.incoming(machine, self.plan, generation_id=os.urandom(restore.GENERATION_ID))
        pid, line = daemon.fork(self.shape)
        clone = Clone(machine.name, pid, line)
        daemon.start(line, daemon.Order(machine, str(self.folder), "kvm", paused, incoming))
        return clone

    def learn(self) -> None:
        """Sees how much its consoles show of the time before. Lets the zygote's pool see what it is to have ready, and
        waits until it has."""
        with ended(self.request(paused=True)) as clone:
            clone.hear("running")
            self.old = clone.joined.drain()
        self.wait_for_pool(zygoteclient.POOL)

    def record_working_set(self, use: Callable[[Console], object]) -> None:
        """Has a clone used, and waits until the template has its working set, and not another one's."""
        path = self.folder / WORKING_SET
        path.unlink(missing_ok=True)
        with ended(self.request()) as clone:
            clone.hear("running")
            use(clone.joined)
            end = time.monotonic() + DEADLINE
            while not path.exists():
                if time.monotonic() > end:
                    raise SystemExit(f"no {path} was recorded")
                time.sleep(0.01)

    def forget_working_set(self) -> None:
        """What the first clone, whichever that was, left in the template."""
        (self.folder / WORKING_SET).unlink(missing_ok=True)

    def wait_for_pool(self, spares: int) -> None:
        """Until the zygote has that many prepared VMs."""
        end = time.monotonic() + DEADLINE
        while True:
            zygote = zygoteclient.find()
            if zygote is None:
                raise SystemExit("the zygote is gone")
            with zygote:
                status = zygote.ask({"do": "status"})
            if any(shelf["ready"] >= spares for shelf in status["pool"]):
                return
            if time.monotonic() > end:
                raise SystemExit(f"the pool does not fill: {status}")
            time.sleep(4 * pool.QUIET)  # it tells nobody, and prepares VMs only while it is left alone


def freeze(host: Host, folder: Path, memory: int, kernel: Path, *, asleep: bool = False) -> Template:
    """Makes a template in ``folder``/template. ``asleep``: its guest sleeps between questions, and does not beat."""
    with host.source(folder, memory, kernel) as console:
        console.settle(asleep=asleep)
        host.vmmctl("snapshot", "source", str(folder / "template"))
    return Template(folder / "template")


def zygote_pid() -> int:
    """Of the zygote that runs."""
    zygote = zygoteclient.find()
    if zygote is None:
        raise SystemExit("the zygote is gone")
    with zygote:
        return int(zygote.ask({"do": "status"})["pid"])


@contextlib.contextmanager
def ended(clone: Clone) -> Iterator[Clone]:
    """The clone, which is ended then."""
    try:
        yield clone
    finally:
        clone.end()


def warm(template: Template) -> Way:
    """From the request to a zygote with prepared VMs."""
    template.learn()

    def to_paused() -> float:
        template.wait_for_pool(zygoteclient.POOL)  # none is being prepared meanwhile, as no QEMU is
        started = time.monotonic()
        with ended(template.request(paused=True)) as clone:
            clone.hear("running")
            return time.monotonic() - started

    def to_answer() -> tuple[float, float]:
        template.wait_for_pool(zygoteclient.POOL)  # none is being prepared meanwhile, as no QEMU is
        started = time.monotonic()
        with ended(template.request()) as clone:
            clone.hear("started")
            return clone.joined.first_and_answer(started, template.old)

    return Way(to_paused, to_answer)


def cold(host: Host, template: Template) -> Way:
    """From ``vmmctl up --incoming``, where no zygote is."""
    uri = f"file:{template.folder}"

    def to_paused() -> float:
        started = time.monotonic()
        host.vmmctl("up", "-d", "--paused", "--name", "cold", "--incoming", uri)
        elapsed = time.monotonic() - started
        host.vmmctl("down", "--force", "cold")
        return elapsed

    def to_answer() -> tuple[float, float]:
        ours, theirs = socket.socketpair()
        started = time.monotonic()
        command = host.command("up", "--name", "cold", "--incoming", uri)
        with subprocess.Popen(command, env=host.env, stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL) as process:
            theirs.close()
            console = Console(ours.detach())
            try:
                return console.first_and_answer(started, template.old)
            finally:
                console.close()
                host.vmmctl("down", "--force", "cold")
                process.wait(DEADLINE)

    return Way(to_paused, to_answer)
