"""``python -m harness.prisonpager --boot-fd N``: a pager that makes the attempt which MOTORCADE_TEST_ATTEMPT ("THREAD
WHAT") names, when it is asked for its counters (thread control) or told what to serve (main)."""

import os
import runpy
from typing import Any

from harness.prisoners import ATTEMPTS
from motorcade.sidecars.pager.control import Control
from motorcade.sidecars.pager.main import Process

if __name__ == "__main__":
    thread, _, what = os.environ["MOTORCADE_TEST_ATTEMPT"].partition(" ")
    target, name = {"main": (Process, "on_life"), "control": (Control, "_on_message")}[thread]

    def attempt(*_: Any) -> None:
        """Instead of it."""
        ATTEMPTS[what][1]()

    setattr(target, name, attempt)
    runpy.run_module("motorcade.sidecars.pager", run_name="__main__")
