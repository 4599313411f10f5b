"""Compiles C programs of the tests against the sidecars' C."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "sidecars" / "native"
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
WARN = ("-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter")


def compile_c(
    output: Path, sources: Sequence[Path], *, flags: Sequence[str] = SANITIZE, libs: Sequence[str] = ()
) -> Path:
    """Builds ``output``, an executable; the compiler's words are the test's failure. Returns it."""
    command = [
        "gcc",
        "-std=gnu11",
        "-O1",
        "-g",
        *WARN,
        *flags,
        f"-I{NATIVE}",
        f"-I{ROOT / 'tests' / 'harness' / 'native'}",
    ]
    command += ["-o", str(output), *map(str, sources), *(f"-l{lib}" for lib in ["pthread", *libs])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    return output


def run(program: Path, *arguments: str, timeout: float = 100) -> str:
    """Runs it; AssertionError with all it said unless it ends with status 0. Returns its standard output."""
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
