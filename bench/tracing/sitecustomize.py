"""Marks what our processes do, when: for bench/timeline.py, which has every process of its zygote import this.

Nothing in the product knows of it. Functions that tell the story of a start are wrapped by name; who enters or leaves
one writes a record to memory that all processes share, since a forked process keeps mappings but no descriptors. Each
pid has its own part of it. A record costs 2 us.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import mmap
import os
import threading
import time
from collections.abc import Callable
from typing import Any

FILE = "MOTORCADE_BENCH_TRACE"  # environment: the file that is mapped
RECORD = 128  # bytes
PER_PROCESS = 128  # records
PROCESSES = 256  # parts; pids share one where they are equal modulo this
SIZE = RECORD * PER_PROCESS * PROCESSES

POINTS = {
    "motorcade.orchestrator.rundir:RunDir.acquire": "run directory",
    "motorcade.orchestrator.supervisor:Supervisor.open_resources": "open resources",
    "motorcade.orchestrator.supervisor:Supervisor.tell_started": "tell vmmctl",
    "motorcade.orchestrator.processes:Processes.fork_all": "fork or wake processes",
    "motorcade.orchestrator.processes:Processes.boot_machine": "boot",
    "motorcade.orchestrator.supervisor:Supervisor.boot_pager": "boot pager",
    "motorcade.orchestrator.supervisor:Supervisor.on_life": "hear a child",
    "motorcade.orchestrator.supervisor:Supervisor.write_state": "state.json",
    "motorcade.proto.boot:recv_boot": "wait for Boot",
    "motorcade.proto.boot:send_life": "tell the supervisor",
    "motorcade.core.blank:make": "blank VM",
    "motorcade.core.main:Machine.__init__": "machine",
    "motorcade.core.main:Machine.start": "start",
    "motorcade.core.kvm:Vm.__init__": "KVM's VM",
    "motorcade.core.vcpu:Vcpus.__init__": "vCPUs",
    "motorcade.core.vcpu:Vcpus.start_threads": "vCPU threads",
    "motorcade.core.vcpu:Vcpus.resume": "vCPUs run",
    "motorcade.core.snapshot.restore:restore": "restore",
    "motorcade.proto.template:read": "read state",
    "motorcade.core.snapshot.cpu:check": "check CPU",
    "motorcade.core.snapshot.cpu:adopt": "set CPUID",
    "motorcade.core.snapshot.components:Restored.__init__": "check devices",
    "motorcade.core.snapshot.components:Restored.restore_platform": "set VM and vCPU state",
    "motorcade.core.snapshot.components:Restored.restore_device": "set transport",
    "motorcade.core.machine:Machine.announce": "announce",
    "motorcade.sidecars.sandbox:enter": "sandbox",
    "motorcade.sidecars.sandbox:close": "close the sandbox",
    "motorcade.sidecars.runtime:open_log": "log",
    "motorcade.sidecars.runtime:prepare": "memory, sandbox, sockets",
    "motorcade.sidecars.blk.device:BlkDevice.__init__": "device",
    "motorcade.sidecars.net.device:NetDevice.__init__": "device",
    "motorcade.sidecars.serial.device:SerialDevice.__init__": "device",
    "motorcade.sidecars.sidecar:Sidecar.handle": "handle a message",
    "motorcade.sidecars.sidecar:Sidecar.say_hello": "hello",
    "motorcade.sidecars.pager.main:open_pager": "open template",
    "motorcade.orchestrator.spawn:title": "",
}
WAITS = frozenset({"wait for Boot"})


class Trace:
    """This process's end. The mapping is its ancestor's."""

    def __init__(self, shared: mmap.mmap) -> None:
        self._shared = shared
        self._begin()

    def _begin(self) -> None:
        self._pid, self._next = os.getpid(), 0

    def write(self, kind: str, what: str) -> None:
        """One record; ``kind`` is a letter. Those of other threads than the main one are left out."""
        now = time.monotonic_ns()
        if os.getpid() != self._pid:
            self._begin()
        if self._next >= PER_PROCESS or threading.current_thread() is not threading.main_thread():
            return
        start = (self._pid % PROCESSES * PER_PROCESS + self._next) * RECORD
        self._next += 1
        self._shared[start : start + RECORD] = f"{now} {self._pid} {kind} {what}".encode()[:RECORD].ljust(RECORD)

    def wrap(self, function: Callable[..., Any], what: str) -> Callable[..., Any]:
        """Does the same, and is seen."""
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def task(*args: Any, **kwargs: Any) -> Any:
                self.write("(", what)
                try:
                    return await function(*args, **kwargs)
                finally:
                    self.write(")", what)

            return task

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.write("B", what)
            try:
                return function(*args, **kwargs)
            finally:
                self.write("E", what)

        return call

    def install(self) -> None:
        """Wraps what there is; says what is missing."""
        for point, what in POINTS.items():
            module, _, name = point.partition(":")
            owner: Any = importlib.import_module(module)
            *path, last = name.split(".")
            try:
                for step in path:
                    owner = getattr(owner, step)
                raw = inspect.getattr_static(owner, last)
            except AttributeError:
                self.write("?", point)
                continue
            if not what:  # title(role, vm)
                setattr(owner, last, self._titled(raw))
            elif isinstance(raw, classmethod | staticmethod):
                setattr(owner, last, type(raw)(self.wrap(raw.__func__, what)))
            else:
                setattr(owner, last, self.wrap(raw, what))
                self._rebind(raw, getattr(owner, last))

    @staticmethod
    def _rebind(old: object, new: object) -> None:
        """Where modules have imported the function by name."""
        import sys

        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").startswith("motorcade."):
                for name, value in list(vars(module).items()):
                    if value is old:
                        setattr(module, name, new)

    def _titled(self, function: Callable[[str, str], None]) -> Callable[[str, str], None]:
        def title(role: str, vm: str) -> None:
            self.write("T", f"{role} {vm}")
            function(role, vm)

        return title


def _start(path: str) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    trace = Trace(mmap.mmap(fd, SIZE))
    os.close(fd)
    installed = False

    def forked() -> None:
        # The first child of the zygote that has everything imported; its own children inherit the wrappers.
        nonlocal installed
        trace.write("F", "")
        import sys

        if not installed and "motorcade.orchestrator.supervisor" in sys.modules:
            installed = True
            trace.install()

    os.register_at_fork(after_in_child=forked)


if path := os.environ.get(FILE):
    _start(path)
