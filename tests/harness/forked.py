"""vmmctl as a fork of the test's own process: no Python start, which takes seconds in the box."""

from __future__ import annotations

import os
import traceback

from harness.vm import _as_outside_pytest
from motorcade.orchestrator import cli, daemon


def vmmctl(*args: str) -> int:
    """Runs it to its end; its exit status. The environment is the test's."""
    daemon.preload()  # once, here: a fork then has it all
    with _as_outside_pytest():
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                status = cli.main(args)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
