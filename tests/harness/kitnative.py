"""The function in C of tests/device/native/kit_handler.c, compiled as anybody would.

Loaded at import, as a package's own extension is: a sidecar that runs cannot open a file.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
SOURCE = REPO / "tests" / "device" / "native" / "kit_handler.c"


def _build() -> Path:
    target = REPO / ".cache" / "kit" / f"{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_suffix(f".{os.getpid()}")
        flags = ["-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror"]
        subprocess.run(["gcc", *flags, "-o", str(beside), str(SOURCE)], check=True, timeout=60)
        beside.replace(target)
    return target


_library = ctypes.CDLL(str(_build()))
HANDLER: int = ctypes.cast(_library.handler, ctypes.c_void_p).value or 0
