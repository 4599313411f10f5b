"""Fixtures for tests with Linux guests. They run where KVM can boot one: see harness/box.py."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from harness import images
from harness.agent import Agent
from harness.vm import VmHost, vm_host
from harness.where import GUEST_UNAME


@pytest.fixture(autouse=True)
def _say_which_linux(monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]) -> None:
    """Notes what the guests said they are when their agents came up, for the end of the output."""
    wait_ready = Agent.wait_ready

    def noting(self: Agent, timeout: float = 60.0) -> str:
        release = wait_ready(self, timeout)
        record_property(GUEST_UNAME, f"Linux {release}")
        return release

    monkeypatch.setattr(Agent, "wait_ready", noting)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[VmHost]:
    """VMs of this test."""
    with vm_host(tmp_path) as h:
        yield h


Machine = Callable[..., dict[str, Any]]


@pytest.fixture
def linux() -> Machine:
    """A machine.yaml with Debian's unmodified kernel; arguments are its fields."""
    return partial(_machine, images.CLOUD)


@pytest.fixture
def generic_linux() -> Machine:
    """The same with Debian's generic kernel, which has the driver of the VM generation ID."""
    return partial(_machine, images.GENERIC)


def _machine(
    flavour: images.Flavour, name: str = "linux", *, cmdline: str = "", load: bool = False, **fields: Any
) -> dict[str, Any]:
    """``load``: the guest has the program that works and checks itself."""
    kernel = {
        "image": str(images.kernel(flavour).image),
        "initrd": str(images.initrd(flavour, load=load)),
        # quiet: each character on an emulated serial port is an exit, and a box multiplies its cost.
        "cmdline": f"console=ttyS0 quiet panic=-1 {cmdline}".strip(),
    }
    return {"name": name, "memory": "256M", "cpus": 1, "kernel": kernel, **fields}


@pytest.fixture
def tap() -> Iterator[tuple[str, str, str]]:
    """A tap of this test's own: its name, the host's address on it, the guest's address."""
    name = "mctap0"
    subprocess.run(["ip", "tuntap", "add", name, "mode", "tap", "vnet_hdr"], check=True)
    try:
        subprocess.run(["ip", "addr", "add", "10.66.0.1/24", "dev", name], check=True)
        subprocess.run(["ip", "link", "set", name, "up"], check=True)
        yield name, "10.66.0.1", "10.66.0.2"
    finally:
        subprocess.run(["ip", "link", "del", name], check=True)
