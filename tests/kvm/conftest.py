"""What the tests on /dev/kvm share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness import microguest
from harness.microvm import MicroVm
from harness.vmmctl import Host


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without /dev/kvm the tests that need it are skipped, with the reason."""
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        return
    why = "/dev/kvm is not there" if not os.path.exists("/dev/kvm") else "/dev/kvm is not accessible"  # noqa: PTH110
    for item in items:
        if item.get_closest_marker("kvm"):
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture
def micro_vm() -> Iterator[Callable[..., MicroVm]]:
    """Makes MicroVms (same arguments), not started, that end with the test."""
    made: list[MicroVm] = []

    def make(cmdline: str, *, cpus: int = 1, memory: int = 64 << 20, attach: bool = True) -> MicroVm:
        made.append(MicroVm(cmdline, cpus=cpus, memory=memory, attach=attach))
        return made[-1]

    yield make
    for vm in made:
        vm.close()


@pytest.fixture
def host() -> Iterator[Host]:
    """vmmctl, with a run directory of the test's own."""
    with Host() as h:
        yield h


@pytest.fixture(scope="module")
def guest() -> Path:
    """The micro-guest's ELF file."""
    return microguest.build()
