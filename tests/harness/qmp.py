"""A machine without a guest behind a real QMP server, and a client that sees every byte."""

from __future__ import annotations

import json
import selectors
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from motorcade.core.qmp.errors import DeviceNotFound, QmpError
from motorcade.core.qmp.machine import BlockDevice, CharDevice, NetDevice, RunState, Sidecar, Vcpu
from motorcade.core.qmp.server import QmpServer
from motorcade.core.snapshot.plan import Kind, Plan, Report
from motorcade.proto.messages import Counter, QueueStats, StatsReport


class FakeDebugger:
    """A Debugger of one vCPU and a page of RAM."""

    def read_memory(self, gpa: int, size: int) -> bytes:
        if gpa + size > 4096:
            raise QmpError(f"guest physical {gpa:#x}+{size:#x} is not RAM")
        return bytes((gpa + n) % 256 for n in range(size))

    def register(self, vcpu: int, name: str) -> int:
        if vcpu:
            raise DeviceNotFound(f"there is no vCPU {vcpu}; there are 0 to 0")
        return {"rip": 0xFFF0, "c0000080": 0xD01}[name]

    def registers(self, vcpu: int) -> str:
        return f"rip={self.register(vcpu, 'rip'):016x}"


class FakeMachine:
    """A MachineControl that only keeps its state and says what was done to it."""

    name = "fake"
    uuid = "7a1f0d7e-3c4b-4a57-9f0e-6f6f3a9d2c11"
    balloon = None  # this machine has none

    def __init__(self) -> None:
        self.run_state = RunState.RUNNING
        self.memory_size = 512 << 20
        self.generation_id = bytes(range(16))
        self.debugger = FakeDebugger()
        self.known: dict[str, StatsReport] = {}  # of last_stats()
        self.on_event: Callable[[str, dict[str, object]], None] = lambda _name, _data: None
        self.done: list[str] = []
        self.failure: Exception | None = None  # what the next pause() raises
        self.waiting: list[Callable[[StatsReport | None], None]] = []  # of sidecar_stats("slow")
        self.plans: list[Plan] = []  # of snapshot()
        self.thens: list[Callable[[Report], None] | None] = []  # of snapshot(), as ``plans``
        self.taken: list[int] = []  # descriptors that are the machine's now
        self.snapshot_report = Report()
        self.dump_report = Report()
        self.incoming: list[tuple[str, Callable[[QmpError | None], None]]] = []

    def vcpus(self) -> Sequence[Vcpu]:
        return [Vcpu(0, 1001), Vcpu(1, 1002, core=1)]

    def pause(self) -> None:
        if self.failure is not None:
            raise self.failure
        self.done.append("pause")
        if self.run_state.runs:
            self.run_state = RunState.PAUSED
            self.on_event("STOP", {})

    def resume(self) -> None:
        self.done.append("resume")
        if not self.run_state.runs:
            self.run_state = RunState.RUNNING
            self.on_event("RESUME", {})

    def reset(self, reason: str) -> None:
        self.done.append("reset")
        self.on_event("RESET", {"guest": False, "reason": reason})

    def powerdown(self) -> None:
        self.done.append("powerdown")
        self.on_event("POWERDOWN", {})

    def quit(self, reason: str) -> None:
        self.done.append("quit")
        self.run_state = RunState.SHUTDOWN
        self.on_event("SHUTDOWN", {"guest": False, "reason": reason})

    def snapshot(self, plan: Plan, then: Callable[[Report], None] | None = None) -> None:
        if self.failure is not None:
            raise self.failure
        self.plans.append(plan)
        self.thens.append(then)
        if plan.given >= 0:
            self.taken.append(plan.given)
        if plan.kind is Kind.MIGRATION:
            self.on_event("MIGRATION", {"status": "setup"})

    def load_devices(self, uri: str, given: int, done: Callable[[QmpError | None], None]) -> None:
        if self.failure is not None:
            raise self.failure
        if given >= 0:
            self.taken.append(given)
        self.incoming.append((uri, done))

    def cancel_snapshot(self) -> None:
        self.done.append("cancel")

    def migrate_incoming(self, uri: str, done: Callable[[QmpError | None], None], given: int = -1) -> None:
        if given >= 0:
            self.taken.append(given)
        self.incoming.append((uri, done))

    def block_devices(self) -> Sequence[BlockDevice]:
        return [
            BlockDevice("disk0", "/img/a.raw", "raw", 1 << 30, readonly=True, direct=True),
            BlockDevice("disk1", "/img/b.ovl", "motorcade-overlay", 1 << 20, backing="/img/base.raw"),
        ]

    def spare_nodes(self) -> Sequence[BlockDevice]:
        return [BlockDevice("", "/img/c.raw", "raw", None, node="spare")]

    def char_devices(self) -> Sequence[CharDevice]:
        return [CharDevice("com1", "pty:/dev/pts/3", True)]

    def set_generation_id(self, value: bytes) -> None:
        self.generation_id = value

    def net_devices(self) -> Sequence[NetDevice]:
        return [NetDevice("lan", "52:54:00:12:34:56", "tap tap0")]

    def last_stats(self, device_id: str) -> StatsReport | None:
        return self.known.get(device_id)

    def sidecars(self) -> Sequence[Sidecar]:
        return [Sidecar("disk0", "blk", 4711, "present", 0), Sidecar("com1", "serial", 4712, "present")]

    def sidecar_stats(self, device_id: str, done: Callable[[StatsReport | None], None]) -> None:
        if device_id == "slow":
            self.waiting.append(done)
        elif device_id in ("mute", "disk1"):
            done(None)
        elif device_id == "disk0":
            done(StatsReport((QueueStats(0, 5, 4096, 512, 0, 3, 2, 1, 5, 1, 700, (0, 4)),), (Counter("merged", 9),)))
        else:
            raise DeviceNotFound(f"Device '{device_id}' not found")


class QmpClient:
    """A blocking client; reads wait at most 20 s."""

    def __init__(self, address: str | tuple[str, int]) -> None:
        self.sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        self.sock.settimeout(20)
        self.sock.connect(address)
        self._buffer = b""

    def __enter__(self) -> QmpClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def line(self) -> bytes:
        """The next line, with its end; b"" when the server hung up."""
        while b"\n" not in self._buffer:
            try:
                data = self.sock.recv(65536)
            except ConnectionResetError:
                data = b""
            if not data:
                return b""
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line + b"\n"

    def read(self) -> Any:
        """The next object."""
        line = self.line()
        assert line, "the server hung up"
        return json.loads(line)

    def send(self, data: bytes) -> None:
        """Sends bytes as they are."""
        self.sock.sendall(data)

    def ask(self, command: str, **arguments: object) -> Any:
        """Sends a command and reads one object."""
        request: dict[str, object] = {"execute": command}
        if arguments:
            request["arguments"] = arguments
        self.send(json.dumps(request).encode())
        return self.read()


class QmpHost:
    """A QmpServer on a unix socket, with a loop in a thread; ``call`` runs something on that thread."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.machine = FakeMachine()
        self._selector = selectors.EpollSelector()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.path)
        listener.listen()
        tcp = socket.create_server(("127.0.0.1", 0))
        self.tcp: tuple[str, int] = tcp.getsockname()
        self.server = QmpServer(self._selector, self.machine, [listener.detach(), tcp.detach()])
        self.machine.on_event = self.server.emit
        self._wake, self._woken = socket.socketpair()
        self._calls: list[Callable[[], object]] = []
        self._selector.register(self._woken, selectors.EVENT_READ, self._run_calls)
        self.rounds = 0
        self._stopped = False
        self._failure: BaseException | None = None
        self.now: Callable[[], float] | None = None  # a clock for expire(), else the server's deadlines wait
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stopped:
                for key, mask in self._selector.select(20):
                    key.data(mask)
                self.rounds += 1
        except BaseException as e:
            self._failure = e
            self.server.close()
            raise

    def _run_calls(self, _mask: int) -> None:
        self._woken.recv(4096)
        calls, self._calls = self._calls, []
        for call in calls:
            call()

    def call(self, function: Callable[[], object]) -> None:
        """Runs ``function`` on the server's thread and waits for it."""
        done = threading.Event()

        def run() -> None:
            function()
            done.set()

        self._calls.append(run)
        self._wake.send(b"x")
        assert done.wait(20), "the server's loop is stuck"

    def connect(self) -> QmpClient:
        """A client that has read the greeting."""
        client = QmpClient(self.path)
        assert "QMP" in client.read()
        return client

    def close(self) -> None:
        """Ends the loop and the server."""

        def stop() -> None:
            self._stopped = True
            self.server.close()

        if self._failure is None:
            self.call(stop)
        self._thread.join(20)
        self._selector.close()
        self._wake.close()
        self._woken.close()


@contextmanager
def qmp_host(path: Path) -> Iterator[QmpHost]:
    """A QmpHost that is closed at the end."""
    host = QmpHost(path)
    try:
        yield host
    finally:
        host.close()


__all__ = ["FakeMachine", "QmpClient", "QmpError", "QmpHost", "qmp_host"]
