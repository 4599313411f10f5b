"""What a sidecar gives up before it says that it is ready: privileges that no request of the guest's ever needs.

Death with the parent (``PR_SET_PDEATHSIG``) is the supervisor's to set, right after the fork.
"""

from __future__ import annotations

import os
from typing import Any


def enter(ffi: Any, lib: Any) -> None:
    """Drops capabilities, sets no_new_privs, forbids core dumps, through a kind's C extension (sandbox.h).

    Call it while the process has one thread. Raises OSError that names the step.
    """
    step = ffi.new("char const **")
    if errno := lib.mc_sandbox_enter(step):
        raise OSError(errno, f"sandbox: {ffi.string(step[0]).decode()}: {os.strerror(errno)}")
