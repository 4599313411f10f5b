"""Debian's kernels, fetched and unpacked into the cache without being installed.

The cloud kernel runs the box and most guests of the tests, the generic one those guests that need what it alone has:
the driver of the VM generation ID. ``$MOTORCADE_BOX_KERNEL`` and ``$MOTORCADE_GENERIC_KERNEL`` name other directories
of the same shape (``vmlinuz`` and ``lib/modules/RELEASE``), for hosts that are not Debian.
"""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from motorcade.orchestrator.box.paths import cache_dir, locked
from motorcade.orchestrator.errors import UserError

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Flavour:
    """One of Debian's kernels."""

    meta_package: str
    link: str
    """Its well-known name in the cache."""
    variable: str
    """Of the environment, for another one in its place."""


CLOUD = Flavour("linux-image-cloud-amd64", "kernel", "MOTORCADE_BOX_KERNEL")
GENERIC = Flavour("linux-image-amd64", "kernel-generic", "MOTORCADE_GENERIC_KERNEL")


class KernelError(UserError):
    """No kernel could be fetched, unpacked or understood; the message says what to do about it."""


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel package."""

    root: Path
    """Holds ``vmlinuz`` and ``lib/modules/RELEASE``."""
    release: str
    """What ``uname -r`` says in it."""

    @property
    def image(self) -> Path:
        """The bzImage, exactly as the distribution ships it."""
        return self.root / "vmlinuz"

    @property
    def modules(self) -> Path:
        return self.root / "lib" / "modules" / self.release

    def module_files(self, names: Iterable[str]) -> list[Path]:
        """The files of these modules and of all they depend on, in the order ``insmod`` needs.

        A name that is not there as a file but is compiled into the kernel is left out.

        Raises KernelError for a module that this kernel does not have.
        """
        files = {_canonical(path.name.split(".ko")[0]): path for path in self.modules.rglob("*.ko*")}
        builtin = {
            _canonical(Path(line).name.removesuffix(".ko"))
            for line in (self.modules / "modules.builtin").read_text().split()
        }
        ordered: dict[str, Path] = {}

        def add(name: str) -> None:
            name = _canonical(name)
            if name in ordered or name in builtin:
                return
            if name not in files:
                raise KernelError(f"kernel {self.release} has no module {name}")
            for dependency in _depends(files[name]):
                add(dependency)
            ordered[name] = files[name]

        for name in names:
            add(name)
        return list(ordered.values())


def _canonical(name: str) -> str:
    """Module names take - and _ as the same letter (kernel: scripts/mod, ``kvm-amd`` is ``kvm_amd``)."""
    return name.replace("-", "_")


def _depends(module: Path) -> Iterator[str]:
    """The ``depends=`` entry of a module's .modinfo section."""
    if module.suffix != ".ko":
        raise KernelError(f"{module}: compressed kernel modules are not supported")
    found = re.search(rb"(?:^|\0)depends=([^\0]*)\0", module.read_bytes())
    if found is None:
        raise KernelError(f"{module}: no depends= entry; not a kernel module?")
    yield from filter(None, found[1].decode().split(","))


def find_kernel(flavour: Flavour = CLOUD) -> Kernel | None:
    """The kernel that is in the cache already (or that the environment names), or None."""
    configured = os.environ.get(flavour.variable)
    root = Path(configured) if configured else cache_dir() / "guest" / flavour.link
    if not (root / "vmlinuz").is_file():
        if configured:
            raise KernelError(f"{flavour.variable}: {root}/vmlinuz: no such file")
        return None
    releases = sorted(path.name for path in (root / "lib" / "modules").iterdir())
    if len(releases) != 1:
        raise KernelError(f"{root}/lib/modules: expected one release, found {releases}")
    return Kernel(root.resolve(), releases[0])


def ensure_kernel(progress: Progress, flavour: Flavour = CLOUD) -> Kernel:
    """The cached kernel, fetched from Debian's archive first if need be (cloud: 27 MB, generic: 71 MB; seconds).

    Raises KernelError where apt cannot find, fetch or unpack it.
    """
    if kernel := find_kernel(flavour):
        return kernel
    guest = cache_dir() / "guest"
    with locked(guest / "lock"):
        if kernel := find_kernel(flavour):
            return kernel
        package = _real_package(flavour)
        progress(f"fetching the guest kernel: {package}")
        with tempfile.TemporaryDirectory(dir=guest, prefix="fetch-") as scratch:
            tree = _fetch(package, Path(scratch))
            release = tree.joinpath("lib/modules").iterdir().__next__().name
            boot = tree / "boot"
            (boot / f"vmlinuz-{release}").rename(tree / "vmlinuz")
            (boot / f"config-{release}").rename(tree / "config")
            shutil.rmtree(boot)
            # For modprobe inside the box and inside guests that mount this tree.
            _run(["depmod", "-b", str(tree), release])
            final = guest / f"kernel-{release}"
            shutil.rmtree(final, ignore_errors=True)
            tree.rename(final)
            # The tree appears under its well-known name whole or not at all.
            links = [(flavour.link, final.name)]
            if flavour is CLOUD:
                links.insert(0, ("vmlinuz", f"{final.name}/vmlinuz"))
            for name, target in links:
                link = Path(scratch) / "link"
                link.symlink_to(target)
                link.rename(guest / name)
    kernel = find_kernel(flavour)
    if kernel is None:
        raise KernelError(f"{guest / flavour.link} is gone again right after it was unpacked")
    return kernel


def _real_package(flavour: Flavour) -> str:
    """The package with the kernel in it, which the meta package depends on."""
    if shutil.which("apt-cache") is None:
        raise KernelError(f"apt-cache is not here: set {flavour.variable} to an unpacked kernel (docs/box.md)")
    listing = _run(["apt-cache", "depends", "--important", flavour.meta_package])
    for line in listing.splitlines():
        kind, _, name = line.strip().partition(": ")
        if kind == "Depends" and name.startswith("linux-image-"):
            return name
    raise KernelError(f"apt-cache knows no {flavour.meta_package}: run apt-get update first")


def _fetch(package: str, scratch: Path) -> Path:
    download = scratch / "deb"
    download.mkdir()
    # apt drops to the user _apt for downloads where the directory lets it.
    scratch.chmod(0o755)
    download.chmod(0o777)
    _run(["apt-get", "-q", "download", package], cwd=download)
    debs = list(download.glob("*.deb"))
    if len(debs) != 1:
        raise KernelError(f"apt-get download {package} left {len(debs)} packages")
    tree = scratch / "tree"
    _run(["dpkg-deb", "-x", str(debs[0]), str(tree)])
    return tree


def _run(command: list[str], cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True, timeout=300)
    except FileNotFoundError as error:
        raise KernelError(f"{command[0]} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise KernelError(f"{' '.join(command)} took more than five minutes") from error
    except subprocess.CalledProcessError as error:
        raise KernelError(f"{' '.join(command)} failed: {error.stderr.strip() or error.stdout.strip()}") from error
    return done.stdout
