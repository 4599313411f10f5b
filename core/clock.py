"""The guest's clocks as a snapshot has them: kvmclock and time stamp counters, with the wall-clock time they go with.

Time stands still in a restored machine until it first runs. What is saved before that is what was restored.
"""

from __future__ import annotations

import logging
import struct
import time
from collections.abc import Callable, Sequence

from motorcade.core.kvm import KvmError, Vm
from motorcade.core.vcpustate import Vcpu

log = logging.getLogger(__name__)

_STATE = struct.Struct("<QQI")  # kvmclock and UTC since the epoch in nanoseconds, the counter's frequency in kHz

_PPM = 250  # that close is as good as equal: KVM's own tolerance (kvm.ko, tsc_tolerance_ppm)


class Clock:
    """Of one VM. ``now_ns`` is UTC in nanoseconds since the epoch."""

    def __init__(self, vm: Vm, vcpus: Sequence[Vcpu], now_ns: Callable[[], int] = time.time_ns) -> None:
        self._vm, self._vcpus, self._now_ns = vm, vcpus, now_ns
        self._stopped: bytes | None = None

    def save(self) -> bytes:
        """The clocks; the vCPUs must be parked."""
        if self._stopped is not None:
            return self._stopped
        return _STATE.pack(self._vm.clock(), self._now_ns(), self._vcpus[0].tsc_khz)

    def restore(self, data: bytes) -> None:
        """Keeps what ``save`` gave until ``start``; ValueError where it is not that."""
        if len(data) != _STATE.size:
            raise ValueError(f"{len(data)} bytes, not {_STATE.size}")
        khz = _STATE.unpack(data)[2]
        if not khz:
            raise ValueError("a time stamp counter that does not move")
        self._stopped = data
        here = self._vcpus[0].tsc_khz
        if abs(khz - here) * 1_000_000 > _PPM * here:
            self._scale(khz, here)

    def _scale(self, khz: int, here: int) -> None:
        """The guest measured its counter's frequency once, on another host."""
        try:
            for vcpu in self._vcpus:
                vcpu.scale_tsc(khz)
        except KvmError as e:
            # A guest with kvmclock is told of the change and does not mind; one that trusts the counter alone does.
            log.warning("the guest's time stamp counter ran at %d kHz, here it runs at %d: %s", khz, here, e)

    def start(self) -> int:
        """Has time go on, by as much as has passed on the wall since the save: that many nanoseconds. Before the vCPUs
        run."""
        if self._stopped is None:
            return 0
        kvmclock, realtime, _ = _STATE.unpack(self._stopped)
        self._stopped = None
        elapsed: int = max(0, self._now_ns() - realtime)  # this host's clock may be behind that of the other
        for vcpu in self._vcpus:
            vcpu.start_time(elapsed, vcpu.tsc_khz)
        self._vm.set_clock((kvmclock + elapsed) & (1 << 64) - 1)
        return elapsed
