"""The examples of the QMP reference on a micro-guest; harness/qmpexamples says how to add some."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.qmpexamples.replay import replay_all
from harness.qmpexamples.speakers import SPEAKERS
from harness.vm import VmHost, vm_host

pytestmark = pytest.mark.kvm


@pytest.fixture
def host(tmp_path: Path) -> Iterator[VmHost]:
    with vm_host(tmp_path) as h:
        yield h


@pytest.mark.parametrize("speaker", SPEAKERS)
def test_every_example_is_answered_as_documented(host: VmHost, guest: Path, tmp_path: Path, speaker: str) -> None:
    kernel = {"image": str(guest), "cmdline": "serve=0:0"}
    machine = {"name": "examples", "memory": "32M", "kernel": kernel}
    replay_all(host, tmp_path, machine, "micro", speaker)
