"""Limits in machine.yaml, and what is said where they cannot be set. (tests/guest sets them.)"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from motorcade.orchestrator import cgroups, config


def load(folder: Path, limits: str) -> config.Machine:
    file = folder / "machine.yaml"
    (folder / "k").touch()
    file.write_text(f"name: web\nmemory: 64M\nkernel: {{image: k}}\nlimits: {limits}\n")
    return config.load(str(file))[0]


def test_limits_are_read(tmp_path: Path) -> None:
    limits = load(tmp_path, "{cpu: 2, memory: 1G, pids: 64, sidecar: {cpu: 0.5, memory: 64M}}").limits
    assert limits is not None
    assert limits.sidecar is not None
    assert (limits.cpu, limits.memory, limits.pids) == (2.0, 1 << 30, 64)
    assert (limits.sidecar.cpu, limits.sidecar.memory, limits.sidecar.pids) == (0.5, 64 << 20, None)


@pytest.mark.parametrize(
    ("limits", "problem"),
    [
        ("{memory: 32M}", "4:10: limits.memory: 32M is less than the RAM (64M)"),
        ("{cpus: 2}", "limits.cpus: unknown key; did you mean 'cpu'?"),
        ("{cpu: 0}", "limits.cpu: 0 is too small"),
        ("{sidecar: {pids: 0}}", "limits.sidecar.pids: 0 is too small (the least is 1)"),
        ("{memory: lots}", "expected a size"),
    ],
)
def test_bad_limits(tmp_path: Path, limits: str, problem: str) -> None:
    with pytest.raises(config.ConfigError, match=re.escape(problem)):
        load(tmp_path, limits)


def test_a_place_that_is_no_cgroup_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTORCADE_CGROUP", str(tmp_path))
    assert cgroups.missing().startswith(f"no cgroup v2 hierarchy at {tmp_path}")
    machine = load(tmp_path, "{pids: 5}")
    assert machine.limits is not None
    with pytest.raises(cgroups.UserError, match=r"^limits: no cgroup v2 hierarchy at"):
        cgroups.Cgroup("web", machine.limits)
