"""The box's initramfs: busybox, the modules the box needs, and init.sh."""

import hashlib
import os
from pathlib import Path

from motorcade.orchestrator.box.cpio import Archive
from motorcade.orchestrator.box.kernel import Kernel
from motorcade.orchestrator.box.paths import cache_dir
from motorcade.orchestrator.errors import UserError

BUSYBOX = Path("/bin/busybox")

MODULES = ["virtio_mmio", "virtio_net", "virtiofs", "overlay", "kvm-amd", "tun"]
"""Loaded before anything else; the rest of the kernel's modules are there for modprobe."""

SCRIPTS = ["init", "rc", "enter", "leash"]

_INITTAB = b"""\
::once:/run/box/busybox sh /run/box/rc
::ctrlaltdel:/run/box/busybox poweroff -f
"""


class InitrdError(UserError):
    """Something that the initramfs is made of is missing; the message names it."""


def _scripts() -> dict[str, bytes]:
    here = Path(__file__).resolve().parent
    return {name: (here / f"{name}.sh").read_bytes() for name in SCRIPTS}


def version() -> str:
    """Tells boxes apart whose scripts differ: a running one keeps those that it was started with."""
    return hashlib.sha256(b"".join(_scripts().values())).hexdigest()[:16]


def ensure_initrd(kernel: Kernel) -> Path:
    """The box's initramfs for this kernel, from the cache where nothing it is made of has changed."""
    if not BUSYBOX.is_file():
        raise InitrdError(f"{BUSYBOX} is missing: apt-get install busybox-static")
    modules = kernel.module_files(MODULES)
    scripts = _scripts()
    key = hashlib.sha256(b"".join(scripts.values()) + Path(__file__).read_bytes())
    for path in [BUSYBOX, *modules]:
        status = path.stat()
        key.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    target = cache_dir() / "box" / f"initrd-{key.hexdigest()[:16]}.cpio"
    if target.is_file():
        return target

    archive = Archive()
    for name in ("bin", "modules", "etc"):
        archive.directory(name)
    archive.copy("bin/busybox", BUSYBOX, 0o755)
    archive.symlink("bin/sh", "busybox")
    for name, script in scripts.items():
        archive.file(name, script, 0o755)
    archive.file("etc/inittab", _INITTAB)
    archive.file("modules/order", "".join(f"{path.name}\n" for path in modules).encode())
    for path in modules:
        archive.copy(f"modules/{path.name}", path)
    target.parent.mkdir(parents=True, exist_ok=True)
    for old in target.parent.glob("initrd-*.cpio"):
        old.unlink(missing_ok=True)
    scratch = target.with_suffix(f".{os.getpid()}")
    scratch.write_bytes(archive.to_bytes())
    scratch.rename(target)
    return target
