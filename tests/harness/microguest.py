"""Micro-guests: a freestanding ELF with a PVH note that does what its command line says (tests/guests/main.c).

It runs on any KVM, also one that emulates CPL 0, and in QEMU (``-M microvm -kernel``), within milliseconds.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
SOURCES = REPO / "tests" / "guests"
FLAGS = [
    "-m64",
    "-O2",
    "-g",
    "-ffreestanding",
    "-fno-pic",
    "-no-pie",
    "-nostdlib",
    "-static",
    "-mno-red-zone",
    "-mgeneral-regs-only",
    "-fno-stack-protector",
    "-fcf-protection=none",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wl,--build-id=none",
    "-Wl,-z,noexecstack",
    "-Wl,--no-warn-rwx-segments",
]


def build() -> Path:
    """The micro-guest's ELF file, compiled when its sources are not those of the cached one."""
    files = sorted(p for p in SOURCES.iterdir() if p.suffix in {".S", ".c", ".h", ".ld"})
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in files:
        digest.update(path.read_bytes())
    target = REPO / ".cache" / "microguest" / f"{digest.hexdigest()[:16]}.elf"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_suffix(f".{os.getpid()}")
        inputs = [str(p) for p in files if p.suffix in {".S", ".c"}]
        script = f"-Wl,-T,{SOURCES / 'link.ld'}"
        subprocess.run(["gcc", *FLAGS, script, "-o", str(beside), *inputs], check=True, timeout=60)
        beside.replace(target)
    return target
