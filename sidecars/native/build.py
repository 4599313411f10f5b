"""cffi builders (API mode) of the sidecars' C data paths: one extension a kind.

Each kind is built from ``KIND*.c``, ``virtqueue*.c`` and ``sandbox*.c``; its declarations are their ``.cdef.h`` files,
each next to a header of the same name. ``python sidecars/native/build.py KIND`` builds one
in place; ``setup.py`` builds them all. ``MOTORCADE_SANITIZE=address,undefined`` builds with sanitizers.
"""

import os
import shutil
import sys
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LIBRARIES = {"blk": ["uring"], "net": ["uring"], "serial": []}


def builder(kind: str) -> FFI:
    """The builder of ``motorcade.sidecars._KIND``."""
    names = ["virtqueue", "sandbox", kind]
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
        sources=[os.path.relpath(p, ROOT) for p in sources],
        depends=[os.path.relpath(p, ROOT) for p in sorted(HERE.glob("*.h"))],
        include_dirs=[os.path.relpath(HERE, ROOT), "core/native"],
        libraries=LIBRARIES[kind],
        extra_compile_args=flags,
        extra_link_args=link,
    )
    return ffi


def build_in_place(kind: str) -> None:
    """Compiles one kind below build/ and moves the extension to where Python finds it."""
    os.chdir(ROOT)
    # The generated C file's sources are relative to the root; distutils keeps that shape below tmpdir.
    out = Path(builder(kind).compile(tmpdir=".", verbose=False))
    target = ROOT / "sidecars" / out.name
    if out.resolve() != target.resolve():
        shutil.move(out, target)
    for name in [f"_{kind}.c", f"_{kind}.o"]:
        (ROOT / "sidecars" / name).unlink(missing_ok=True)


blk = net = serial = None
if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(LIBRARIES):
        build_in_place(name)
else:
    blk, net, serial = builder("blk"), builder("net"), builder("serial")
