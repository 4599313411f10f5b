"""vmmctl and its VMs in a test: a run directory of their own, and proof that nothing is left at the end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from motorcade.orchestrator import rundir

REPO = Path(__file__).resolve().parents[2]
DEADLINE = 60.0  # seconds, for anything; the machine may be busy


class Host:
    """A run directory with a short path (sockets), and vmmctl bound to it. Use as a context manager."""

    def __init__(self) -> None:
        self.run_dir = Path(tempfile.mkdtemp(prefix="mc-", dir="/tmp"))
        self.env = {**os.environ, "MOTORCADE_RUN_DIR": str(self.run_dir), "PYTHONPATH": str(REPO)}

    def __enter__(self) -> Host:
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        """Ends what still lives; a test that left processes behind has failed, if it had not already."""
        pids = [p for name in self.names() for p in self.live_pids(name)]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.run_dir)
        if pids and not failed:
            raise AssertionError(f"processes were left running: {pids}")

    def command(self, *args: str) -> list[str]:
        """The command line of vmmctl."""
        return [sys.executable, "-m", "motorcade.orchestrator.cli", *args]

    def vmmctl(self, *args: str, check: int | None = 0, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Runs it to its end. ``check``: the exit status that it must have (None: any). Its stderr is without the lines
        that say what takes long: on a busy machine anything may."""
        done = subprocess.run(
            self.command(*args), env=self.env, input=stdin, capture_output=True, text=True, timeout=DEADLINE
        )
        done.stderr = re.sub(r"(?m)^vmmctl: .*(?: \.\.\.|after [0-9.]+ s)\n", "", done.stderr)
        if check is not None:
            assert done.returncode == check, f"{args}: status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    @contextlib.contextmanager
    def running(self, *args: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
        """vmmctl in the foreground; killed at the end if it is still there."""
        pipe = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        with subprocess.Popen(self.command(*args), env=self.env, **pipe) as process:
            try:
                yield process
            finally:
                process.kill()

    def names(self) -> list[str]:
        """Of every run directory."""
        return [p.name for p in self.run_dir.iterdir() if p.is_dir() and not p.name.startswith(".")]

    def state(self, name: str) -> dict[str, Any]:
        """state.json of a living VM or of its record."""
        for path in (self.run_dir / name, self.run_dir / ".ended" / name):
            if (state := rundir.read_state(path)) != {}:
                return state
        return {}

    def live_pids(self, name: str) -> list[int]:
        """Those of the VM's processes, and its supervisor, that still run."""
        state = self.state(name)
        known = [(p["pid"], p["start"]) for p in state.get("processes", [])]
        if "pid" in state:
            known.append((state["pid"], state["start"]))
        return [pid for pid, start in known if start is not None and rundir.process_start(pid) == start]

    def pid(self, name: str, role: str) -> int:
        """Of one process of a running VM."""
        state = self.state(name)
        if role == "supervisor":
            return int(state["pid"])
        return int(next(p["pid"] for p in state["processes"] if p["role"] == role))

    def wait_for(self, what: str, condition: Callable[[], object]) -> None:
        """Polls until it holds: for conditions that no descriptor announces, such as a file of another process."""
        end = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < end, f"{what}: not within {DEADLINE:g} s"
            select.select([], [], [], 0.01)


def gone(pids: list[int]) -> None:
    """Waits until these processes have ended."""
    end = time.monotonic() + DEADLINE
    for pid in pids:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            left = end - time.monotonic()
            assert select.select([pidfd], [], [], max(left, 0))[0], f"process {pid} still lives"
        finally:
            os.close(pidfd)


def write_machine(folder: Path, name: str, kernel: Path | str, **fields: Any) -> Path:
    """A machine.yaml (as JSON, which YAML is) for bare KVM."""
    boot = {key: fields.pop(key) for key in ("cmdline", "initrd") if key in fields}
    machine: dict[str, Any] = {
        "name": name,
        "memory": "16M",
        "accel": "kvm",
        "kernel": {"image": str(kernel), **boot},
        **fields,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(machine))
    return path
