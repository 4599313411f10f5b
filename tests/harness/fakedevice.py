"""A sidecar kind without a backend, for tests of the runtime: BlkBoot.path says how it behaves."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

from motorcade.proto.memory import GuestMemory
from motorcade.proto.messages import BlkBoot, Boot, DeviceState, QueueState, QueueStats, StatsReport
from motorcade.sidecars import _blk
from motorcade.sidecars.device import BrokenQueue, Device, QueueConfig


class FakeDevice(Device):
    """``refuse``: does not start; ``crash``: run() raises; ``return``: run() returns unasked; ``stuck``: run() goes on
    after stop() until the descriptor ``pipe`` is written to; ``close-fails``; ``uart``: always on, and no virtio
    device; ``slow``: quiesce() waits for ``pipe``; ``restless``: quiesce() fails as long as configuration byte 2 is 0.
    Configuration byte 3 of an always-on device is 1 while it holds; its state is configuration byte 4."""

    ffi, lib = _blk.ffi, _blk.lib

    def __init__(self, boot: Boot, fds: Mapping[str, int], memory: GuestMemory) -> None:
        super().__init__(boot, fds, memory)
        assert isinstance(boot.role, BlkBoot)
        self.behaviour = boot.role.path
        self.virtio_type = 0 if self.behaviour == "uart" else 2
        if self.behaviour == "refuse":
            raise ValueError("this backend is out of order")
        self._stop = os.eventfd(0)
        self._config = bytearray(8)
        self._broken: list[BrokenQueue] = []
        self.calls = 0

    features = 1 << 28
    queue_sizes = [256, 256]

    @property
    def always_on(self) -> bool:
        return self.behaviour == "uart"

    @property
    def config(self) -> bytes:
        return bytes(self._config)

    def activate(self, features: int, queues: Sequence[QueueConfig]) -> None:
        self._config[1] = len(queues)

    def run(self) -> None:
        self.calls += 1
        if self.behaviour == "crash":
            raise OSError(5, "the backend caught fire")
        if self.behaviour == "return":
            return
        os.eventfd_read(self._stop)
        if self.behaviour == "stuck":
            os.read(self.fds["pipe"], 1)

    def stop(self) -> None:
        os.eventfd_write(self._stop, 1)

    def reset(self) -> None:
        self._config[1] = 0
        self._broken.clear()

    def quiesce(self) -> None:
        if self.behaviour == "slow":
            os.read(self.fds["pipe"], 1)
        if self.behaviour == "restless" and not self._config[2]:
            raise OSError(28, "No space left on device")
        self._config[3] = self.always_on

    def resume(self) -> None:
        self._config[3] = 0

    def save(self) -> DeviceState:
        return DeviceState(1, bytes(self._config[4:5]), tuple(QueueState(i, 7, 7) for i in range(self._config[1])))

    def load(self, state: DeviceState) -> None:
        if state.version != 1 or len(state.data) != 1:
            raise ValueError("no state of a fake device")
        self._config[4] = state.data[0]

    def broken_queues(self) -> list[BrokenQueue]:
        return list(self._broken)

    def write_config(self, offset: int, data: bytes) -> None:
        if data == b"break":
            self._broken.append(BrokenQueue(1, "the test says so"))
            os.eventfd_write(self.event_fd, 1)
        else:
            self._config[offset : offset + len(data)] = data

    def stats(self) -> StatsReport:
        return StatsReport(queues=(QueueStats(index=0, requests=self.calls),))

    def close(self) -> None:
        if self.behaviour == "close-fails":
            raise OSError(28, "No space left on device")
        if "pipe" in self.fds:
            os.write(self.fds["pipe"], b"closed")

    def fileno_events(self) -> Mapping[int, Callable[[], None]]:
        return {self.fds["poke"]: self._poked} if "poke" in self.fds else {}

    def _poked(self) -> None:
        os.eventfd_read(self.fds["poke"])
        self._config[0] += 1
