"""cffi builders (API mode) of the sidecars' C data paths: one extension a kind.

Each kind is built from its PARTS: ``PART*.c`` of each; its declarations are their ``PART.cdef.h`` files, each next to a
header of the same name. ``python sidecars/native/build.py KIND`` builds one
in place; ``setup.py`` builds them all. ``MOTORCADE_SANITIZE=address,undefined`` builds with sanitizers.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
DEVICE = ["inflight", "watch", "virtqueue", "sandbox", "uffd"]
PARTS = {
    "blk": [*DEVICE, "blk"],
    "net": [*DEVICE, "net"],
    "serial": [*DEVICE, "serial"],
    "pager": ["sandbox", "uffd", "crc32c", "pager"],
    "vhost": [*DEVICE, "vhost"],
    # Of every kind that is written with the kit (sidecars/sdk), and what our own such kinds have in C.
    "queue": [*DEVICE, "queue", "balloon"],
    "seccomp": ["syscalls"],  # of the process that starts the others (sidecars/sandbox/filters.py)
}
LIBRARIES = {"blk": ["uring"], "net": ["uring"], "seccomp": ["seccomp"]}


def builder(kind: str, relative_to: Path | None = ROOT) -> FFI:
    """The builder of ``motorcade.sidecars._KIND``; setuptools wants paths relative to the project's root."""

    def path(p: Path) -> str:
        return os.path.relpath(p, relative_to) if relative_to else str(p)

    names = PARTS[kind]
    sources = sorted({p for name in names for p in HERE.glob(f"{name}*.c")})
    ffi = FFI()
    for name in names:
        ffi.cdef((HERE / f"{name}.cdef.h").read_text())
    flags = ["-O2", "-g", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-fvisibility=hidden"]
    link = []
    if sanitize := os.environ.get("MOTORCADE_SANITIZE"):
        flags += [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer"]
        link += [f"-fsanitize={sanitize}"]
    ffi.set_source(
        f"motorcade.sidecars._{kind}",
        "".join(f'#include "{name}.h"\n' for name in names),
        sources=[path(p) for p in sources],
        depends=[path(p) for p in sorted(HERE.glob("*.h"))],
        include_dirs=[path(HERE), path(ROOT / "core" / "native")],
        libraries=LIBRARIES.get(kind, []),
        extra_compile_args=flags,
        extra_link_args=link,
        py_limited_api=True,  # as setuptools does by itself: both ways then make a file of one name
    )
    return ffi


def build_in_place(kind: str, target_dir: Path = ROOT / "sidecars") -> Path:
    """Compiles one kind aside and renames it to where Python finds it: running processes keep the old one, two builds
    at once do not meet, and no object file is left in the tree."""
    with tempfile.TemporaryDirectory(prefix="motorcade-build-") as scratch:
        built = Path(builder(kind, relative_to=None).compile(tmpdir=scratch, verbose=False))
        target = target_dir / built.name
        beside = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copy2(built, beside)
        beside.replace(target)
    for stale in set(target_dir.glob(f"_{kind}.*.so")) - {target}:
        stale.unlink()  # Python may prefer it to the new one
    return target


blk = net = serial = pager = queue = vhost = seccomp = None
if __name__ == "__main__":
    for name in sys.argv[1:] or PARTS:
        build_in_place(name)
else:
    blk, net, serial, pager = builder("blk"), builder("net"), builder("serial"), builder("pager")
    queue, vhost, seccomp = builder("queue"), builder("vhost"), builder("seccomp")
