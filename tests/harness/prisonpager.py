"""``python -m harness.prisonpager --boot-fd N``: a pager that tries to open a file, on the thread that
MOTORCADE_TEST_ATTEMPT names, when it is asked for its counters or told what to serve."""

import os
import runpy
from typing import Any

from harness.prisoners import ATTEMPTS
from motorcade.sidecars.pager.control import Control
from motorcade.sidecars.pager.main import Process

if __name__ == "__main__":
    target, name = {"main": (Process, "on_life"), "control": (Control, "_on_message")}[
        os.environ["MOTORCADE_TEST_ATTEMPT"]
    ]

    def attempt(*_: Any) -> None:
        """Instead of it."""
        ATTEMPTS["a file"][1]()

    setattr(target, name, attempt)
    runpy.run_module("motorcade.sidecars.pager", run_name="__main__")
