"""A real sidecar process under test, with this process in the roles of supervisor and core."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from socket import socket
from typing import Self

from harness import zygote
from harness.driver import Memory, Queue
from motorcade.orchestrator import keeps
from motorcade.proto import boot as boot_proto
from motorcade.proto import messages as m
from motorcade.proto.framing import ControlServer, Outcome
from motorcade.proto.versions import PROTOCOL_VERSION
from motorcade.sidecars.blk.overlay import OverlayError
from motorcade.sidecars.device import RING_EVENT_IDX, RING_INDIRECT_DESC, map_isr

TIMEOUT = 20.0  # seconds, for whatever must happen soon: generous, since CI machines are slow

_activations = itertools.count(1)

log = logging.getLogger(__name__)


class SidecarGone(Exception):
    """The process ended, or said that it cannot start. The text has the end of its log."""


def _kept(role: m.Role, queues: int, fds: Mapping[str, int]) -> int:
    """As the supervisor reckons it, which refuses a damaged overlay; here the sidecar is to."""
    try:
        return keeps.size(role, queues, fds)
    except OverlayError:
        return 1 << 20


class Sidecar:
    """One sidecar from its Boot to its end. Owns the process and everything made for it, not ``fds``.

    ``role`` is BlkBoot and the like; ``fds`` are the backend's descriptors by label; ``queues`` is how many get a kick
    descriptor. ``cold``: a new interpreter with ``--boot-fd`` instead of a fork. ``wait``: until its hello. Use it as a
    context manager. ``incoming``: it starts quiesced. ``lazy``: its memory fills itself; ``userfaultfd``, when it is
    ready, is this object's. ``predecessor``: the same device in an earlier process, which has ended; its guest memory,
    eventfds and InterruptStatus are used on, and stay its own. ``reopen`` is asked by a kit's kind, as the supervisor.
    ``takes_over``: it goes on from what that left in its in-flight memory.
    """

    def __init__(
        self,
        kind: str,
        role: m.BlkBoot | m.NetBoot | m.SerialBoot | m.KitBoot,
        fds: Mapping[str, int],
        *,
        queues: int,
        memory: Memory | None = None,
        cold: bool = False,
        wait: bool = True,
        log_level: str = "debug",
        incoming: bool = False,
        lazy: bool = False,
        predecessor: Sidecar | None = None,
        takes_over: bool = False,
        reopen: Callable[[], dict[str, int]] | None = None,
    ) -> None:
        self.kind, self.role = kind, role
        self._reopen = reopen
        self._predecessor = predecessor
        self.memory: Memory = memory or (predecessor.memory if predecessor else Memory())
        self._owns_memory = memory is None and predecessor is None
        self.directory = Path(tempfile.mkdtemp(prefix="mc-"))  # sun_path is short; pytest's directories are not
        flags = os.EFD_NONBLOCK | os.EFD_CLOEXEC
        self.kicks: list[int]
        self.call: int
        self.isr_fd: int
        self.inflight: int
        self.setup: m.Activate | None = None  # what the driver has set up
        if predecessor:
            self.kicks, self.call, self.isr_fd = predecessor.kicks, predecessor.call, predecessor.isr_fd
            self.setup = predecessor.setup
        else:
            self.kicks = [os.eventfd(0, flags) for _ in range(queues)]
            self.call = os.eventfd(0, flags)
            self.isr_fd = os.memfd_create("isr", os.MFD_CLOEXEC)
            os.ftruncate(self.isr_fd, 4096)
        if predecessor and takes_over:
            self.inflight = os.dup(predecessor.inflight)
        else:
            self.inflight = os.memfd_create("inflight", os.MFD_CLOEXEC)
            os.ftruncate(self.inflight, _kept(role, queues, fds))
        self._isr = map_isr(self.isr_fd)
        self.log_path = self.directory / "log"
        self._log_fd = os.open(self.log_path, os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        self.server = ControlServer(self._on_message)
        self.server.bind(str(self.directory / "core.sock"))
        self.hello: m.Hello | None = None
        self.needs_reset: list[m.NeedsReset] = []
        self.config_changes: list[bytes] = []
        self.exit_status: int | None = None  # as subprocess has it: negative for a signal
        self.mappings: tuple[m.Mapping, ...] = ()  # of LazyReady
        self.userfaultfd = -1
        self.stopped: str | None = None  # why Life said that it cannot go on

        self.boot_socket, theirs = boot_proto.socketpair()
        with theirs:
            self._child = _spawn_cold(kind, theirs) if cold else zygote.get().spawn(kind, theirs)
        self.pid = self._child.pid
        self.server.expect(role.device_id, self.pid)
        boot = m.Boot(
            protocol_version=PROTOCOL_VERSION,
            vm_name="test",
            control_socket=str(self.directory / "core.sock"),
            regions=tuple(self.memory.regions),
            log_level=log_level,
            role=role,
            incoming=incoming,
            lazy=lazy,
        )
        own = {f"kick.{i}": fd for i, fd in enumerate(self.kicks)}
        own |= {"memory": self.memory.fd, "call.0": self.call, "isr": self.isr_fd, "log": self._log_fd}
        own |= {"dirty": self.memory.dirty_fd, "inflight": self.inflight}
        own["run"] = run = os.open(self.directory, os.O_PATH | os.O_CLOEXEC)
        boot_proto.send_boot(self.boot_socket, boot, {**own, **fds})
        os.close(run)
        if wait:
            try:
                self.wait_until(lambda: self.hello is not None, "its hello")
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The supervisor's and the core's loop.

    def _on_message(self, device_id: str, message: m.Message) -> None:
        body = message.body
        if isinstance(body, m.Hello):
            self.hello = body
            self.server.answer(device_id, message.id, m.Welcome(PROTOCOL_VERSION))
        elif isinstance(body, m.NeedsReset):
            self.needs_reset.append(body)
        elif isinstance(body, m.ConfigChanged):
            self.config_changes.append(body.data)

    def wait_until(self, done: Callable[[], bool], what: str, timeout: float = TIMEOUT) -> None:
        """Serves the sidecar until ``done()``. TimeoutError; SidecarGone if it ends before that."""
        deadline = time.monotonic() + timeout
        self.process()
        while not done():
            if self.exit_status is not None:
                # What it sent last may still be on its way through ZeroMQ's thread.
                if select.select([self.server.fileno()], [], [], 1)[0]:
                    self.server.process()
                    continue
                raise SidecarGone(f"waiting for {what}: status {self.exit_status}, {self.stopped}\n{self.log_tail()}")
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"waiting for {what}: nothing in {timeout} s\n{self.log_tail()}")
            select.select([self.server.fileno(), self.boot_socket.fileno(), self._child.status], [], [], left)
            self.process()

    def poll_until(self, done: Callable[[], bool], what: str, timeout: float = TIMEOUT) -> None:
        """For what the sidecar does not announce: looks again after each answer of its main thread. TimeoutError."""
        deadline = time.monotonic() + timeout
        while not done():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waiting for {what}: not in {timeout} s\n{self.log_tail()}")
            self.stats()

    def process(self) -> None:
        """Takes what has arrived from the sidecar, without waiting."""
        self.server.process()
        if self.exit_status is not None:
            return
        lives, _ = boot_proto.drain_life_fds(self.boot_socket)
        for life, fds in lives:
            if isinstance(life, m.Failed):
                self.stopped = life.reason.rstrip()
            elif isinstance(life, m.LazyReady):
                self.mappings = life.mappings
                (self.userfaultfd,) = fds
            elif isinstance(life, m.Reopen):
                self._answer_reopen()
        if select.select([self._child.status], [], [], 0)[0]:
            self.exit_status = os.waitstatus_to_exitcode(int.from_bytes(os.read(self._child.status, 4), "little"))
            self.server.process()  # its last words

    def _answer_reopen(self) -> None:
        try:
            found, error = self._reopen() if self._reopen else {}, ""
        except OSError as e:
            found, error = {}, str(e.strerror)
        boot_proto.send_life(self.boot_socket, m.Reopened(error, tuple(found)), list(found.values()))
        for fd in found.values():
            os.close(fd)

    def request(self, body: m.Request, timeout: float = TIMEOUT) -> Outcome:
        """Asks, and waits for the outcome, whatever it is."""
        outcomes: list[Outcome] = []
        self.server.request(self.role.device_id, body, int(timeout * 1000), outcomes.append)
        self.wait_until(lambda: bool(outcomes), f"the answer to {type(body).__name__}", timeout)
        return outcomes[0]

    def ask(self, body: m.Request, timeout: float = TIMEOUT) -> None:
        """A request that must be answered with Ok."""
        outcome = self.request(body, timeout)
        assert outcome == m.Ok(), f"{type(body).__name__}: {outcome}\n{self.log_tail()}"

    # The driver's and the core's requests.

    @property
    def offered(self) -> int:
        """Feature bits of the hello."""
        assert self.hello is not None
        return self.hello.features

    @property
    def config(self) -> bytes:
        """Configuration space as last announced."""
        assert self.hello is not None
        return self.config_changes[-1] if self.config_changes else self.hello.config

    def queue(self, index: int, size: int = 0, *, event_idx: bool = True, indirect: bool = False) -> Queue:
        """The driver's end of a queue; ``size`` 0 is the largest offered."""
        assert self.hello is not None
        size = size or self.hello.queue_sizes[index]
        return Queue(self.memory, index, size, self.kicks[index], self.call, event_idx=event_idx, indirect=indirect)

    def activate(self, queues: Sequence[Queue], features: int | None = None) -> None:
        """DRIVER_OK. ``features`` by default all that was offered, with the ring features that the queues use."""
        features = self.accepted(queues) if features is None else features
        self.setup = m.Activate(features, tuple(q.config for q in queues), activation=next(_activations))
        self.ask(self.setup)

    def take_over(self) -> None:
        """The core's welcome of a sidecar that was started ``incoming`` in the place of its ``predecessor``."""
        self.ask(self.setup if self.setup is not None else m.Reset())
        self.resume()

    def accepted(self, queues: Sequence[Queue]) -> int:
        """The features of a driver that takes all, with the ring features that the queues use."""
        features = self.offered & ~(RING_EVENT_IDX | RING_INDIRECT_DESC)
        features |= RING_EVENT_IDX if all(q.event_idx for q in queues) else 0
        return features | (RING_INDIRECT_DESC if any(q.indirect for q in queues) else 0)

    def start(self, size: int = 0, *, count: int = 0, event_idx: bool = True, indirect: bool = False) -> list[Queue]:
        """Queues 0 to ``count`` - 1 (0: all), activated."""
        queues = [self.queue(i, size, event_idx=event_idx, indirect=indirect) for i in range(count or len(self.kicks))]
        self.activate(queues)
        return queues

    # Snapshots, as the core's coordinator asks for them.

    def quiesce(self) -> None:
        """It comes to rest."""
        self.ask(m.Quiesce())

    def resume(self) -> None:
        """It goes on."""
        self.ask(m.Resume())

    def save(self) -> m.DeviceState:
        """Its state; it is quiesced."""
        outcome = self.request(m.Save())
        assert isinstance(outcome, m.Saved), outcome
        return outcome.state

    def restore(self, state: m.DeviceState, queues: Sequence[Queue], features: int | None = None) -> None:
        """Loads and, if it had queues, activates an ``incoming`` sidecar. It stays quiesced."""
        self.ask(m.Load(state))
        if not state.queues:
            return
        places = {q.index: q for q in state.queues}
        at = {q.config.index: q.config for q in queues}
        restored = [
            dataclasses.replace(at[i], last_avail=q.last_avail, used_idx=q.used_idx, error=q.error)
            for i, q in places.items()
        ]
        features = self.accepted(queues) if features is None else features
        self.setup = m.Activate(features, tuple(restored), restored=True, activation=next(_activations))
        self.ask(self.setup)

    def reset(self) -> None:
        """The driver writes 0 to the device status."""
        self.ask(m.Reset())
        self.setup = None
        self.needs_reset.clear()

    def stats(self) -> m.StatsReport:
        """Its counters."""
        outcome = self.request(m.StatsRequest())
        assert isinstance(outcome, m.StatsReport), outcome
        return outcome

    def wait_needs_reset(self) -> m.NeedsReset:
        """The first notice that a queue is broken."""
        self.wait_until(lambda: bool(self.needs_reset), "NeedsReset")
        return self.needs_reset[0]

    @property
    def interrupt_status(self) -> int:
        """The register, in ``struct mc_isr``."""
        return int.from_bytes(self._isr[:4], "little")

    def acknowledge(self) -> None:
        """The driver writes InterruptACK. Only while the device is idle: this is no atomic AND."""
        self._isr[:4] = bytes(4)

    # Its end.

    def shutdown(self, timeout: float = TIMEOUT) -> int:
        """The core's orderly shutdown. Returns the exit status."""
        self.ask(m.Shutdown(), timeout)
        return self.wait_exit(timeout)

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Sends a signal and waits for the end. Returns the exit status."""
        os.kill(self.pid, number)
        return self.wait_exit()

    def wait_exit(self, timeout: float = TIMEOUT) -> int:
        """Waits for the end. Returns the exit status."""
        self.wait_until(lambda: self.exit_status is not None, "its end", timeout)
        assert self.exit_status is not None
        return self.exit_status

    @property
    def alive(self) -> bool:
        """It has not ended yet."""
        self.process()
        return self.exit_status is None

    def log_lines(self) -> list[dict[str, str]]:
        """What it logged as JSON."""
        lines = self.log_path.read_text(errors="replace").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def ping_until(self, done: Callable[[], bool], what: str, timeout: float = TIMEOUT) -> None:
        """Waits for what this process is not told of, such as a change of guest memory."""
        deadline = time.monotonic() + timeout
        while not done():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waiting for {what}: nothing in {timeout} s\n{self.log_tail()}")
            self.ask(m.Ping())

    def wait_log(self, text: str, timeout: float = TIMEOUT) -> None:
        """Waits for a line in the log. A sidecar that answers has logged what it saw before."""
        self.ping_until(lambda: text in self.log_path.read_text(errors="replace"), f"{text!r} in the log", timeout)

    def log_tail(self, size: int = 4000) -> str:
        """The end of its log, for messages."""
        return self.log_path.read_text(errors="replace")[-size:]

    def close(self) -> None:
        """Kills what is left of it and removes what was made for it."""
        if self.exit_status is None:
            with contextlib.suppress(ProcessLookupError, TimeoutError):
                self.kill()
        self.server.close()
        self.boot_socket.close()
        own = [] if self._predecessor else [*self.kicks, self.call, self.isr_fd]
        own.append(self.inflight)
        if self.userfaultfd >= 0:
            own.append(self.userfaultfd)
        for fd in [*own, self._log_fd, self._child.status]:
            os.close(fd)
        self._isr.close()
        if self._owns_memory:
            self.memory.close()
        shutil.rmtree(self.directory)


def _spawn_cold(kind: str, boot_socket: socket) -> zygote.Child:
    """``python -m motorcade.sidecars.KIND --boot-fd N``; MODULE:CLASS for a kind that is not ours."""
    fd = boot_socket.fileno()
    env = {**os.environ, "PYTHONPATH": zygote.python_path()}
    module, _, name = kind.rpartition(":")
    run = f"from motorcade.sidecars import runtime; import {module} as m; raise SystemExit(runtime.main(m.{name}))"
    program = ["-c", run] if module else ["-m", f"motorcade.sidecars.{kind}"]
    command = [sys.executable, *program, "--boot-fd", str(fd)]
    process = subprocess.Popen(command, pass_fds=[fd], env=env, stdin=subprocess.DEVNULL)
    status, theirs = os.pipe2(os.O_CLOEXEC)

    def reap() -> None:
        code = process.wait()
        os.write(theirs, (-code if code < 0 else code << 8).to_bytes(4, "little"))
        os.close(theirs)

    threading.Thread(target=reap, daemon=True).start()
    return zygote.Child(process.pid, status)
