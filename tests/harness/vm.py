"""A whole VM in a test, its supervisor forked from the test's own process: no Python start of its own.

In the box a fresh Python takes seconds; forking takes milliseconds. What is started is the real thing: the
supervisor, the core and the sidecars, from a machine.yaml.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from harness.agent import Agent
from motorcade.orchestrator import config, daemon, hostcheck, lifeline, restore
from motorcade.orchestrator.frozendisks import Incoming
from motorcade.orchestrator.qmpclient import QmpClient

DEADLINE = 120.0  # seconds, for anything


class Vm:
    """A running VM. Owns the lifeline: the VM ends with this object at the latest."""

    def __init__(
        self,
        folder: Path,
        run_dir: Path,
        machine: dict[str, Any],
        *,
        paused: bool = False,
        template: Path | None = None,
        generation_id: bytes = b"",
        defer: bool = False,
    ) -> None:
        """Starts it and returns when its vCPUs may run. ``machine``: what machine.yaml would say; ``template``: it goes
        on from there; ``defer``: from one that migrate-incoming is to name."""
        file = folder / f"{machine['name']}.yaml"
        file.write_text(json.dumps(machine))
        parsed, source = config.load(str(file))
        incoming = Incoming(generation_id=generation_id) if defer else None
        if template is not None:
            plan = restore.read(template)
            restore.check(parsed, source, plan)
            incoming = restore.incoming(parsed, plan, generation_id=generation_id)
        hostcheck.check(parsed, source, incoming)
        self.name = parsed.name
        self.run_dir = run_dir / self.name
        daemon.preload()  # once, here: a fork then has it all
        with _as_outside_pytest():
            self.pid, self.line = daemon.fork()
        daemon.start(self.line, daemon.Order(parsed, str(file), "kvm", paused, incoming))
        self._reaped = False
        self._agents: list[Agent] = []
        try:
            self.started = self.await_event("started")
            self.await_event("running")
        except BaseException:
            self.close()
            raise

    def await_event(
        self, event: str, timeout: float = DEADLINE, *, passing: Collection[str] = ("progress",)
    ) -> dict[str, Any]:
        """The supervisor's next message of this kind; others but ``passing`` fail the test."""
        end = time.monotonic() + timeout
        while True:
            self.line.settimeout(max(0.001, end - time.monotonic()))
            message = lifeline.receive(self.line)
            assert message is not None, f"the supervisor went away before {event}"
            if message["event"] == event:
                return message
            assert message["event"] in passing, message

    def console(self, device: str = "ttyS0") -> Agent:
        """The agent in the guest on this console; closed with the VM."""
        agent = Agent.connect(self.run_dir / f"console-{device}.sock")
        self._agents.append(agent)
        return agent

    def qmp(self) -> QmpClient:
        """A new QMP connection."""
        return QmpClient(self.run_dir / "qmp.sock", timeout=DEADLINE)

    def attach(self, device: str = "ttyS0") -> socket.socket:
        """A new connection to this console, the caller's."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(DEADLINE)
        sock.connect(str(self.run_dir / f"console-{device}.sock"))
        return sock

    def snapshot(self, target: Path, **options: Any) -> dict[str, Any]:
        """Takes one (x-motorcade-snapshot) and waits for its end; what query-migrate says then."""
        with self.qmp() as qmp:
            qmp.execute("x-motorcade-snapshot", {"dir": str(target), **options})
            return self.await_snapshot(qmp)

    def await_snapshot(self, qmp: QmpClient) -> dict[str, Any]:
        """What query-migrate says when it is over."""
        end = time.monotonic() + DEADLINE
        while (info := qmp.execute("query-migrate"))["status"] in ("setup", "active"):
            assert time.monotonic() < end, info
            time.sleep(0.002)  # its events are tested elsewhere
        return dict(info)

    def sidecar_pid(self, device: str) -> int:
        """Of a device's sidecar."""
        return next(int(p["pid"]) for p in self.started["processes"] if p["device"] == device)

    def logs(self) -> str:
        """What its processes said."""
        return "".join(p.read_text() for p in sorted((self.run_dir / "log").glob("*.log")))

    def tell(self) -> None:
        """Prints what is known of one that was not waited for: pytest shows it where the test failed."""
        if self._reaped:
            return
        print(f"--- {self.name}: processes at the start: {self.started['processes']}")
        print(self.logs())
        self.line.setblocking(False)
        with contextlib.suppress(BlockingIOError, OSError):
            while message := lifeline.receive(self.line):
                print(f"--- {self.name}: {message}")

    def wait_end(self, timeout: float = DEADLINE, *, passing: Collection[str] = ("progress",)) -> dict[str, Any]:
        """How it ended; its supervisor is gone when this returns."""
        ended = self.await_event("ended", timeout, passing=passing)
        os.waitpid(self.pid, 0)
        self._reaped = True
        return ended

    def close(self) -> None:
        """Ends it, if it has not ended."""
        for agent in self._agents:
            agent.close()
        if self.line.fileno() < 0:
            return
        self.line.shutdown(socket.SHUT_RDWR)
        self.line.close()
        if not self._reaped:
            os.waitpid(self.pid, 0)
            self._reaped = True


@contextlib.contextmanager
def _as_outside_pytest() -> Iterator[None]:
    """pytest's log handlers and its sys.stderr have descriptors that the child closes: whatever got the same number
    later, such as the ring of the 16550, would be written to by the child's log."""
    handlers, logging.root.handlers = logging.root.handlers, []
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    try:
        yield
    finally:
        logging.root.handlers = handlers
        sys.stdout, sys.stderr = out, err


class VmHost:
    """A run directory of a test's own, and the VMs in it."""

    def __init__(self, folder: Path, run_dir: Path) -> None:
        self.folder, self.run_dir = folder, run_dir
        self.vms: list[Vm] = []

    def start(self, machine: dict[str, Any], **options: Any) -> Vm:
        """Starts a VM that ends with the test; options as Vm's."""
        vm = Vm(self.folder, self.run_dir, machine, **options)
        self.vms.append(vm)
        return vm


@contextlib.contextmanager
def vm_host(folder: Path) -> Iterator[VmHost]:
    """VMs with their files in ``folder``; nothing is left of them at the end."""
    run_dir = Path(tempfile.mkdtemp(prefix="mc-", dir="/tmp"))  # socket paths are short
    before = os.environ.get("MOTORCADE_RUN_DIR")
    os.environ["MOTORCADE_RUN_DIR"] = str(run_dir)
    host = VmHost(folder, run_dir)
    try:
        yield host
    finally:
        for vm in host.vms:
            vm.tell()
            vm.close()
        if before is None:
            del os.environ["MOTORCADE_RUN_DIR"]
        else:
            os.environ["MOTORCADE_RUN_DIR"] = before
        left = [p.name for p in run_dir.iterdir() if not p.name.startswith(".")]
        shutil.rmtree(run_dir)
        assert not left, f"run directories were left: {left}"
