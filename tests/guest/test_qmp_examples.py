"""The examples of the QMP reference on Debian's kernel; harness/qmpexamples says how to add some."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.qmpexamples.replay import replay_all
from harness.qmpexamples.speakers import SPEAKERS
from harness.vm import VmHost

Machine = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("speaker", SPEAKERS)
def test_every_example_is_answered_as_documented(host: VmHost, linux: Machine, tmp_path: Path, speaker: str) -> None:
    replay_all(host, tmp_path, linux("examples"), "linux", speaker)
