"""`capture:` of the net sidecar, read by tshark."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.frames import GUEST_MAC, ethernet
from harness.nic import Nic
from motorcade.orchestrator import netbackend
from motorcade.orchestrator.errors import UserError


class Captured:
    """A NIC on a stream that the test holds the other end of, capturing to a file."""

    def __init__(self, path: Path) -> None:
        self.fd = netbackend.open_capture(str(path))
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(20)
        with theirs:
            self.nic = Nic("passt", {"passt": theirs.fileno(), "capture": self.fd}).up()

    def exchange(self, i: int, size: int = 100) -> None:
        """A frame out, and one in."""
        self.nic.send(frame(i, size))
        assert self.sock.recv(4 + 14 + size, socket.MSG_WAITALL)[4:] == frame(i, size)
        self.sock.sendall(struct.pack("!I", 14 + size) + frame(i + 1, size))
        assert self.nic.recv_frame() == frame(i + 1, size)

    def close(self) -> int:
        status = self.nic.sidecar.shutdown()
        self.nic.sidecar.close()
        self.nic.memory.close()
        self.sock.close()
        os.close(self.fd)
        return status


def frame(i: int, size: int) -> bytes:
    return ethernet(b"\xff" * 6, GUEST_MAC, 0x88B5, struct.pack("!I", i).ljust(size, b"."))


def tshark(path: Path, *fields: str) -> list[list[str]]:
    wanted = [x for f in fields for x in ("-e", f)]
    run = subprocess.run(
        ["tshark", "-r", str(path), "-T", "fields", *wanted], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "cut short" not in run.stderr
    return [line.split("\t") for line in run.stdout.splitlines()]


needs_tshark = pytest.mark.skipif(not shutil.which("tshark"), reason="needs tshark")


@needs_tshark
def test_both_directions_in_order_and_appended(tmp_path: Path) -> None:
    path = tmp_path / "c.pcap"
    for run in range(2):
        nic = Captured(path)
        for i in range(0, 40, 2):
            nic.exchange(1000 * run + i, 46 + 50 * i)
        assert nic.nic.counters()["captured"] == 40
        assert nic.close() == 0
    rows = tshark(path, "frame.len", "frame.time_epoch", "data.data")
    assert len(rows) == 80
    assert [int(r[2][:8], 16) for r in rows] == [1000 * run + i for run in range(2) for i in range(40)]
    assert [int(r[0]) for r in rows[:40]] == [14 + 46 + 50 * (i & ~1) for i in range(40)]
    times = [float(r[1]) for r in rows]
    assert times == sorted(times)


@needs_tshark
def test_idle_means_written(tmp_path: Path) -> None:
    """A live capture can be followed: no shutdown is needed to see the packets."""
    path = tmp_path / "c.pcap"
    nic = Captured(path)
    nic.exchange(1)
    size = 24 + 2 * (16 + 114)
    nic.nic.poll_until(lambda: nic.nic.counters()["captured"] == 2 and path.stat().st_size == size, "records")
    assert len(tshark(path, "frame.len")) == 2
    nic.nic.sidecar.kill()
    assert len(tshark(path, "frame.len")) == 2
    nic.nic.sidecar.close()
    nic.nic.memory.close()
    nic.sock.close()
    os.close(nic.fd)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    where = tmp_path / "small"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(where)], check=True, timeout=20)
    yield where
    subprocess.run(["umount", "--lazy", str(where)], check=True, timeout=20)


@pytest.mark.root
@needs_tshark
def test_a_full_disk_ends_the_capture_and_not_the_traffic(small: Path) -> None:
    path = small / "c.pcap"
    nic = Captured(path)
    for i in range(0, 200, 2):
        nic.exchange(i, 1400)

    def said() -> list[str]:
        return [x["level"] for x in nic.nic.sidecar.log_lines() if "the capture stops" in x["msg"]]

    nic.nic.poll_until(lambda: bool(said()), "the warning")
    assert said() == ["warning"]
    assert nic.close() == 0
    rows = tshark(path, "data.data")
    assert 20 < len(rows) < 50
    assert [int(r[0][:8], 16) for r in rows] == list(range(len(rows)))


def test_files_that_are_not_ours_are_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "notes"
    other.write_text("not a capture, and longer than a header of a capture is")
    with pytest.raises(UserError, match="no pcap file"):
        netbackend.open_capture(str(other))
    assert other.read_text().startswith("not a capture")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="not a regular file"):
        netbackend.open_capture(str(tmp_path / "pipe"))
    with pytest.raises(UserError, match="No such file"):
        netbackend.open_capture(str(tmp_path / "none" / "c.pcap"))
