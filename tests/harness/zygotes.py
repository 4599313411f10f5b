"""A zygote of a test's own, started as vmmctl starts it, and proof that it leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from motorcade.orchestrator import zygoteclient

DEADLINE = 60.0  # seconds


@contextlib.contextmanager
def run_directory() -> Iterator[Path]:
    """$MOTORCADE_RUN_DIR for this process and those that it starts; short, for sockets. No zygote is left in it."""
    path = Path(tempfile.mkdtemp(prefix="mc-", dir="/tmp"))
    before = os.environ.get("MOTORCADE_RUN_DIR")
    os.environ["MOTORCADE_RUN_DIR"] = str(path)
    try:
        yield path
        with contextlib.suppress(zygoteclient.ZygoteError):  # it may be at its end already
            if (left := zygoteclient.find()) is not None:
                with left:
                    left.stop()
    finally:
        if before is None:
            del os.environ["MOTORCADE_RUN_DIR"]
        else:
            os.environ["MOTORCADE_RUN_DIR"] = before
        shutil.rmtree(path)


def status(zygote: zygoteclient.Zygote) -> dict[str, Any]:
    """What `vmmctl zygote status --json` shows."""
    return zygote.ask({"do": "status"})


def family(pid: int) -> list[psutil.Process]:
    """The zygote and all that descends from it."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def await_gone(processes: list[psutil.Process]) -> None:
    """Returns when all have ended."""
    _, alive = psutil.wait_procs(processes, timeout=DEADLINE)
    alive = [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not alive, f"left: {alive}"


def await_full(zygote: zygoteclient.Zygote, ready: int) -> dict[str, Any]:
    """The pool's first shelf once so many of its VMs are ready. The zygote makes one whenever it is quiet."""
    for _ in range(2000):
        pool = status(zygote)["pool"]
        if pool and pool[0]["ready"] >= ready:
            shelf: dict[str, Any] = pool[0]
            return shelf
        select.select([], [], [], 0.02)  # it tells nobody when; asking is all there is
    raise AssertionError(f"the pool is not full: {pool}")
