"""QEMU's side of the template benches: ``x-ignore-shared``, as Kata's templating does it.

The template's RAM is a file on tmpfs, mapped shared by the machine that fills it; ``migrate`` to a file writes the
devices only. A clone maps the same file privately and loads the devices with ``migrate-incoming``. Devices as ours:
microvm with a virtio disk (each clone with a temporary overlay), a virtio NIC without a peer, and the 16550.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.frozen import DEADLINE, DISK, Console, Way, cmdline

MACHINE = "microvm,pit=off,pic=off,rtc=off,isa-serial=on,memory-backend=ram"


class Monitor:
    """A QMP connection, on a socket that it owns; to QEMU or to a core of ours."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.settimeout(DEADLINE)
        self._stream = sock.makefile("rb")

    def hello(self) -> None:
        """Reads the greeting and leaves negotiation mode."""
        self._line()
        self.run("qmp_capabilities")

    def _line(self) -> dict[str, Any]:
        line = self._stream.readline()
        if not line:
            raise SystemExit("QMP: the VMM ended")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SystemExit(f"QMP: {answer['error']['desc']}")
        return answer

    def run(self, command: str, **arguments: object) -> Any:
        """Its return value; events that come before it are dropped."""
        self._sock.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            answer = self._line()
            if "return" in answer:
                return answer["return"]

    def completed(self, what: str) -> None:
        """Until a migration that was asked for has ended."""
        while (status := self._line().get("data", {}).get("status")) != "completed":
            if status in {"failed", "cancelled"}:
                raise SystemExit(f"QMP: {what}: {self.run('query-migrate').get('error-desc', status)}")

    def migrated(self, command: str, **arguments: object) -> None:
        """Runs a migration command, to its end."""
        # Its return may come before the events or after them.
        self._sock.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        self.completed(f"{command} {arguments}")

    def go_on(self) -> None:
        """Lets the guest go on after it was migrated away: QEMU is through with that a moment after it says so."""
        while self.run("query-status")["status"] != "postmigrate":
            os.sched_yield()
        self.run("cont")

    def capabilities(self) -> None:
        """As both ends of a template need them."""
        on = [{"capability": name, "state": True} for name in ("x-ignore-shared", "events")]
        self.run("migrate-set-capabilities", capabilities=on)

    def close(self) -> None:
        """Hangs up."""
        self._stream.close()
        self._sock.close()


@dataclass
class Machine:
    """A QEMU process with its monitor and its guest's console."""

    process: subprocess.Popen[bytes]
    monitor: Monitor
    console: Console


@dataclass(frozen=True)
class Template:
    """Files of a frozen guest: ``folder``/memory (tmpfs), ``folder``/state, ``folder``/disk; ``kernel``."""

    folder: Path
    memory: int
    kernel: Path

    @property
    def by_exec(self) -> str:
        """The way of the manuals."""
        return f"exec:cat {self.folder / 'state'}"


@contextlib.contextmanager
def machine(
    template: Template,
    *options: str,
    shared: bool = False,
    own: bool = False,
    line: str = "",
    inherited: tuple[int, ...] = (),
) -> Iterator[Machine]:
    """A started QEMU, killed at the end. ``shared``: its writes go to the template's memory and disk; ``own``: it has
    RAM of its own, and the template only a disk.

    ``line``: another command line for the guest; ``inherited``: descriptors that it gets, by the same numbers.
    """
    ours, monitor = socket.socketpair()
    console, serial = socket.socketpair()
    folder = template.folder
    file = f"memory-backend-file,mem-path={folder / 'memory'},share={'on' if shared else 'off'}"
    command = [
        "qemu-system-x86_64", "-M", MACHINE, "-accel", "kvm", "-m", str(template.memory >> 20),
        "-object", f"{'memory-backend-ram' if own else file},id=ram,size={template.memory}",
        "-nodefaults", "-no-user-config", "-display", "none",
        "-chardev", f"socket,id=mon,fd={monitor.fileno()}", "-mon", "chardev=mon,mode=control",
        "-chardev", f"socket,id=com1,fd={serial.fileno()}", "-serial", "chardev:com1",
        "-drive", f"id=disk,if=none,format=raw,file={folder / 'disk'},snapshot={'off' if shared else 'on'}",
        "-device", "virtio-blk-device,drive=disk",
        "-netdev", "hubport,id=net,hubid=0", "-device", "virtio-net-device,netdev=net",
        "-kernel", str(template.kernel), "-append", line or cmdline(template.memory), *options,
    ]  # fmt: skip
    env = {**os.environ, "TMPDIR": str(folder)}  # of the disk's temporary overlays
    with monitor, serial:
        fds = (monitor.fileno(), serial.fileno(), *inherited)
        process = subprocess.Popen(command, pass_fds=fds, stderr=subprocess.PIPE, env=env)
    running = Machine(process, Monitor(ours), Console(console.detach()))
    try:
        yield running
    except SystemExit as e:
        process.kill()
        said = process.communicate()[1].decode(errors="replace")
        raise SystemExit(f"{e}\n{said}") from None
    finally:
        process.kill()
        process.wait()
        if process.stderr:
            process.stderr.close()
        running.monitor.close()
        running.console.close()


def prepare(folder: Path, memory: int, kernel: Path) -> Template:
    """A template to be: ``folder`` has its disk."""
    with (folder / "disk").open("wb") as disk:
        disk.truncate(DISK)
    return Template(folder, memory, kernel)


def freeze(folder: Path, memory: int, kernel: Path, *, asleep: bool = False) -> Template:
    """Makes a template in ``folder``, which is on tmpfs. ``asleep``: its guest sleeps between questions, and does not
    beat."""
    template = prepare(folder, memory, kernel)
    with machine(template, shared=True) as source:
        source.console.until(rb"ram [0-9a-f]+\n")
        source.console.settle(asleep=asleep)
        source.monitor.hello()
        source.monitor.capabilities()
        # Not stopped before: a clone would be as its source was.
        source.monitor.migrated("migrate", uri=f"exec:cat>{folder / 'state'}")
    return template


@contextlib.contextmanager
def prepared(template: Template, *options: str, inherited: tuple[int, ...] = ()) -> Iterator[Machine]:
    """A process that waits for ``migrate-incoming``: what a pool of warm ones would hold."""
    with machine(template, "-incoming", "defer", *options, inherited=inherited) as m:
        m.monitor.hello()
        m.monitor.capabilities()
        yield m


def cold(template: Template) -> Way:
    """From the process's start."""

    def to_paused() -> float:
        started = time.monotonic()
        with prepared(template, "-S") as m:
            m.monitor.migrated("migrate-incoming", uri=template.by_exec)
            return time.monotonic() - started

    def to_answer() -> tuple[float, float]:
        started = time.monotonic()
        with prepared(template) as m:
            m.monitor.run("migrate-incoming", uri=template.by_exec)
            return m.console.first_and_answer(started)

    return Way(to_paused, to_answer)


def warm(template: Template, *, by_fd: bool = False) -> Way:
    """From the request to a process that is there. ``by_fd``: the state comes from a descriptor that it has already, so
    that no process is started for it."""

    @contextlib.contextmanager
    def ready(*options: str) -> Iterator[tuple[Machine, str]]:
        with (template.folder / "state").open("rb") as state:
            fd = state.fileno()
            with prepared(template, *options, inherited=(fd,)) as m:
                yield m, f"fd:{fd}" if by_fd else template.by_exec

    def to_paused() -> float:
        with ready("-S") as (m, uri):
            started = time.monotonic()
            m.monitor.migrated("migrate-incoming", uri=uri)
            return time.monotonic() - started

    def to_answer() -> tuple[float, float]:
        with ready() as (m, uri):
            started = time.monotonic()
            m.monitor.run("migrate-incoming", uri=uri)
            return m.console.first_and_answer(started)

    return Way(to_paused, to_answer)
