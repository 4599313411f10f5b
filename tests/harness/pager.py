"""A real pager process under test, with this process as supervisor and core, and templates for it."""

from __future__ import annotations

import contextlib
import os
import random
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from harness.toucher import Toucher
from harness.zygote import python_path
from motorcade.core._native import lib
from motorcade.proto import boot as bootlink
from motorcade.proto import messages as m
from motorcade.proto import template as templates
from motorcade.proto.framing import ControlServer, Outcome
from motorcade.proto.template import CHUNK
from motorcade.proto.versions import PROTOCOL_VERSION
from motorcade.sidecars.pager import workingset

TIMEOUT = 30.0  # seconds


class Frozen:
    """A template's files, unnamed. ``layers`` says of each chunk where it comes from; its bytes are random.

    ``bytes`` is what guest memory is to be.
    """

    def __init__(self, layers: Sequence[int], *, size: int = 0, seed: int = 1) -> None:
        self.size = size or len(layers) * CHUNK
        self.layers = bytes(layers)
        self.parents = max(max(layers) - 1, 0)
        self.files = [os.memfd_create(f"memory.{n}", os.MFD_CLOEXEC) for n in range(self.parents + 1)]
        for file in self.files:
            os.ftruncate(file, self.size)
        self.bytes = bytearray(self.size)
        sums = bytearray()
        rng = random.Random(seed)
        for chunk, layer in enumerate(layers):
            start, end = chunk * CHUNK, min((chunk + 1) * CHUNK, self.size)
            data = rng.randbytes(end - start) if layer else bytes(end - start)
            self.bytes[start:end] = data
            if layer:
                os.pwrite(self.files[layer - 1], data, start)
            sums += (lib.mc_crc32c(0, data, len(data)) if layer else 0).to_bytes(4, "little")
        self.state = os.memfd_create("state", os.MFD_CLOEXEC)
        os.write(self.state, templates.encode(self._template(bytes(sums))))
        self._owned = [*self.files, self.state]

    def _template(self, sums: bytes) -> templates.Template:
        return templates.Template(
            description="{}",
            cpu=templates.Cpu(b"", (), 0),
            memory_size=self.size,
            layers=self.layers,
            sums=sums,
            parents=tuple(templates.Parent(f"/parent{n}", bytes(32)) for n in range(self.parents)),
            disks="[]",
            components=(),
        )

    def new_memory(self) -> int:
        """An empty guest memory, the template's to close."""
        fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(fd, self.size)
        self._owned.append(fd)
        return fd

    def flip(self, layer: int, offset: int) -> None:
        """Turns one bit of a memory file over."""
        byte = os.pread(self.files[layer - 1], 1, offset)[0]
        os.pwrite(self.files[layer - 1], bytes([byte ^ 0x10]), offset)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._owned:
            os.close(fd)


class PagerProcess:
    """From its Boot to its end. Owns the process, not the descriptors that it was given."""

    def __init__(
        self,
        frozen: Frozen,
        memory: int,
        *,
        working_set: bytes | None = None,
        eager: bool = False,
        ready: bool = True,
        control: bool = True,
        module: str = "motorcade.sidecars.pager",
    ) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="mc-"))
        self.log_path = self.directory / "log"
        self.hello = False
        self._left = False
        self.ready = False
        self.failed = ""
        self.damaged: list[str] = []
        self.working_sets: list[bytes] = []
        self.server = ControlServer(self._on_message)
        self.server.bind(str(self.directory / "core.sock"))
        self.boot_socket, theirs = bootlink.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, "--boot-fd", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": python_path()},
            )
        self._pidfd = os.pidfd_open(self.process.pid)
        self.server.expect("pager", self.process.pid)
        boot = m.Boot(
            protocol_version=PROTOCOL_VERSION,
            vm_name="test",
            control_socket=str(self.directory / "core.sock") if control else "",
            regions=(),
            log_level="debug",
            role=m.PagerBoot(frozen.size, eager=eager, parents=frozen.parents),
        )
        log_fd = os.open(self.log_path, os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        run_fd = os.open(self.directory, os.O_PATH | os.O_CLOEXEC)
        fds = {"memory": memory, "state": frozen.state, "log": log_fd, "run": run_fd}
        fds |= {f"template.{n}": fd for n, fd in enumerate(frozen.files)}
        if working_set is not None:
            fds["working-set"] = os.memfd_create("working-set")
            os.write(fds["working-set"], working_set)
        try:
            bootlink.send_boot(self.boot_socket, boot, fds)
            if ready:
                self.wait_until(lambda: self.ready, "ready")
        finally:
            os.close(log_fd)
            os.close(run_fd)
            if working_set is not None:
                os.close(fds["working-set"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _on_message(self, device_id: str, message: m.Message) -> None:
        if isinstance(message.body, m.Hello):
            assert message.body.virtio_type == 0
            self.hello = True
            self.server.answer(device_id, message.id, m.Welcome(PROTOCOL_VERSION))

    def serve(self, name: str, toucher: Toucher) -> None:
        """As the supervisor does when a process is lazyReady."""
        bootlink.send_life(self.boot_socket, m.Serve(name, toucher.mappings), [toucher.uffd])

    def wait_until(self, done: Callable[[], bool], what: str, timeout: float = TIMEOUT) -> None:
        """Takes what the pager sends until ``done()``. TimeoutError; AssertionError if it ends before that."""
        deadline = time.monotonic() + timeout
        self._process()
        while not done():
            assert self.process.poll() is None, f"waiting for {what}: it ended, {self.failed}\n{self.log()}"
            if (left := deadline - time.monotonic()) <= 0:
                raise TimeoutError(f"waiting for {what}\n{self.log()}")
            select.select([self.server.fileno(), self.boot_socket, self._pidfd], [], [], left)
            self._process()

    def _process(self) -> None:
        self.server.process()
        for life in bootlink.drain_life(self.boot_socket)[0]:
            if isinstance(life, m.Ready):
                self.ready = True
            elif isinstance(life, m.Failed):
                self.failed = life.reason.rstrip()
            elif isinstance(life, m.Damaged):
                self.damaged.append(life.reason)
            elif isinstance(life, m.WorkingSet):
                self.working_sets.append(life.chunks)

    def wait_hello(self) -> None:
        """The working set is there; the guest may run."""
        self.wait_until(lambda: self.hello, "its hello")

    def wait_damaged(self) -> str:
        """The first reason."""
        self.wait_until(lambda: bool(self.damaged), "damaged")
        return self.damaged[0]

    def wait_exit(self) -> int:
        """Its status."""
        self.process.wait(TIMEOUT)
        self._process()
        return self.process.returncode

    def request(self, body: m.Request, timeout: float = TIMEOUT) -> Outcome:
        """Asks as the core, after the hello."""
        self.wait_hello()
        outcomes: list[Outcome] = []
        self.server.request("pager", body, int(timeout * 1000), outcomes.append)
        self.wait_until(lambda: bool(outcomes), f"the answer to {type(body).__name__}", timeout)
        return outcomes[0]

    def stats(self) -> dict[str, int]:
        """Its counters by name."""
        report = self.request(m.StatsRequest())
        assert isinstance(report, m.StatsReport), report
        return {counter.name: counter.value for counter in report.detail}

    def log(self) -> str:
        """What it logged."""
        return self.log_path.read_text(errors="replace")

    def leave(self) -> None:
        """The core goes away."""
        if not self._left:
            self._left = True
            self.server.close()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait(TIMEOUT)

    def close(self) -> None:
        """Kills what is left and removes what was made."""
        with contextlib.suppress(ProcessLookupError):
            self.kill()
        self.leave()
        self.boot_socket.close()
        os.close(self._pidfd)
        shutil.rmtree(self.directory)


def working_set(chunks: Sequence[int]) -> bytes:
    """The file for these chunks."""
    return workingset.encode(b"".join(chunk.to_bytes(4, "little") for chunk in chunks))
