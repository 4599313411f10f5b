"""docs/write-a-sidecar.md, word for word: its files are written, its commands run. And what `sidecar new` writes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import microguest
from harness.sidecar import Sidecar
from harness.vmmctl import REPO, Host
from motorcade.orchestrator import cli, skeleton
from motorcade.proto import messages as m

BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def host() -> Iterator[Host]:
    """vmmctl, with a run directory of the test's own."""
    with Host() as h:
        yield h


def environment(host: Host, folder: Path) -> dict[str, str]:
    """Where `pip install` installs into the test's own folder, without looking for anything elsewhere."""
    site = folder / "site"
    return {
        **host.env,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{REPO}:{site}",
        "MOTORCADE": str(REPO),
        "PIP_TARGET": str(site),
        "PIP_NO_INDEX": "1",
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip's way to say that there is none
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }


@pytest.mark.kvm
@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="the guide starts a VM, which needs /dev/kvm")
def test_the_guide_followed_word_for_word(host: Host, tmp_path: Path) -> None:
    (tmp_path / "vmlinuz").write_bytes(microguest.build().read_bytes())  # it knows no driver, and sleeps
    env = environment(host, tmp_path)
    output = ""
    for kind, name, text in BLOCK.findall((REPO / "docs" / "write-a-sidecar.md").read_text()):
        if name:
            (tmp_path / name).write_text(text)
            continue
        assert kind == "sh"
        command = ["bash", "-euc", text]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        output += done.stdout
    assert "1 passed" in output
    assert re.search(r"^d20 +dice +\d+ +running +0 .* dice sides=20$", output, re.MULTILINE), output
    assert '"rolls": 0' in output
    device = (tmp_path / "dice/motorcade_dice/device.py").read_text()
    assert len(device.splitlines()) < 100
    check(tmp_path / "dice")


def check(package: Path) -> None:
    """ruff and mypy have nothing to say of it."""
    source = next(package.glob("motorcade_*"))
    config = REPO / "pyproject.toml"
    for tool in (["ruff", "check", "--config", str(config)], ["ruff", "format", "--check", "--config", str(config)]):
        done = subprocess.run([sys.executable, "-m", *tool, str(package)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
    mypy = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir", str(REPO / ".mypy_cache/new")]
    env = {**os.environ, "MYPYPATH": str(REPO)}
    follow = ["--follow-imports=silent", "--ignore-missing-imports", str(source)]
    done = subprocess.run([*mypy, *follow], env=env, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_skeleton_is_clean_and_its_device_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "magic-echo"
    assert cli.main(["sidecar", "new", "magic-echo", "--into", str(folder)]) == 0
    check(folder)
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    target = project["project"]["entry-points"]["motorcade.sidecars"]["magic-echo"]
    assert target == "motorcade_magic_echo.device:MagicEchoDevice"
    monkeypatch.setenv("PYTHONPATH", str(folder))
    role = m.KitBoot("echo0", "magic-echo", '{"greeting": "echo: "}')
    with Sidecar(target, role, {}, queues=1, cold=True) as sidecar:
        assert sidecar.config == (6).to_bytes(4, "little")
        (queue,) = sidecar.start()
        request = queue.run(out=[b"hello ", b"there"], into=[4, 30])
        assert b"".join(request.data)[: request.written] == b"echo: HELLO THERE"
        assert sidecar.stats().detail == (m.Counter("answered", 1),)
        sidecar.quiesce()
        state = sidecar.save()
        assert state.data == (1).to_bytes(8, "little")
        sidecar.resume()
        queue.submit(into=[8])
        queue.kick()
        assert sidecar.wait_needs_reset()


@pytest.mark.parametrize("kind", ["rng", "blk", "core", "Dice", "a b", "../dice", "lambda", "9", "x" * 32, ""])
def test_names_that_cannot_be_a_kind(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sidecar", "new", kind, "--into", str(tmp_path / "new")]) == 2
    assert "kind" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sidecar", "new", "dice", "--into", str(tmp_path)]) == 1
    assert "there already" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert skeleton.files("dice")["motorcade_dice/device.py"].count("DiceDevice") == 1
