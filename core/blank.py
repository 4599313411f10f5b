"""A VM made before anybody knows which machine it will be: RAM mapped and in its slots, interrupt controllers there.

A core that waits for its Boot (orchestrator/pool.py) makes one meanwhile: KVM lets milliseconds pass for a memory slot
(a grace period of SRCU), and nothing of the rest has to wait for a machine's description.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from motorcade.core._native import ffi, lib
from motorcade.core.kvm import Kvm, Vm
from motorcade.proto.framing import ControlServer
from motorcade.proto.memory import Region
from motorcade.sidecars import ground, sandbox
from motorcade.sidecars.ground import Ground


@dataclass(frozen=True)
class Blank:
    """Owns the VM until somebody takes it."""

    ground: Ground
    vm: Vm
    server: ControlServer


def make(fds: Mapping[str, int], regions: Sequence[Region], *, lazy: bool) -> Blank:
    """Of ``fds`` by label: ``memory``, ``kvm``, which must outlive it, and, perhaps, ``userfaultfd``; all stay the
    caller's. The process has one thread, and drops its privileges.

    ``lazy``: the memory fills itself. Errors: KvmError; as ground.make.
    """
    sandbox.load("core")
    # Memory that fills itself is registered before anything, KVM included, can touch it.
    made = ground.make(ffi, lib, "core", fds, regions, lazy=lazy)
    return Blank(made, Vm(Kvm(fds["kvm"]), made.memory), ControlServer())
