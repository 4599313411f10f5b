"""A VM in the box as its user sees it from outside: up, ps, console, QMP, its disk's writes, down."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness import images
from harness.agent import Agent
from harness.vmmctl import Host, write_machine
from harness.where import GUEST_UNAME
from motorcade.orchestrator.box.vm import ensure_box, stop_box
from motorcade.orchestrator.qmpclient import QmpClient

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="the box needs root"),
    pytest.mark.skipif(not Path("/usr/bin/qemu-system-x86_64").exists(), reason="qemu-system-x86 is not installed"),
]


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as h:
        directory = h.run_dir / ".box"
        ensure_box(directory=directory, private=True)
        h.env["MOTORCADE_BOX_DIR"] = str(directory)
        try:
            yield h
        finally:
            assert stop_box(directory)


def test_a_linux_machine_in_the_box(host: Host, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    with open(tmp_path / "data.img", "wb") as image:
        image.truncate(1 << 20)
    file = write_machine(
        tmp_path,
        "inside",
        images.kernel().image,
        initrd=str(images.initrd()),
        cmdline="console=ttyS0 quiet panic=-1",
        memory="256M",
        accel="box",
        disks=[{"id": "data", "path": "data.img"}],
        qmp=[f"unix:{host.run_dir}/q"],
    )
    left = socket.socket(socket.AF_UNIX)  # by a VM that was killed
    left.bind(f"{host.run_dir}/q")
    left.close()
    assert "vmmctl console inside attaches" in host.vmmctl("up", "-d", str(file)).stdout
    agent = Agent.connect(host.run_dir / "inside" / "console-ttyS0.sock")
    try:
        agent.wait_ready(120)
        record_property(GUEST_UNAME, agent.check("uname -a"))
        agent.check("echo written in the box | dd of=/dev/vda conv=fsync 2>&1")
        # The write is on this host's file, not in the box's overlay.
        assert (tmp_path / "data.img").read_bytes().startswith(b"written in the box\n")
        for path in (host.run_dir / "inside" / "qmp.sock", host.run_dir / "q"):
            with QmpClient(path, timeout=60) as qmp:
                assert qmp.execute("query-status")["status"] == "running"
        assert json.loads(host.vmmctl("status", "--json", "inside").stdout)["accel"] == "box"
        host.vmmctl("down", "inside")
    finally:
        agent.close()
    assert host.names() == []
    assert not (host.run_dir / "q").exists()
