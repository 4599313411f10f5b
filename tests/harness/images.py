"""What the Linux guests of the tests are made of: Debian's kernel, an initramfs, a root file system.

All of it comes from the distribution (kernel package, busybox-static) and is built on demand into the cache;
the second time costs nothing. Nothing here needs root.

``python -m harness.images`` builds everything and prints the paths.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from motorcade.orchestrator.box.cpio import Archive
from motorcade.orchestrator.box.kernel import CLOUD, GENERIC, Flavour, Kernel, ensure_kernel
from motorcade.orchestrator.box.paths import cache_dir, locked

Files = dict[str, bytes | str]
"""By path: an executable's content, or a symbolic link's target."""

BUSYBOX = Path("/bin/busybox")
SCRIPTS = Path(__file__).resolve().parents[1] / "guests" / "linux"
ROOTFS_SIZE = 64 << 20
"""Bytes; sparse, a few MiB are used."""

MODULES = [
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio-rng",
    "virtio_balloon",
    "button",
    "evdev",
]

ON_DEMAND = ["virtiofs"]
"""In the initramfs as well, for tests that load them, in the order of the lines of /modules/on_demand."""

_INITTAB = b"::sysinit:/bin/rc\n"
_POWER_BUTTON = b"#!/bin/sh\nsync\nmount -o remount,ro /\npoweroff -f\n"


def kernel(flavour: Flavour = CLOUD) -> Kernel:
    """Debian's kernel, unmodified; ``kernel().image`` is its bzImage."""
    return ensure_kernel(_say, flavour)


def prepare(flavours: Iterable[Flavour] = (CLOUD,)) -> None:
    """Builds all that tests with these kernels need."""
    for flavour in flavours:
        initrd(flavour)
        initrd(flavour, load=True)
    rootfs()


def initrd(flavour: Flavour = CLOUD, *, load: bool = False) -> Path:
    """An initramfs that loads the virtio drivers, then mounts ``root=`` or runs the agents itself.

    ``load``: with ``load_program``."""
    linux = kernel(flavour)
    modules = linux.module_files(MODULES)
    files = _tree()
    if load:
        files["bin/load"] = load_program().read_bytes()
    files["init"] = (SCRIPTS / "init.sh").read_bytes()
    more = [path for path in linux.module_files([*MODULES, *ON_DEMAND]) if path not in modules]
    files["modules/on_demand"] = "".join(f"{path.name}\n" for path in more).encode()
    files.update({f"modules/{path.name}": path.read_bytes() for path in more})
    files["modules/order"] = "".join(f"{path.name}\n" for path in modules).encode()
    files.update({f"modules/{path.name}": path.read_bytes() for path in modules})
    name = "initrd" + ("-generic" if flavour is GENERIC else "") + ("-load" if load else "")
    return _cached(name, ".cpio", files, _write_initrd)


def load_program() -> Path:
    """The program that works and checks itself (tests/guests/linux/load.c): static, for any Linux."""
    source = SCRIPTS / "load.c"

    def build(files: Files, target: Path) -> None:
        command = ["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-s", "-o", target, source]
        subprocess.run(command, check=True)

    return _cached("load", "", {"load.c": source.read_bytes()}, build)


def rootfs() -> Path:
    """The pristine ext4 root file system: copy it (``copy_rootfs``), do not write to it."""
    return _cached("rootfs", ".ext4", _tree(), _write_ext4)


def copy_rootfs(target: Path) -> Path:
    """A copy of the root file system that a guest may write to (sparse, or reflinked where possible)."""
    subprocess.run(["cp", "--sparse=always", "--reflink=auto", str(rootfs()), str(target)], check=True)
    return target


def _tree() -> Files:
    """What initramfs and root file system have in common."""
    if not BUSYBOX.is_file():
        raise FileNotFoundError(f"{BUSYBOX} is missing: apt-get install busybox-static")
    tree: Files = {"bin/busybox": BUSYBOX.read_bytes()}
    applets = subprocess.run([BUSYBOX, "--list"], check=True, capture_output=True, text=True).stdout.split()
    tree |= {f"bin/{applet}": "busybox" for applet in applets if applet != "busybox"}
    tree |= {f"bin/{name}": (SCRIPTS / f"{name}.sh").read_bytes() for name in ("rc", "agent")}
    tree["sbin"] = "bin"
    tree["etc/inittab"] = _INITTAB
    tree["etc/passwd"] = b"root:x:0:0:root:/:/bin/sh\n"
    tree["etc/acpi/PWRF/00000080"] = _POWER_BUTTON
    return tree


_MOUNT_POINTS = ["dev", "proc", "sys", "run", "tmp", "root", "mnt"]


def _cached(name: str, suffix: str, files: Files, write: Callable[[Files, Path], None]) -> Path:
    key = hashlib.sha256(Path(__file__).read_bytes())
    for path, content in sorted(files.items()):
        key.update(f"{path} {len(content)} ".encode())
        key.update(content.encode() if isinstance(content, str) else content)
    target = cache_dir() / "guest" / f"{name}-{key.hexdigest()[:16]}{suffix}"
    if not target.exists():
        with locked(cache_dir() / "guest" / "lock"), tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            built = Path(scratch) / target.name
            write(files, built)
            built.rename(target)
        # A well-known name for whoever tries things by hand.
        link = target.with_name(f".{name}.{os.getpid()}")
        link.symlink_to(target.name)
        link.rename(target.with_name(name + suffix))
    return target


def _write_initrd(files: Files, target: Path) -> None:
    archive = Archive()
    for name in sorted({str(p) for path in files for p in Path(path).parents if p.name} | set(_MOUNT_POINTS)):
        archive.directory(name)
    # The kernel opens it for init before anything is mounted.
    archive.character_device("dev/console", 5, 1)
    for path, content in files.items():
        if isinstance(content, str):
            archive.symlink(path, content)
        else:
            archive.file(path, content, 0o755)
    target.write_bytes(archive.to_bytes())


def _write_ext4(files: Files, target: Path) -> None:
    tree = target.parent / "tree"
    for name in _MOUNT_POINTS:
        (tree / name).mkdir(parents=True)
    for path, content in files.items():
        file = tree / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            file.symlink_to(content)
        else:
            file.write_bytes(content)
            file.chmod(0o755)
    mkfs = shutil.which("mkfs.ext4") or "/sbin/mkfs.ext4"
    with open(target, "wb") as image:
        image.truncate(ROOTFS_SIZE)
    options = "root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0"
    command = [mkfs, "-q", "-F", "-L", "motorcade", "-E", options, "-d", str(tree), str(target)]
    subprocess.run(command, check=True, capture_output=True)


def _say(line: str) -> None:
    print(f"images: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    prepare([CLOUD, GENERIC])
    for path in (kernel().image, initrd(), kernel(GENERIC).image, initrd(GENERIC), rootfs()):
        print(path)
