"""The serial sidecar's backends: pty, socket, file."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.console import TIMEOUT, read_exactly, read_until, uart_sidecar
from harness.uart_ring import RX_SIZE
from motorcade.orchestrator import charbackend

MNT_DETACH = 2
NOTE = rb"\r\n\[\.\.\. (\d+) bytes skipped \.\.\.\]\r\n"


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose path leaves room for a socket's name (107 bytes)."""
    path = Path(tempfile.mkdtemp(prefix="mc-"))
    yield path
    shutil.rmtree(path)


@contextlib.contextmanager
def opened(path: str) -> Iterator[int]:
    """A pty's slave, as screen(1) would open it, but without making it raw again."""
    fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
    try:
        yield fd
    finally:
        os.close(fd)


def test_pty_both_ways_and_raw(short: Path) -> None:
    backend = charbackend.open_pty(short / "link")
    with uart_sidecar(short, backend="pty", backend_fd=backend.fd) as (_, ring), opened(str(short / "link")) as tty:
        ring.print(b"a\nb\r\x03\x00\xff")
        assert read_exactly(tty, 7) == b"a\nb\r\x03\x00\xff"
        os.write(tty, b"x\ny\r\x03\x04\xff")
        assert ring.read(7) == b"x\ny\r\x03\x04\xff"
        assert ring.rx_filled == 0, "the pty echoed"
    backend.close()
    assert not (short / "link").is_symlink()


def test_pty_without_a_reader_keeps_the_bytes(short: Path) -> None:
    backend = charbackend.open_pty()
    with uart_sidecar(short, backend="pty", backend_fd=backend.fd, scrollback=1 << 20) as (_, ring):
        boot = b"".join(b"%07d\n" % i for i in range(10000))
        ring.print(boot)
        ring.drained()
        # Nothing is printed after the terminal is opened: the opening itself must bring the bytes.
        with opened(backend.path) as tty:
            assert read_exactly(tty, len(boot)) == boot
        ring.print(b"while away ")
        ring.drained()
        with opened(backend.path) as tty:
            assert read_exactly(tty, 11) == b"while away "
            os.write(tty, b"typed")
            assert ring.read(5) == b"typed"
    backend.close()


def test_pty_nobody_reads_costs_no_cpu(short: Path) -> None:
    backend = charbackend.open_pty()
    with uart_sidecar(short, backend="pty", backend_fd=backend.fd) as (sidecar, ring):
        with opened(backend.path) as tty:
            ring.print(b"x")
            assert read_exactly(tty, 1) == b"x"
        ring.print(b"y")
        ring.drained()

        def ticks() -> int:
            fields = Path(f"/proc/{sidecar.pid}/stat").read_text().rsplit(")", 1)[1].split()
            return int(fields[11]) + int(fields[12])

        before = ticks()
        with pytest.raises(TimeoutError):
            ring.read(1, timeout=0.5)
        assert ticks() - before < 4  # of 50
    backend.close()


def test_pty_reader_that_stops_does_not_hold_up_the_guest(short: Path) -> None:
    backend = charbackend.open_pty()
    with uart_sidecar(short, backend="pty", backend_fd=backend.fd) as (_, ring), opened(backend.path) as tty:
        data = b"".join(b"%07d\n" % i for i in range(200000))
        ring.print(data)
        ring.drained()
        ring.print(b"END")
        seen = read_until(tty, b"END")
        (skipped,) = re.findall(NOTE, seen)
        before, after = re.split(rb"\r\n\[\.\.\. \d+ bytes skipped \.\.\.\]\r\n", seen)
        assert data.startswith(before)
        assert (data + b"END").endswith(after)
        assert len(before) + int(skipped) + len(after) == len(data) + 3
        os.write(tty, b"q")
        assert ring.read(1) == b"q"
    backend.close()


def test_pty_input_back_pressure(short: Path) -> None:
    backend = charbackend.open_pty()
    with uart_sidecar(short, backend="pty", backend_fd=backend.fd) as (_, ring), opened(backend.path) as tty:
        os.set_blocking(tty, False)
        data = b"".join(b"%07d\n" % i for i in range(8192))
        sent = os.write(tty, data)
        got = b""
        while len(got) < len(data):
            with contextlib.suppress(BlockingIOError):
                sent += os.write(tty, data[sent:]) if sent < len(data) else 0
            got += ring.read(min(RX_SIZE, sent - len(got)))
        assert got == data
    backend.close()


def connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(TIMEOUT)
    sock.connect(str(path))
    return sock


def test_socket_gets_what_came_before_it_and_one_stream(short: Path) -> None:
    backend = charbackend.open_socket(short / "b.sock")
    assert (short / "b.sock").stat().st_mode & 0o777 == 0o600
    with uart_sidecar(short, backend="socket", backend_fd=backend.fd, scrollback=1000) as (_, ring):
        ring.print(b"boot ")
        with connect(short / "b.sock") as first:
            assert read_exactly(first.fileno(), 5) == b"boot "
            first.sendall(b"one")
            assert ring.read(3) == b"one"
            with connect(short / "b.sock") as second:
                # One at a time: the second waits until the first has gone.
                ring.print(b"for the first")
                assert read_exactly(first.fileno(), 13) == b"for the first"
                first.close()
                ring.print(b" for the second")
                assert read_exactly(second.fileno(), 15) == b" for the second"
                second.sendall(b"two")
                assert ring.read(3) == b"two"
    backend.close()
    assert not (short / "b.sock").exists()


def test_socket_and_console_at_once(short: Path) -> None:
    backend = charbackend.open_socket(short / "b.sock")
    with (
        uart_sidecar(short, backend="socket", backend_fd=backend.fd) as (sidecar, ring),
        connect(short / "b.sock") as peer,
        sidecar.client() as client,
    ):
        ring.print(b"both")
        assert read_exactly(peer.fileno(), 4) == read_exactly(client.fileno(), 4) == b"both"
        peer.sendall(b"p")
        assert ring.read(1) == b"p"
        client.sendall(b"c")
        assert ring.read(1) == b"c"
    backend.close()


def test_file_is_appended_to_and_whole_at_shutdown(short: Path) -> None:
    path = short / "log"
    path.write_bytes(b"earlier\n")
    backend = charbackend.open_file(path)
    with uart_sidecar(short, backend="file", backend_fd=backend.fd, scrollback=1 << 20) as (sidecar, ring):
        data = b"".join(b"%07d\n" % i for i in range(50000))
        ring.print(data)
        assert sidecar.shutdown() == 0
        assert path.read_bytes() == b"earlier\n" + data
    backend.close()


@pytest.fixture
def small_disk(short: Path) -> Iterator[Path]:
    """A tmpfs of 256 KiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    libc = ctypes.CDLL(None, use_errno=True)
    path = short / "disk"
    path.mkdir()
    if libc.mount(b"none", os.fsencode(path), b"tmpfs", 0, b"size=256k"):
        pytest.skip(f"no mount: {os.strerror(ctypes.get_errno())}")
    yield path
    assert libc.umount2(os.fsencode(path), MNT_DETACH) == 0


@pytest.mark.root
def test_full_disk_is_counted_logged_and_retried(short: Path, small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(128 << 10))
    backend = charbackend.open_file(small_disk / "log")
    with uart_sidecar(short, backend="file", backend_fd=backend.fd, scrollback=1 << 20) as (sidecar, ring):
        data = b"".join(b"%07d\n" % i for i in range(20000))
        ring.print(data)  # 160 KB on a disk with 128 KiB left: the guest is not held up
        ring.drained()
        sidecar.wait_counter("file_errors", 1)
        sidecar.wait_until(lambda: "No space left" in sidecar.log_tail(), "the log to say so")
        assert 0 < sidecar.counter("file_written") < len(data)
        with sidecar.client() as client:
            assert read_exactly(client.fileno(), len(data)) == data
        ballast.unlink()
        ring.print(b"more")
        sidecar.wait_counter("file_written", len(data) + 4)
        sidecar.wait_until(lambda: "can be written again" in sidecar.log_tail(), "the log to say so")
        assert sidecar.shutdown() == 0
        assert (small_disk / "log").read_bytes() == data + b"more"
    backend.close()


@pytest.mark.root
def test_disk_full_to_the_end_is_an_error_of_the_shutdown(short: Path, small_disk: Path) -> None:
    from motorcade.proto import messages as m

    (small_disk / "ballast").write_bytes(bytes(256 << 10))
    backend = charbackend.open_file(small_disk / "log")
    with uart_sidecar(short, backend="file", backend_fd=backend.fd) as (sidecar, ring):
        ring.print(b"lost")
        outcome = sidecar.request(m.Shutdown())
        assert isinstance(outcome, m.Error)
        assert "No space left" in outcome.text
        assert sidecar.wait_exit() == 1
    backend.close()


@pytest.mark.root
def test_bytes_lost_to_a_full_disk_are_noted_in_the_file(short: Path, small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(256 << 10))
    backend = charbackend.open_file(small_disk / "log")
    with uart_sidecar(short, backend="file", backend_fd=backend.fd, scrollback=0) as (sidecar, ring):
        data = b"".join(b"%07d\n" % i for i in range(100000))
        ring.print(data)
        ring.drained()
        sidecar.wait_counter("file_errors", 1)
        ballast.unlink()
        assert sidecar.shutdown() == 0
        text = (small_disk / "log").read_bytes()
        (skipped,) = re.findall(NOTE, text)
        _, after = re.split(rb"\r\n\[\.\.\. \d+ bytes skipped \.\.\.\]\r\n", text)
        assert data.endswith(after)
        assert int(skipped) + len(after) == len(data)
    backend.close()


def test_openers_say_what_is_wrong(short: Path) -> None:
    (short / "file").write_text("x")
    os.mkfifo(short / "fifo")
    with pytest.raises(charbackend.CharBackendError, match=r"/file: exists and is not a socket"):
        charbackend.open_socket(short / "file")
    with pytest.raises(charbackend.CharBackendError, match="107 bytes"):
        charbackend.open_socket(short / ("x" * 120))
    with pytest.raises(charbackend.CharBackendError, match="No such file"):
        charbackend.open_socket(short / "no" / "s")
    with pytest.raises(charbackend.CharBackendError, match="FIFO"):
        charbackend.open_file(short / "fifo")
    with pytest.raises(charbackend.CharBackendError, match="not a regular file"):
        charbackend.open_file(Path("/dev/null"))
    with pytest.raises(charbackend.CharBackendError, match="directory"):
        charbackend.open_file(short)
    with pytest.raises(charbackend.CharBackendError, match="not a symbolic link"):
        charbackend.open_pty(short / "file")
    assert (short / "file").read_text() == "x"


def test_stale_socket_is_replaced_and_a_live_one_is_not(short: Path) -> None:
    path = short / "s"
    stale = charbackend.open_socket(path)
    with pytest.raises(charbackend.CharBackendError, match="in use"):
        charbackend.open_socket(path)
    os.close(stale.fd)
    stale.fd = -1
    again = charbackend.open_socket(path)
    stale.close()  # it is another's by now
    assert path.exists()
    again.close()
    assert not path.exists()
