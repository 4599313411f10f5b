"""A core's Machine in the test's own process, with a real guest; supervisor and sidecars are the test's to play.

The supervisor is the other end of the Life socket. Sidecars are what ``Server`` collects: each request waits there for
the test's answer, or gets the one that ``answers`` has for its kind.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

from harness import microguest
from harness.microvm import UartPeer, sealed_memfd
from motorcade.core.loop import Loop
from motorcade.core.machine import Machine
from motorcade.core.platform import NO_SLOT
from motorcade.core.qmp.machine import RunState
from motorcade.core.snapshot.plan import Plan, Report, Status
from motorcade.proto import boot as bootlink
from motorcade.proto import messages as m
from motorcade.proto import template
from motorcade.proto.framing import ControlServer, Gone, Outcome
from motorcade.proto.memory import PAGE, GuestMemory, layout

TIMEOUT = 30.0
MEMORY = 16 << 20
COUNTER = 8 << 20  # guest physical: a word that the running guest increments for ever

L = TypeVar("L")


@dataclasses.dataclass
class Asked:
    """A request that waits for its answer."""

    device_id: str
    body: m.Request
    answer: Callable[[Outcome], None]


class Server:
    """In the place of the ControlServer."""

    def __init__(self) -> None:
        self.handler: Callable[[str, m.Message], None] = lambda _id, _message: None
        self.asked: list[Asked] = []
        self.log: list[tuple[str, str]] = []  # device and kind of every request
        self.answers: dict[type, Callable[[Asked], Outcome | None]] = {}
        self.deferred: list[Callable[[], None]] = []
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def expect(self, device_id: str, pid: int) -> None:
        pass

    def forget(self, device_id: str) -> None:
        """Death, as the core learns of it: open requests end."""
        for asked in [a for a in self.asked if a.device_id == device_id]:
            self.asked.remove(asked)
            self._later(lambda asked=asked: asked.answer(Gone()))  # type: ignore[misc]

    def fileno(self) -> int:
        return self._event

    def next_deadline(self) -> float | None:
        return None

    def expire(self, now: float) -> None:
        pass

    def process(self) -> None:
        os.eventfd_read(self._event)
        deferred, self.deferred = self.deferred, []
        for call in deferred:
            call()

    def _later(self, call: Callable[[], None]) -> None:
        self.deferred.append(call)
        os.eventfd_write(self._event, 1)

    def request(self, device_id: str, body: m.Request, deadline_ms: int, on_answer: Callable[[Outcome], None]) -> None:
        assert deadline_ms > 0
        asked = Asked(device_id, body, on_answer)
        self.log.append((device_id, type(body).__name__))
        self._later(lambda: self._serve(asked))

    def _serve(self, asked: Asked) -> None:
        answers = self.answers.get(type(asked.body))
        outcome = answers(asked) if answers is not None else None
        if outcome is not None:
            asked.answer(outcome)
        else:
            self.asked.append(asked)

    def answer(self, device_id: str, request_id: int, body: m.Answer) -> None:
        self.log.append((device_id, type(body).__name__))

    def close(self) -> None:
        os.close(self._event)


def obliging(state: m.DeviceState | None = None) -> dict[type, Callable[[Asked], Outcome | None]]:
    """Answers of sidecars that do as they are asked."""
    saved = m.Saved(state or m.DeviceState(1, b"state"))
    ok = (m.Quiesce, m.Resume, m.Load, m.Activate, m.Reset, m.ConfigWrite, m.Populate)
    return {**{kind: lambda _asked: m.Ok() for kind in ok}, m.Save: lambda _asked: saved}


class CoreBench:
    """One VM with a disk ``disk0`` in slot 0 and a console ``ttyS0`` behind the 16550. Use ``core_bench``."""

    def __init__(
        self, folder: Path, *, incoming: Path | None = None, cmdline: str = "", cpus: int = 1, memory: int = MEMORY,
        generation_id: bytes = b"", paused: bool = False, pager: bool = False, defer: bool = False,
        kernel: bool = True, slot: int = 0,
    ) -> None:  # fmt: skip
        """``incoming``: a folder with ``state`` and ``memory``."""
        self.folder = folder
        self.loop, self.server = Loop(), Server()
        self.server.answers = obliging()
        self.events: list[tuple[str, dict[str, object]]] = []
        self.lives: list[m.Life] = []
        self.sup, self._core = bootlink.socketpair()
        self.peer = UartPeer()
        self.fds = {
            "kvm": os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC),
            "memory": sealed_memfd("ram", memory),
            "dirty": sealed_memfd("dirty", memory // PAGE // 8),
            "kick.disk0.0": self._eventfd(),
            "call.disk0.0": self._eventfd(),
            "isr.disk0": sealed_memfd("isr", PAGE),
            "uart.ring": self.peer.ring_fd,
            "uart.tx": self.peer.tx_event,
            "uart.rx": self.peer.rx_event,
        }
        self.elf = microguest.build()
        if kernel:
            self.fds["kernel"] = os.open(self.elf, os.O_RDONLY | os.O_CLOEXEC)
        if incoming is not None:
            with (incoming / "memory").open("rb") as file:
                os.pwrite(self.fds["memory"], file.read(), 0)
            if not defer:
                self.fds["state"] = os.open(incoming / "state", os.O_RDONLY | os.O_CLOEXEC)
        devices = [m.Slot("disk0", "blk", slot, 1, 1001), m.Slot("ttyS0", "serial", NO_SLOT, 0, 1002)]
        if pager:
            devices.append(m.Slot("pager", "pager", NO_SLOT, 0, 1003))
        self.devices = [d.device_id for d in devices]
        role = m.CoreBoot(
            uuid="",
            cpus=cpus,
            cmdline=cmdline or f"print=hello store={COUNTER}:0 count={COUNTER}",
            devices=tuple(devices),
            uart="ttyS0",
            paused=paused,
            kernel_path=str(self.elf),
            generation_id=generation_id,
            defer=defer,
        )
        regions = tuple(layout(memory))
        boot = m.Boot(1, "bench", "", regions, "info", role, incoming=incoming is not None or defer)
        self.memory = GuestMemory(self.fds["memory"], regions)
        self.machine = Machine(boot, self.fds, self.memory, self.loop, cast(ControlServer, self.server), self._core)
        self.machine.on_event = lambda name, data: self.events.append((name, dict(data)))

    @staticmethod
    def _eventfd() -> int:
        return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    # Time.

    def run_until(self, done: Callable[[], bool], what: str = "it") -> None:
        """Serves the core until ``done()``."""
        assert self.loop.run_until(lambda: self._pump() or done(), TIMEOUT), f"{what} did not happen"

    def settle(self) -> None:
        """Serves the core until what is under way inside of it has happened."""
        done: list[None] = []
        self.loop.call_soon(lambda: self.loop.call_soon(lambda: done.append(None)))
        self.run_until(lambda: bool(done))

    def _pump(self) -> bool:
        self.lives += bootlink.drain_life(self.sup)[0]
        return False

    # The supervisor.

    def hear(self, kind: type[L]) -> L:
        """The core's next message of this kind; earlier ones are dropped."""
        self.run_until(lambda: any(isinstance(life, kind) for life in self.lives), kind.__name__)
        while not isinstance(life := self.lives.pop(0), kind):
            pass
        return life

    def tell(self, life: m.Life, fds: list[int] | None = None) -> None:
        """Says something to the core; the descriptors are closed here."""
        bootlink.send_life(self.sup, life, fds or [])
        for fd in fds or []:
            os.close(fd)

    def open_target(self, name: str = "template", error: str = "") -> Path:
        """Answers OpenTarget with files in a new folder."""
        asked = self.hear(m.OpenTarget)
        target = self.folder / name
        if error:
            self.tell(m.Target(error))
            return target
        target.mkdir()
        labels = ["state"] if asked.what != "template" else ["memory", "state"]
        fds = [os.open(target / label, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600) for label in labels]
        if asked.base:
            labels += ["base.state", "base.0"]
            fds += [os.open(Path(asked.base) / label, os.O_RDONLY | os.O_CLOEXEC) for label in ("state", "memory")]
        self.tell(m.Target("", tuple(labels), '{"name": "bench"}'), fds)
        return target

    def close_target(self, error: str = "") -> bool:
        """Answers CloseTarget; whether the core wanted it kept."""
        keep = self.hear(m.CloseTarget).keep
        self.tell(m.TargetClosed(error))
        return keep

    # The sidecars.

    def hello(self, features: int = 0, config: bytes = b"12345678") -> None:
        """Every sidecar introduces itself."""
        for device_id in self.devices:
            sizes, kind = ((64,), 2) if device_id == "disk0" else ((), 0)
            body = m.Hello(1, device_id, 1, kind, features, sizes, config if kind else b"")
            self.server.handler(device_id, m.Message(1, 1000, body))

    def asked(self, kind: type, device_id: str = "") -> Asked:
        """A request of this kind that waits for its answer, taken out."""

        def find() -> Asked | None:
            return next(
                (a for a in self.server.asked if isinstance(a.body, kind) and device_id in ("", a.device_id)), None
            )

        self.run_until(lambda: find() is not None, kind.__name__)
        found = find()
        assert found is not None
        self.server.asked.remove(found)
        return found

    def die(self, device_id: str) -> None:
        """The supervisor says that the sidecar has ended."""
        self.tell(m.SidecarDied(device_id, "killed by SIGKILL"))

    # The VM.

    def start(self) -> None:
        """Starts it; it runs, or could."""
        self.machine.start()
        self.hello()
        self.hear(m.Running)

    def count(self) -> int:
        """The guest's counter."""
        return int.from_bytes(self.memory.read(COUNTER, 8), "little")

    def assert_runs(self) -> None:
        """The guest makes progress."""
        before = self.count()
        self.run_until(self._looked_again(lambda: self.count() > before), "progress of the guest")

    def _looked_again(self, condition: Callable[[], bool]) -> Callable[[], bool]:
        def look() -> bool:
            if condition():
                return True
            self.loop.call_later(0.001, lambda: None)  # nothing announces what a guest computes
            return False

        return look

    def assert_stands_still(self) -> None:
        """The vCPUs are parked."""
        assert self.machine._platform.vcpus.parked

    def snapshot(self, name: str = "template", **plan: Any) -> Path:
        """A whole snapshot, everybody obliging."""
        ended: list[Report] = []
        self.machine.snapshot(Plan(f"file:{self.folder / name}", **plan), ended.append)
        target = self.open_target(name)
        if plan.get("what", "template") == "template":
            self.hear(m.CopyDisks)
            self.tell(m.DisksCopied("", "[]"))
        assert self.close_target(), self.machine.snapshot_report
        self.run_until(lambda: bool(ended), "the snapshot's end")
        assert ended[0].status is Status.COMPLETED, ended[0]
        return target

    def end(self, status: Status) -> str:
        """Waits for the snapshot's end, which must be this; the reason."""
        self.run_until(lambda: self.machine.snapshot_report.status.over, "the snapshot's end")
        report = self.machine.snapshot_report
        assert report.status is status, report
        return report.error

    def state(self) -> RunState:
        """As query-status has it."""
        return self.machine.run_state

    def read_template(self, target: Path) -> template.Template:
        """What is in its state file."""
        fd = os.open(target / "state", os.O_RDONLY)
        try:
            return template.read(fd)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Frees it all."""
        self.machine.close()
        self.sup.close()
        self._core.close()
        self.loop.close()
        self.server.close()
        for label, fd in self.fds.items():
            if not label.startswith("uart."):
                os.close(fd)
        self.peer.close()


@contextmanager
def core_bench(folder: Path | None = None, **options: Any) -> Iterator[CoreBench]:
    """A CoreBench that is closed at the end."""
    with tempfile.TemporaryDirectory(prefix="mc-core-") as scratch:
        bench = CoreBench(folder or Path(scratch), **options)
        try:
            yield bench
        finally:
            bench.close()


__all__ = ["COUNTER", "MEMORY", "Asked", "CoreBench", "core_bench", "obliging"]
