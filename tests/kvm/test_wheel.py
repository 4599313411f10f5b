"""The wheel: what is in it, and a VM started from it where there is no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from harness.vmmctl import REPO, Host, write_machine

pytestmark = pytest.mark.timeout(400)  # they are compiled

NAMES = ("blk", "net", "pager", "queue", "seccomp", "serial", "vhost")
EXTENSIONS = {"core/_native", *(f"sidecars/_{name}" for name in NAMES)}


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from what git tracks, as it is in the working tree now: a build leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in run("git", "ls-files", "-z", cwd=REPO).split("\0"):
        path = REPO / name
        if name.startswith(("tests/", "bench/")) or not (path.is_symlink() or path.is_file()):
            continue
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, source / name, follow_symlinks=False)
    run(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, source,
        cwd=folder,
    )  # fmt: skip
    [built] = folder.glob("*.whl")
    return built


def test_what_is_in_it(wheel: Path) -> None:
    """The package, whole, and nothing else: no C sources, objects, tests."""
    assert wheel.name.endswith(f"-cp311-abi3-{sysconfig.get_platform().replace('-', '_')}.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
    assert all(n.startswith("motorcade/") for n in names)
    found = {n.removeprefix("motorcade/") for n in names}
    assert {n.split(".")[0] for n in found if n.endswith(".so")} == EXTENSIONS
    assert all(f"{n}.abi3.so" in found for n in EXTENSIONS)
    tracked = run("git", "ls-files", "-z", "core", "proto", "sidecars", "orchestrator", cwd=REPO).split("\0")
    expected = {n for n in tracked if n and "/native/" not in n and (REPO / n).is_file()}
    assert {n for n in found if "/" in n and not n.endswith(".so")} == expected


@pytest.mark.kvm
def test_a_vm_from_it(wheel: Path, host: Host, guest: Path, tmp_path: Path) -> None:
    """Installed where Python has the libraries but not the checkout."""
    place = tmp_path / "installed"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", place, wheel, cwd=tmp_path)
    # Without site there is no editable install: only what is on this path.
    libraries = sysconfig.get_path("purelib")
    env = {**os.environ, "MOTORCADE_RUN_DIR": str(host.run_dir), "PYTHONPATH": f"{place}{os.pathsep}{libraries}"}
    python: list[str | Path] = [sys.executable, "-S"]
    where = run(*python, "-c", "import motorcade; print(motorcade.__file__)", cwd=tmp_path, env=env)
    assert where.strip() == str(place / "motorcade" / "__init__.py")
    vmmctl = [*python, place / "bin" / "vmmctl"]
    for words, expected in [("--help", "doctor"), ("doctor", "kvm"), ("schema", "$schema")]:
        assert expected in run(*vmmctl, words, cwd=tmp_path, env=env)
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    file = write_machine(
        tmp_path, "web", guest, cmdline="print=hello_there out=1540:52",
        disks=[{"id": "root", "path": "disk.img"}], consoles=[{"id": "hvc0"}],
    )  # fmt: skip
    assert run(*vmmctl, "up", file, cwd=tmp_path, env=env) == "hello there\n"
