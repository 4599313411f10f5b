"""cffi builder (API mode) of ``motorcade.core._native``: KVM's ioctls and structures, the vCPU exit loop, the 16550.

``python core/native/build.py`` builds it in place (an argument names another
directory to put it into); ``setup.py`` builds it for a wheel. Each ``NAME.cdef.h`` declares
what ``NAME.h`` offers to Python; its ``...`` are filled in by the compiler from the kernel's headers.
``MOTORCADE_SANITIZE=address,undefined`` builds with sanitizers.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SIDECARS = ROOT / "sidecars" / "native"  # virtqueue.h says what is shared with them; what else it has is everybody's
PARTS = {
    **dict.fromkeys(("kvm", "uart", "vcpu", "ramwriter", "dump"), HERE),
    **dict.fromkeys(("sandbox", "uffd", "crc32c"), SIDECARS),
}


def builder(relative_to: Path | None = ROOT) -> FFI:
    """The builder of ``motorcade.core._native``; setuptools wants paths relative to the project's root."""

    def path(p: Path) -> str:
        return os.path.relpath(p, relative_to) if relative_to else str(p)

    ffi = FFI()
    for part, folder in PARTS.items():
        ffi.cdef((folder / f"{part}.cdef.h").read_text())
    flags = ["-O2", "-g", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-fvisibility=hidden"]
    link = ["-pthread"]
    if sanitize := os.environ.get("MOTORCADE_SANITIZE"):
        flags += [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer"]
        link += [f"-fsanitize={sanitize}"]
    ffi.set_source(
        "motorcade.core._native",
        "".join(f'#include "{part}.h"\n' for part in PARTS),
        sources=[path(p) for part, folder in PARTS.items() for p in sorted(folder.glob(f"{part}*.c"))],
        depends=[path(p) for p in sorted(HERE.glob("*.h"))],
        include_dirs=[path(HERE), path(SIDECARS)],
        extra_compile_args=flags,
        extra_link_args=link,
        py_limited_api=True,  # as setuptools does by itself: both ways then make a file of one name
    )
    return ffi


def build_in_place(target_dir: Path = ROOT / "core") -> Path:
    """Compiles the extension aside and renames it to where Python finds it: running processes keep the old one, and
    two builds at once do not meet."""
    with tempfile.TemporaryDirectory(prefix="motorcade-build-") as scratch:
        built = Path(builder(relative_to=None).compile(tmpdir=scratch, verbose=False))
        target = target_dir / built.name
        beside = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copy2(built, beside)
        beside.replace(target)
    for stale in set(target_dir.glob("_native.*.so")) - {target}:
        stale.unlink()  # Python may prefer it to the new one
    return target


if __name__ == "__main__":
    build_in_place(*(Path(p) for p in sys.argv[1:2]))
else:
    ffibuilder = builder()
