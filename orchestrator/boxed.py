"""A VM in the box: the supervisor's process outside, which has no VM of its own but one in the box to stand for.

Inside runs an ordinary `vmmctl up --report`, with its supervisor, core and sidecars. Out here are what a VM's users
look for: the run directory with its lock, state.json, qmp.sock and console-ID.sock, each carried inside by ssh. One ssh
process carries the command and all the sockets; a leash (box/session.py) takes the VM along if this process is killed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import msgspec

from motorcade.orchestrator import charbackend, lifeline
from motorcade.orchestrator.box.session import Leash, carried_environment, remote_command, working_tree
from motorcade.orchestrator.box.vm import Box, ensure_box
from motorcade.orchestrator.config import devices
from motorcade.orchestrator.disks import lock_image
from motorcade.orchestrator.errors import EXIT_ERROR, UserError
from motorcade.orchestrator.frozendisks import Incoming
from motorcade.orchestrator.machine import Console, Disk, Kit, Machine, Net, To, encode
from motorcade.orchestrator.resources import unpacked_kernel
from motorcade.orchestrator.rundir import RunDir, process_start
from motorcade.orchestrator.spawn import die_with

log = logging.getLogger("motorcade.supervisor")

INSIDE = Path("/run/motorcade")  # where run directories are in the box
_OURS = ("/", "/dev", "/proc", "/sys", "/run", "/tmp", "/etc", "/usr", "/var", "/root", "/home")
_END_TIMEOUT = 30.0  # seconds; everything in the box is slower


def inside(machine: Machine, incoming: Incoming | None = None) -> dict[str, Any]:
    """The machine as the box gets it: the same, with its sockets where ssh can reach them. Frozen disks are as they
    were when the template was made, or have an overlay with a name."""
    if machine.memory_file is not None:
        raise UserError("memory_file is not possible in the box, whose memory is not the host's")
    data: dict[str, Any] = msgspec.to_builtins(machine, enc_hook=encode)
    data |= {"accel": "kvm", "qmp": [], "metrics": None}
    for net, plain in zip(machine.nets, data["nets"], strict=True):
        plain["mac"] = str(net.mac)
    for restored in incoming.disks if incoming is not None else []:
        if restored.overlay is not None:
            next(disk for disk in data["disks"] if disk["id"] == restored.disk.id)["overlay"] = restored.overlay
    for console, plain in zip(machine.consoles, data["consoles"], strict=True):
        if isinstance(console.backend, To) and console.backend.socket:
            plain["backend"] = {"socket": str(_backend_socket(machine, console))}
        elif isinstance(console.backend, To):
            plain["backend"] = {"file": console.backend.file}
    return data


def _backend_socket(machine: Machine, console: Console) -> Path:
    return INSIDE.with_name(f"motorcade-{machine.name}-{console.id}.sock")


def forwards(machine: Machine, run_dir: Path) -> list[str]:
    """What ssh listens on out here, and where each leads in there (ssh(1), -L)."""
    there = INSIDE / machine.name
    pairs = [(str(run_dir / "qmp.sock"), str(there / "qmp.sock"))]
    for address in machine.qmp:
        pairs.append((address.partition(":")[2], str(there / "qmp.sock")))
    pairs += [(str(run_dir / name), str(there / name)) for name in ("watch.sock", "metrics.sock")]
    if machine.metrics is not None:
        pairs.append((machine.metrics, str(there / "metrics.sock")))
    for console in machine.consoles:
        name = f"console-{console.id}.sock"
        pairs.append((str(run_dir / name), str(there / name)))
        if isinstance(console.backend, To) and console.backend.socket:
            pairs.append((console.backend.socket, str(_backend_socket(machine, console))))
    for net in machine.nets:
        for rule in net.forward:
            host = rule.removeprefix("tcp:").rpartition(":")[0]
            pairs.append((host, f"127.0.0.1:{host.rpartition(':')[2]}"))
    return [f"{here}:{target}" for here, target in pairs]


def sockets(machine: Machine) -> list[Path]:
    """What ssh makes outside the run directory, and does not remove."""
    found = [Path(address.removeprefix("unix:")) for address in machine.qmp if address.startswith("unix:")]
    backends = (console.backend for console in machine.consoles)
    return found + [Path(backend.socket) for backend in backends if isinstance(backend, To) and backend.socket]


def arguments(incoming: Incoming) -> list[str]:
    """What `vmmctl up` in the box is told of the template. Errors: UserError."""
    if not incoming.template:
        raise UserError("--incoming defer is not possible in the box; name the template at the start")
    if not Path(incoming.template).is_dir():
        raise UserError("in the box a machine goes on from a template only, not from a checkpoint or a state")
    given = incoming.generation_id.hex()
    return ["--incoming", f"file:{incoming.template}", *(["--generation-id", given] if given else ["--same-id"])]


def shares(machine: Machine, incoming: Incoming | None = None) -> list[Path]:
    """Folders that the VM reads or writes, shared with the box so that it sees them as they are now. A file in a folder
    of the system's is shared alone. Errors: UserError for what the box cannot have."""
    paths = [machine.kernel.image, machine.kernel.initrd]
    frozen = {restored.disk.id: restored for restored in incoming.disks} if incoming is not None else {}
    if incoming is not None:
        paths += [f"{incoming.template}/state", *incoming.memory]
    for _, part in devices(machine):
        if restored := frozen.get(part.id):
            paths += [*map(restored.path, restored.disk.files), restored.overlay]
        elif isinstance(part, Disk):
            if Path(part.path).is_block_device():
                raise UserError(f"disk {part.id}: {part.path}: a block device of the host cannot be used in the box")
            paths += [part.path, *part.layers, str(part.overlay) if part.overlay else None]
        elif isinstance(part, Net):
            if any(rule.startswith("udp:") for rule in part.forward):
                raise UserError(f"net {part.id}: UDP ports cannot be forwarded into the box")
            paths += [part.capture, part.link and f"{part.link}/x"]
        elif isinstance(part, Console) and isinstance(part.backend, To):
            paths.append(part.backend.file)
    chosen: list[Path] = []
    for path in paths:
        if path:
            parent = Path(path).resolve().parent
            share = Path(path).resolve() if str(parent) in _OURS else parent
            if share.exists() and share not in chosen:
                chosen.append(share)
    return chosen


class BoxedVm:
    """Stands for a VM in the box. ``run`` is its whole life."""

    def __init__(
        self,
        machine: Machine,
        run: RunDir,
        line: socket.socket,
        *,
        config: str,
        paused: bool,
        incoming: Incoming | None = None,
    ) -> None:
        """Owns ``run`` and ``line``."""
        self.machine, self.run_dir, self.line, self.config, self.paused = machine, run, line, config, paused
        self.incoming = incoming
        self.status, self.started = "starting", time.time()
        self.attached = True
        self.processes: list[dict[str, Any]] = []
        self.locks: list[dict[str, Any]] = []
        self.shares: list[Path] = []
        self.last: dict[str, Any] | None = None  # how it ended, or why it did not come to run
        self.selector = selectors.DefaultSelector()
        self.output = b""
        self.served = False  # the sockets outside the run directory are ours

    def run(self) -> int:
        """Starts the VM in the box and stands for it until it ends. Returns its exit status."""
        try:
            self.write_state()
            self.lock_images()
            for path in sockets(self.machine):
                # In the way of another's, or of a file, it is an error; what a killed VM left is removed.
                charbackend.open_socket(path).close()
            self.served = True
            self.told = arguments(self.incoming) if self.incoming is not None else []
            self.shares = shares(self.machine, self.incoming)
            if self.incoming is None:
                # Here, where it takes a tenth of the time, and is kept longer than the box.
                self.machine.kernel.image = str(unpacked_kernel(self.machine.kernel.image))
            box = ensure_box(lambda text: self.tell(event="progress", text=text))
            self.serve(box)
        except (UserError, charbackend.CharBackendError) as e:
            status = e.status if isinstance(e, UserError) else EXIT_ERROR
            self.last = {"event": "failed", "message": str(e), "status": status}
        except Exception as e:
            log.exception("the supervisor failed")
            self.last = {"event": "failed", "message": f"{type(e).__name__}: {e}", "status": EXIT_ERROR}
        return self.leave()

    def lock_images(self) -> None:
        """Against VMs out here: the box's kernel and this one do not know each other's locks."""
        frozen = {r.disk.id: r for r in self.incoming.disks} if self.incoming is not None else {}
        for disk in self.machine.disks:
            if restored := frozen.get(disk.id):
                for file in restored.disk.files:
                    self.locks.append(lock_image(disk, restored.path(file), exclusive=False))
                continue
            self.locks.append(lock_image(disk, disk.path, exclusive=not (disk.readonly or disk.overlay)))
            if disk.overlay and Path(str(disk.overlay)).exists():
                self.locks.append(lock_image(disk, str(disk.overlay), exclusive=True))
        self.write_state()

    def serve(self, box: Box) -> None:
        """The VM's life in the box."""
        run_id = uuid.uuid4().hex[:12]
        argv = [sys.executable, "-m", "motorcade.orchestrator.cli", "up", "--report", "-"]
        argv += ["--paused"] if self.paused else []
        argv += self.told
        checkout = Path(__file__).resolve().parents[1]
        command = remote_command(
            run_id,
            argv,
            cwd=Path("/"),
            env={**carried_environment(), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            shares=self.shares,
            fresh=[working_tree(checkout)],
        )
        options = ["-o", "ControlPath=none", "-o", "ExitOnForwardFailure=yes", "-o", "StreamLocalBindMask=0177"]
        for forward in forwards(self.machine, self.run_dir.path):
            options += ["-L", forward]
        us = os.getpid()
        self.leash = Leash(box, run_id)
        ssh = subprocess.Popen(
            [*box.ssh, *options, "-T", "box", command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            preexec_fn=lambda: die_with(us),
        )
        try:
            assert ssh.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # then ssh has failed, and says why in the log
                ssh.stdin.write(json.dumps(inside(self.machine, self.incoming)).encode())
                ssh.stdin.close()
            self.loop(ssh)
        finally:
            ssh.kill()
            status = ssh.wait()
            self.leash.release()
        if self.last is None:
            why = "the box went away" if status == 255 else f"vmmctl in the box ended with status {status}"
            raise UserError(f"{why}; see vmmctl logs {self.machine.name}")

    def loop(self, ssh: subprocess.Popen[bytes]) -> None:
        """Until vmmctl in the box has nothing more to say."""
        receiver, sender = socket.socketpair()
        for sock in (receiver, sender):
            sock.setblocking(False)
        signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        assert ssh.stdout is not None

        def on_signal() -> None:
            receiver.recv(64)
            self.shut_down()

        self.selector.register(receiver, selectors.EVENT_READ, on_signal)
        self.selector.register(self.line, selectors.EVENT_READ, self.on_line)
        self.selector.register(ssh.stdout, selectors.EVENT_READ, None)
        deadline: float | None = None
        while True:
            if self.status == "stopping" and deadline is None:
                deadline = time.monotonic() + _END_TIMEOUT
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = self.selector.select(left)
            if not ready and left == 0:
                log.error("the VM in the box did not end in time")
                return
            for key, _ in ready:
                if key.data is not None:
                    key.data()
                elif chunk := os.read(key.fd, 65536):
                    self.on_output(chunk)
                else:
                    return

    def on_output(self, chunk: bytes) -> None:
        """Reports of vmmctl in the box: lifeline messages, one a line."""
        *lines, self.output = (self.output + chunk).split(b"\n")
        for text in lines:
            try:
                message = json.loads(text)
            except ValueError:
                log.error("vmmctl in the box: %r", text)
                continue
            self.on_report(message)

    def on_report(self, message: dict[str, Any]) -> None:
        """Passes one on, as it is out here."""
        event = message["event"]
        if event in {"ended", "failed"}:
            self.last = message
            return
        if event == "started":
            # Their pids are the box's, and mean nothing here.
            self.processes = [{**p, "start": None} for p in message["processes"]]
            if message["console"]:
                message["console"] = str(self.run_dir.path / Path(message["console"]).name)
        elif event == "running" and self.status == "starting":
            self.status = "running"
            for process in self.processes:
                process["state"] = "running"
        elif event == "sidecar-died":
            for process in self.processes:
                if process["role"] == message["role"]:
                    process["state"] = message["reason"]
        self.write_state()
        self.tell(**message)

    def on_line(self) -> None:
        """vmmctl lets go of the VM, or is gone."""
        message = lifeline.receive(self.line)
        if message is None:
            self.selector.unregister(self.line)
            if self.attached:
                self.shut_down()
        elif message.get("do") == "detach":
            self.attached = False

    def shut_down(self) -> None:
        """Ends the VM at once, disks flushed."""
        log.info("ending the VM in the box")
        self.status = "stopping"
        self.leash.signal(signal.SIGUSR1)

    def leave(self) -> int:
        """Tells how it ended and leaves nothing behind."""
        assert self.last is not None
        failed = self.last["event"] == "failed"
        self.status = "failed" if failed else "ended"
        for process in self.processes:
            process["state"] = "ended"
        for path in sockets(self.machine) if self.served else []:
            with contextlib.suppress(OSError):
                if path.is_socket():
                    path.unlink()
        self.write_state()
        self.run_dir.release()
        self.tell(**self.last)
        status: int = self.last["status"]
        return status

    def tell(self, **message: Any) -> None:
        """To vmmctl, if it is still there."""
        lifeline.send(self.line, **message)

    def write_state(self) -> None:
        """As of any VM; see vmstate.py."""
        machine, last = self.machine, self.last
        kinds = {Disk: "blk", Net: "net", Console: "serial"}
        kind = {d.id: d.kind if isinstance(d, Kit) else kinds[type(d)] for _, d in devices(machine)}
        consoles = [c for c in machine.consoles if c.backend == "terminal"] or machine.consoles
        state: dict[str, Any] = {
            "name": machine.name,
            "uuid": machine.uuid,
            "status": self.status,
            "pid": os.getpid(),
            "start": process_start(os.getpid()),
            "started": self.started,
            "config": self.config,
            "accel": "box",
            "machine": {"cpus": machine.cpus, "memory": int(machine.memory), "kernel": machine.kernel.image},
            "processes": self.processes,
            "devices": [{"id": d.id, "kind": kind[d.id], "slot": None, "backend": ""} for _, d in devices(machine)],
            "console": consoles[0].id if consoles else None,
            "qmp": [f"unix:{self.run_dir.path / 'qmp.sock'}", *machine.qmp],
            "locks": self.locks,
            "shares": [str(path) for path in self.shares],
        }
        if last is not None:
            reason = last.get("reason", "start-failed")
            detail = last.get("detail", last.get("message", ""))
            state["ended"] = {"status": last["status"], "reason": reason, "detail": detail, "time": time.time()}
        self.run_dir.write_state(state)
