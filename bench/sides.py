"""Two ways to run one guest with its 16550 on a pipe: ``vmmctl up`` and QEMU's microvm, both on /dev/kvm."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
MEMORY = 128 << 20
DEADLINE = 120.0  # seconds


@dataclass
class Running:
    """A started side. ``started``: time.monotonic() just before its command was run."""

    process: subprocess.Popen[bytes]
    started: float
    run_dir: Path | None

    def pids(self) -> dict[str, int]:
        """Its processes by role."""
        if self.run_dir is None:
            return {"qemu": self.process.pid}
        state = json.loads((self.run_dir / "bench" / "state.json").read_text())
        pids = {p["role"]: p["pid"] for p in state["processes"]}
        return {"vmmctl": self.process.pid, "supervisor": state["pid"], **pids}


@contextlib.contextmanager
def motorcade(
    kernel: Path,
    cmdline: str,
    *,
    initrd: Path | None = None,
    memory: int = MEMORY,
    cpus: int = 1,
    python: tuple[str, ...] = (),
    stderr: int | None = None,
) -> Iterator[Running]:
    """``vmmctl up`` in the foreground, its console on stdout; ``python``: options of the interpreter."""
    folder = Path(tempfile.mkdtemp(prefix="mc-bench-", dir="/tmp"))
    try:
        machine = {
            "name": "bench",
            "memory": memory,
            "cpus": cpus,
            "accel": "kvm",
            "kernel": {"image": str(kernel), "cmdline": cmdline, **({"initrd": str(initrd)} if initrd else {})},
        }
        (folder / "machine.yaml").write_text(json.dumps(machine))
        run_dir = folder / "run"
        run_dir.mkdir(mode=0o700)
        env = {**os.environ, "MOTORCADE_RUN_DIR": str(run_dir), "PYTHONPATH": str(REPO)}
        command = [sys.executable, *python, "-m", "motorcade.orchestrator.cli", "up", str(folder / "machine.yaml")]
        with _run(command, run_dir, env, stderr) as running:
            try:
                yield running
            finally:
                subprocess.run(
                    [sys.executable, "-m", "motorcade.orchestrator.cli", "down", "--force", "bench"],
                    env=env, check=True, timeout=DEADLINE, stdout=subprocess.DEVNULL,
                )  # fmt: skip
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def qemu(
    kernel: Path,
    cmdline: str,
    *,
    initrd: Path | None = None,
    memory: int = MEMORY,
    cpus: int = 1,
    extra: tuple[str, ...] = (),
) -> Iterator[Running]:
    """QEMU's leanest machine with the same devices: microvm, ISA serial port, nothing else. ``extra``: options."""
    command = [
        "qemu-system-x86_64", "-M", "microvm,pit=off,pic=off,rtc=off,isa-serial=on", "-accel", "kvm",
        "-m", str(memory >> 20), "-smp", str(cpus), "-nodefaults", "-no-user-config",
        "-display", "none", "-serial", "stdio",
        "-kernel", str(kernel), "-append", cmdline, *(("-initrd", str(initrd)) if initrd else ()), *extra,
    ]  # fmt: skip
    # Its warnings (CPU features that this KVM lacks) are of no interest here.
    with _run(command, None, dict(os.environ), subprocess.DEVNULL) as running:
        yield running


@contextlib.contextmanager
def _run(command: list[str], run_dir: Path | None, env: dict[str, str], stderr: int | None) -> Iterator[Running]:
    started = time.monotonic()
    with subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr) as process:
        try:
            yield Running(process, started, run_dir)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


SIDES = {"motorcade": motorcade, "qemu": qemu}
