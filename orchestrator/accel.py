"""Where a VM runs: on this host's KVM, or in the box. The looking is doctor's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Choice:
    """``reason``: why it is not what one would expect; empty when there is nothing to explain."""

    name: Literal["kvm", "box"]
    reason: str = ""


def choose(wanted: str) -> Choice:
    """Turns ``accel:`` into a place. Only ``auto`` looks at the host."""
    if wanted != "auto":
        return Choice("box" if wanted == "box" else "kvm")
    from motorcade.orchestrator.kvmprobe import probe

    kvm = probe()
    return Choice("kvm") if kvm.boots_linux else Choice("box", kvm.summary)
