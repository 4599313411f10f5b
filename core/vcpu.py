"""The vCPU threads: start, park, go on, reset, stop; and what becomes of the exits that C hands over.

A thread runs in C without the GIL (native/vcpu.c). It comes back for an access that a bus has to answer, because it
was kicked, or because the guest cannot go on. *Parked* means: waiting here, with no access half done, so that its
state may be read and replaced.

A device handler runs on a vCPU's thread and must not wait for the vCPUs: to stop the machine it calls
``request_pause``, which returns at once, and has the main thread do the rest.
"""

from __future__ import annotations

import enum
import logging
import os
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from motorcade.core._native import lib
from motorcade.core.boot.entry import Entry
from motorcade.core.bus import Bus
from motorcade.core.kvm import Vm, check
from motorcade.core.vcpustate import Vcpu

log = logging.getLogger(__name__)

_WHOLE_SIZES = frozenset({1, 2, 4, 8})
_SUBERRORS = {
    lib.KVM_INTERNAL_ERROR_EMULATION: "an instruction that KVM cannot emulate",
    lib.KVM_INTERNAL_ERROR_SIMUL_EX: "simultaneous exceptions",
    lib.KVM_INTERNAL_ERROR_DELIVERY_EV: "an event that cannot be delivered",
    lib.KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON: "an exit reason of the hardware that KVM does not know",
}
_SYSTEM_EVENTS = {
    lib.KVM_SYSTEM_EVENT_SHUTDOWN: "shutdown",
    lib.KVM_SYSTEM_EVENT_RESET: "reset",
    lib.KVM_SYSTEM_EVENT_CRASH: "crash",
}


_NOTICED = 10_000_000  # nanoseconds: a guest's scheduler evens out less than that by itself
_RESET_RIP = 0xFFF0
# AMD leaves the guest's state undefined at a shutdown (APM volume 2, 15.14.3), and KVM replaces it by INIT's.
_AMD_SHUTDOWN = " (this processor lost its registers at that; below are those of an INIT)"


class StopReason(enum.Enum):
    """Why the vCPUs cannot go on."""

    TRIPLE_FAULT = "triple-fault"
    INTERNAL_ERROR = "internal-error"  # KVM gave up: emulation, entry, an error of KVM_RUN, an unknown exit
    SYSTEM_EVENT = "system-event"  # the guest told KVM, not us, that it is over
    DEVICE_ERROR = "device-error"  # an exception in a device's handler: our own bug


class Vcpus:
    """All vCPUs of a VM, a thread each."""

    def __init__(
        self,
        vm: Vm,
        cpus: int,
        mmio: Bus,
        pio: Bus,
        *,
        on_stop: Callable[[StopReason, str], None],
        on_parked: Callable[[], None] = lambda: None,
    ) -> None:
        """Creates the vCPUs; their threads come with ``start``.

        ``on_stop(reason, text)`` is called once, on a vCPU's thread, when the guest cannot go on; ``text`` has the
        registers. All vCPUs then park, and only ``reset`` gets them out. ``on_parked`` is called on a vCPU's thread
        whenever the last vCPU has parked (not for a request that finds them parked). Neither may wait for a vCPU.
        """
        if not 1 <= cpus <= vm.kvm.max_vcpus:
            raise ValueError(f"{cpus} vCPUs: KVM allows 1 to {vm.kvm.max_vcpus}")
        self._vm, self._mmio, self._pio = vm, mmio, pio
        self._on_stop, self._on_parked = on_stop, on_parked
        self._changed = threading.Condition()
        self._paused = True  # guarded by _changed, as all below
        self._since = 0  # monotonic nanoseconds: when it was; 0: the guest has not run yet
        self._ending = False
        self._failed = False
        self._parked: set[int] = set()
        self._threads: list[threading.Thread] = []
        check("the kick signal", lib.mc_vcpu_install_signal())
        supported = vm.kvm.supported_cpuid()
        self.vcpus: list[Vcpu] = []
        try:
            for index in range(cpus):
                self.vcpus.append(Vcpu(vm, index, cpus, supported))
        except BaseException:
            for vcpu in self.vcpus:
                vcpu.close()
            raise

    # From the main thread.

    def start(self, entry: Entry) -> None:
        """Puts vCPU 0 at ``entry``, makes the threads, and returns with all of them parked: ``resume`` lets them go."""
        for vcpu in self.vcpus:
            vcpu.prepare(entry if vcpu.index == 0 else None)
        self.start_threads()

    def start_threads(self) -> None:
        """Makes the threads for vCPUs whose state is set, by ``start`` or from a snapshot; they are parked."""
        self._threads = [
            threading.Thread(target=self._run, args=(vcpu,), name=f"vcpu{vcpu.index}", daemon=True)
            for vcpu in self.vcpus
        ]
        for thread in self._threads:
            thread.start()
        self.wait_parked(10.0)

    @property
    def tids(self) -> list[int]:
        """Linux thread ids, in vCPU order; 0 where a thread is not there."""
        return [vcpu.native.tid for vcpu in self.vcpus]

    @property
    def parked(self) -> bool:
        """Whether every vCPU is parked, or its thread gone."""
        with self._changed:
            return self._all_parked()

    def _all_parked(self) -> bool:
        return self._paused and len(self._parked) == len(self._threads)

    def wait_parked(self, timeout: float) -> None:
        """Returns when all are parked; TimeoutError after ``timeout`` seconds, RuntimeError on a vCPU's own thread.

        For callers that serve nothing which a device handler might wait for; others use ``on_parked``.
        """
        self._not_on_vcpu("wait for the vCPUs")
        with self._changed:
            if not self._changed.wait_for(self._all_parked, timeout):
                late = sorted({v.index for v in self.vcpus} - self._parked)
                raise TimeoutError(f"vCPUs {late} did not park within {timeout} s")

    def pause(self, timeout: float = 10.0) -> None:
        """``request_pause`` and ``wait_parked``."""
        self.request_pause()
        self.wait_parked(timeout)

    def resume(self, lost_ns: int | None = None) -> None:
        """Lets the vCPUs go on. RuntimeError after a stop by the guest or an error, until ``reset``.

        ``lost_ns``: for how long the guest's clocks went on without it; left out: since it was paused.
        """
        with self._changed:
            if self._failed:
                raise RuntimeError("the vCPUs were stopped by an error; only a reset gets them going")
            if lost_ns is None and self._paused and self._since:
                lost_ns = time.monotonic_ns() - self._since
            if lost_ns is not None and lost_ns >= _NOTICED and self._all_parked():
                for vcpu in self.vcpus:
                    vcpu.lose_time(lost_ns)
            self._paused = False
            for vcpu in self.vcpus:
                lib.mc_vcpu_clear_kick(vcpu.native)
            self._changed.notify_all()

    def reset(self, entry: Entry) -> None:
        """Reset of the processors and interrupt controllers: vCPU 0 to ``entry``, the others to waiting for SIPI.

        All must be parked, and stay so. Devices are reset before, so that none of them holds a line up.
        """
        if not self.parked:
            raise RuntimeError("a reset needs the vCPUs parked")
        self._vm.reset()
        # The boot processor last: restoring its APIC must not find the others' leftovers of an INIT in flight.
        for vcpu in reversed(self.vcpus):
            vcpu.reset(entry if vcpu.index == 0 else None)
        with self._changed:
            self._failed = False

    def close(self, timeout: float = 10.0) -> None:
        """Ends the threads and closes the vCPUs; TimeoutError where one is stuck in a device's handler."""
        self._not_on_vcpu("end the vCPUs")
        with self._changed:
            self._ending = True
            self._request_pause()
            self._changed.notify_all()
        until = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                raise TimeoutError(f"{thread.name} did not end within {timeout} s")
        for vcpu in self.vcpus:
            vcpu.close()

    def _not_on_vcpu(self, what: str) -> None:
        if threading.current_thread() in self._threads:
            raise RuntimeError(f"a device handler must not {what}: it runs on one of them")

    # From any thread.

    def request_pause(self) -> None:
        """Has every vCPU park as soon as its present access is done, and returns at once."""
        with self._changed:
            self._request_pause()

    def _request_pause(self) -> None:
        if not self._paused:
            self._since = time.monotonic_ns()
        self._paused = True
        for vcpu in self.vcpus:
            if vcpu.index not in self._parked:
                check(f"kicking vCPU {vcpu.index}", lib.mc_vcpu_kick(vcpu.native))

    # On a vCPU's thread.

    def _run(self, vcpu: Vcpu) -> None:
        try:
            check(f"thread of vCPU {vcpu.index}", lib.mc_vcpu_bind_thread(vcpu.native, b"vcpu%d" % vcpu.index))
            while self._park(vcpu):
                self._serve(vcpu)
        except Exception:
            self._stop(StopReason.DEVICE_ERROR, f"vCPU {vcpu.index}'s thread failed:\n{traceback.format_exc()}")
        finally:
            with self._changed:
                vcpu.native.tid = 0
                self._parked.add(vcpu.index)
                self._changed.notify_all()

    def _park(self, vcpu: Vcpu) -> bool:
        """Waits while the VM is paused; False when the thread is to end."""
        with self._changed:
            waited = False
            while self._paused and not self._ending:
                if not waited:
                    waited = True
                    self._parked.add(vcpu.index)
                    if self._all_parked():
                        self._changed.notify_all()
                        self._on_parked()
                self._changed.wait()
            self._parked.discard(vcpu.index)
            if self._ending:
                return False
        if waited:
            # Tells a guest with kvmclock that it was stopped, for its watchdogs; EINVAL from one without.
            lib.mc_ioctl_value(vcpu.fd, lib.KVM_KVMCLOCK_CTRL, 0)
        return True

    def _serve(self, vcpu: Vcpu) -> None:
        """Runs the guest until it is to park."""
        native, run = vcpu.native, lib.mc_vcpu_run
        mmio, pio = lib.MC_EXIT_MMIO, lib.MC_EXIT_PIO
        while True:
            kind = run(native)
            if kind in (mmio, pio):
                try:
                    self._access(native.exit, self._mmio if kind == mmio else self._pio)
                except Exception:
                    e = native.exit
                    what = f"{'write' if e.is_write else 'read'} of {e.size} bytes at {e.addr:#x}"
                    self._stop(
                        StopReason.DEVICE_ERROR,
                        f"vCPU {vcpu.index}: a device failed at a {what}:\n{traceback.format_exc()}{vcpu.dump()}",
                    )
                    return
            elif kind == lib.MC_EXIT_PAUSED:
                return
            else:
                reason, text = self._explain(kind, native.exit, vcpu.rip == _RESET_RIP)
                self._stop(reason, f"vCPU {vcpu.index}: {text}\n{vcpu.dump()}")
                return

    @staticmethod
    def _access(e: Any, bus: Bus) -> None:
        if e.size not in _WHOLE_SIZES:
            # A part of an access that crosses a page: no device is laid out like that.
            e.data = (1 << 64) - 1
        elif e.is_write:
            bus.write(e.addr, e.size, e.data)
        else:
            e.data = bus.read(e.addr, e.size)

    @staticmethod
    def _explain(kind: int, e: Any, after_init: bool) -> tuple[StopReason, str]:
        details = " ".join(f"{d:#x}" for d in e.details[0 : e.n_details])
        if kind == lib.MC_EXIT_SHUTDOWN:
            return StopReason.TRIPLE_FAULT, "triple fault" + _AMD_SHUTDOWN * after_init
        if kind == lib.MC_EXIT_SYSTEM_EVENT:
            return (
                StopReason.SYSTEM_EVENT,
                f"the guest ended: {_SYSTEM_EVENTS.get(e.code, f'event {e.code}')} {details}",
            )
        if kind == lib.MC_EXIT_INTERNAL_ERROR:
            text = f"KVM internal error {e.code}: {_SUBERRORS.get(e.code, 'unknown')} ({details})"
        elif kind == lib.MC_EXIT_FAIL_ENTRY:
            text = f"the processor refused to enter the guest: reason {e.details[0]:#x} on host CPU {e.details[1]}"
        elif kind == lib.MC_EXIT_DEBUG:
            text = f"a debug exit that nobody asked for ({details})"
        elif kind == lib.MC_EXIT_ERROR:
            text = f"KVM_RUN: {os.strerror(e.code)}"
        else:
            text = f"KVM exit reason {e.code}, which is not handled"
        return StopReason.INTERNAL_ERROR, text

    def _stop(self, reason: StopReason, text: str) -> None:
        with self._changed:
            first = not self._failed
            self._failed = True
            self._request_pause()
        log.error("%s: %s", reason.value, text)
        if first:
            self._on_stop(reason, text)
