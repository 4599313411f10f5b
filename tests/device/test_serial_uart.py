"""The serial sidecar behind the 16550, with the core's end of the rings in the test."""

from __future__ import annotations

import contextlib
import re
import resource
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.console import SerialSidecar, read_exactly, read_until, uart_sidecar
from harness.sidecar import SidecarGone
from harness.uart_ring import RX_SIZE, TX_SIZE, UartRing


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose path leaves room for a socket's name (107 bytes)."""
    path = Path(tempfile.mkdtemp(prefix="mc-"))
    yield path
    shutil.rmtree(path)


def pattern(n: int) -> bytes:
    """Lines that say where they are, so that a lost or doubled byte shows."""
    return b"".join(b"%07d\n" % i for i in range(n // 8 + 1))[:n]


def test_output_reaches_a_client(short: Path) -> None:
    with uart_sidecar(short) as (sidecar, ring), sidecar.client() as client:
        ring.print(b"Linux version 6.1\r\n")
        assert read_exactly(client.fileno(), 19) == b"Linux version 6.1\r\n"


def test_cold_start(short: Path) -> None:
    with uart_sidecar(short, cold=True) as (sidecar, ring), sidecar.client() as client:
        ring.print(b"hello")
        assert read_exactly(client.fileno(), 5) == b"hello"
        assert sidecar.shutdown() == 0


def test_hello_is_not_a_virtio_device(short: Path) -> None:
    with uart_sidecar(short) as (sidecar, _):
        assert sidecar.hello is not None
        assert (sidecar.hello.virtio_type, sidecar.hello.queue_sizes, sidecar.hello.config) == (0, (), b"")


def test_late_client_sees_the_boot_then_live_bytes(short: Path) -> None:
    with uart_sidecar(short) as (sidecar, ring):
        boot = pattern(40000)
        ring.print(boot)
        ring.drained()
        with sidecar.client() as client:
            assert read_exactly(client.fileno(), len(boot)) == boot
            ring.print(b"login: ")
            assert read_exactly(client.fileno(), 7) == b"login: "


def test_late_client_sees_the_last_scrollback_bytes(short: Path) -> None:
    with uart_sidecar(short, scrollback=1000) as (sidecar, ring):
        boot = pattern(300000)
        ring.print(boot)
        ring.drained()
        with sidecar.client() as client:
            assert read_exactly(client.fileno(), 1000) == boot[-1000:]
            ring.print(b"$ ")
            assert read_exactly(client.fileno(), 2) == b"$ "


def test_without_scrollback_a_client_sees_live_bytes_only(short: Path) -> None:
    with uart_sidecar(short, scrollback=0) as (sidecar, ring):
        ring.print(b"secret")
        ring.drained()
        with sidecar.client() as client:
            sidecar.wait_counter("clients", 1)
            ring.print(b"live")
            assert read_exactly(client.fileno(), 4) == b"live"


def test_no_byte_lost_or_doubled_while_clients_attach(short: Path) -> None:
    """Clients attach in the middle of a stream; each must see one gapless run of it."""
    data = pattern(60000)
    with uart_sidecar(short, scrollback=1 << 20) as (sidecar, ring):
        clients: list[socket.socket] = []
        for at in range(0, len(data), 6000):
            ring.print(data[at : at + 3000])
            clients.append(sidecar.client())
            ring.print(data[at + 3000 : at + 6000])
        for client in clients:
            with client:
                assert read_exactly(client.fileno(), len(data)) == data


def test_a_client_that_never_reads_holds_up_nobody(short: Path) -> None:
    data = pattern(8 << 20)
    with uart_sidecar(short, scrollback=65536) as (sidecar, ring), sidecar.client() as stuck:
        sidecar.wait_counter("clients", 1)
        for at in range(0, len(data), 1 << 20):
            # Returns only when the sidecar has made room: it would time out if the guest were held up.
            ring.print(data[at : at + (1 << 20)])
        ring.drained()
        ring.print(b"END")
        with sidecar.client() as other:
            assert read_until(other.fileno(), b"END").endswith(data[-65533:] + b"END")
        seen = read_until(stuck.fileno(), b"END")
        notes = re.findall(rb"\r\n\[\.\.\. (\d+) bytes skipped \.\.\.\]\r\n", seen)
        assert len(notes) == 1
        before, after = re.split(rb"\r\n\[\.\.\. \d+ bytes skipped \.\.\.\]\r\n", seen)
        assert data.startswith(before)
        assert (data + b"END").endswith(after)
        assert len(before) + int(notes[0]) + len(after) == len(data) + 3
        assert re.match(rb"\d{7}\n", after), "goes on at a line's start"
        assert sidecar.counter("skipped") == int(notes[0])


def test_input_reaches_the_guest(short: Path) -> None:
    with uart_sidecar(short) as (sidecar, ring), sidecar.client() as client:
        client.sendall(b"root\n")
        assert ring.read(5) == b"root\n"


def test_input_of_several_clients_arrives_whole(short: Path) -> None:
    with uart_sidecar(short) as (sidecar, ring), sidecar.client() as a, sidecar.client() as b:
        for i in range(20):
            a.sendall(b"a%02d" % i)
            b.sendall(b"b%02d" % i)
        got = ring.read(120)
        words = [got[i : i + 3] for i in range(0, 120, 3)]
        assert [w for w in words if w[:1] == b"a"] == [b"a%02d" % i for i in range(20)]
        assert [w for w in words if w[:1] == b"b"] == [b"b%02d" % i for i in range(20)]


def test_input_back_pressure(short: Path) -> None:
    """A guest that does not read: ring and staging buffer fill, then the client's socket, and nothing is lost."""
    data = pattern(1 << 20)
    with uart_sidecar(short) as (sidecar, ring), sidecar.client() as client:
        client.setblocking(False)
        sent = client.send(data)
        ring.wait_rx_filled(RX_SIZE)
        assert ring.rx_filled == RX_SIZE
        # Output goes on meanwhile, and so does another client.
        ring.print(b"still here")
        assert read_exactly(client.fileno(), 10) == b"still here"
        client.setblocking(True)
        got = b""
        while len(got) < len(data):
            if sent < len(data):
                client.setblocking(False)
                try:
                    sent += client.send(data[sent:])
                except BlockingIOError:
                    assert sent > len(got)
            got += ring.read(min(RX_SIZE, sent - len(got)))
        assert got == data
        assert sidecar.counter("guest_in") == len(data)


def test_input_of_a_client_that_left_still_arrives(short: Path) -> None:
    data = pattern(3 * RX_SIZE + 100)
    with uart_sidecar(short) as (sidecar, ring):
        with sidecar.client() as client:
            client.sendall(data)
        ring.wait_rx_filled(RX_SIZE)
        assert ring.read(len(data)) == data
        # Its slot is free again once its end of file was seen, which is behind its last byte.
        with sidecar.client() as probe:
            probe.sendall(b"x")
            assert ring.read(1) == b"x"
            assert sidecar.counter("clients") == 1


def test_half_closed_client_still_sees_output(short: Path) -> None:
    with uart_sidecar(short) as (sidecar, ring), sidecar.client() as client:
        client.sendall(b"uname\n")
        client.shutdown(socket.SHUT_WR)
        assert ring.read(6) == b"uname\n"
        ring.print(b"Linux\n")
        assert read_exactly(client.fileno(), 6) == b"Linux\n"


def test_idle_clients_cost_no_cpu_when_they_hang_up(short: Path) -> None:
    """A hang-up is level-triggered: one that is not taken off the epoll makes a loop that never sleeps."""

    def ticks(pid: int) -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return int(fields[11]) + int(fields[12])

    with uart_sidecar(short) as (sidecar, ring):
        sidecar.client().close()
        with sidecar.client() as full:
            # The guest takes nothing, so the second client's input half stays open behind its hang-up.
            full.sendall(bytes(3 * RX_SIZE))
        ring.wait_rx_filled(RX_SIZE)
        before = ticks(sidecar.pid)
        # Half a second of nothing, by the clock of an event that does not come.
        with pytest.raises(TimeoutError):
            ring.wait_rx_filled(RX_SIZE + 1, timeout=0.5)
        assert ticks(sidecar.pid) - before < 4  # of 50


def test_too_many_clients_are_told_so(short: Path) -> None:
    with uart_sidecar(short) as (sidecar, ring):
        clients = [sidecar.client() for _ in range(16)]
        sidecar.wait_counter("clients", 16)
        with sidecar.client() as extra:
            assert b"too many consoles" in read_until(extra.fileno(), b"attached\r\n")
            assert extra.recv(1) == b""
        assert sidecar.counter("clients_refused") == 1
        clients.pop().close()
        # The guest's answer to input of the last but one shows that the loop has gone round since the hang-up.
        clients[0].sendall(b"x")
        assert ring.read(1) == b"x"
        with sidecar.client() as again:
            ring.print(b"ok")
            assert read_exactly(again.fileno(), 2) == b"ok"
        for client in clients:
            client.close()


def test_out_of_descriptors(short: Path) -> None:
    """The console waits in the backlog, the log says why, and it is served once there are descriptors again."""
    with uart_sidecar(short) as (sidecar, ring):
        assert sidecar.counter("clients") == 0  # the main loop has what it needs by now
        used = max(int(fd.name) for fd in Path(f"/proc/{sidecar.pid}/fd").iterdir()) + 1
        limits = resource.prlimit(sidecar.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(sidecar.pid, resource.RLIMIT_NOFILE, (used, limits[1]))
        with contextlib.ExitStack() as stack:
            # Numbers below the limit that are free are taken first.
            clients = [stack.enter_context(sidecar.client()) for _ in range(12)]
            sidecar.wait_until(lambda: "Too many open files" in sidecar.log_tail(), "the log to say so")
            assert sidecar.counter("clients") < len(clients)
            resource.prlimit(sidecar.pid, resource.RLIMIT_NOFILE, limits)
            ring.print(b"hello")
            for client in clients:
                assert read_exactly(client.fileno(), 5) == b"hello"


def test_slot_of_a_client_that_left_with_unread_input_is_given_away(short: Path) -> None:
    with uart_sidecar(short) as (sidecar, ring):
        with sidecar.client() as blocker:
            blocker.sendall(bytes(2 * RX_SIZE))
            ring.wait_rx_filled(RX_SIZE)
        for _ in range(40):
            with sidecar.client() as gone:
                gone.sendall(b"never read")
        with sidecar.client() as client:
            ring.print(b"hello")
            assert read_exactly(client.fileno(), 5) == b"hello"


@pytest.mark.parametrize("start", [(0, 0), (0xFFFFFF00, 0xFFFFFFF0)])
def test_positions_wrap(short: Path, start: tuple[int, int]) -> None:
    data = pattern(3 * TX_SIZE + 17)
    with uart_sidecar(short, start=start, scrollback=1 << 20) as (sidecar, ring), sidecar.client() as client:
        ring.print(data)
        assert read_exactly(client.fileno(), len(data)) == data
        for at in range(0, 2 * RX_SIZE, 256):
            client.sendall(data[at : at + 256])
            assert ring.read(256) == data[at : at + 256]


def test_replacement_goes_on_where_the_dead_one_stopped(short: Path) -> None:
    """The positions are in the shared ring: kill -9, and the next sidecar takes the next byte."""
    with UartRing() as ring:
        with SerialSidecar(short / "a.sock", ring=ring) as first, first.client() as client:
            ring.print(b"before ")
            assert read_exactly(client.fileno(), 7) == b"before "
            first.kill()
            assert ring.put(b"between ") == 8
        with SerialSidecar(short / "b.sock", ring=ring) as second, second.client() as client:
            ring.print(b"after")
            assert read_exactly(client.fileno(), 13) == b"between after"
            client.sendall(b"in")
            assert ring.read(2) == b"in"


@pytest.mark.parametrize("distance", [TX_SIZE + 1, 0x80000000, 0xFFFFFFFF])
def test_impossible_tx_position_is_an_empty_ring(short: Path, distance: int) -> None:
    with uart_sidecar(short) as (sidecar, ring), sidecar.client() as client:
        ring.print(b"good")
        assert read_exactly(client.fileno(), 4) == b"good"
        good = ring.tx_head
        ring.set_tx_head(good + distance)
        ring.signal()
        sidecar.wait_counter("hostile", 1)
        ring.set_tx_head(good)
        ring.print(b"again")
        assert read_exactly(client.fileno(), 5) == b"again"
        assert sidecar.alive


@pytest.mark.parametrize("distance", [1, 0x80000000, -RX_SIZE - 1])
def test_impossible_rx_position_is_a_full_ring(short: Path, distance: int) -> None:
    with uart_sidecar(short) as (sidecar, ring), sidecar.client() as client:
        ring.set_rx_tail(distance)
        client.sendall(b"input")
        sidecar.wait_counter("hostile", 1)
        assert sidecar.counter("guest_in") == 0
        ring.set_rx_tail(0)
        ring.signal()
        assert ring.read(5) == b"input"


def test_signals_without_bytes_do_no_harm(short: Path) -> None:
    with uart_sidecar(short) as (sidecar, ring), sidecar.client() as client:
        for _ in range(50):
            ring.signal()
        ring.print(b"x")
        assert read_exactly(client.fileno(), 1) == b"x"


def test_output_in_a_row_needs_few_wake_ups(short: Path) -> None:
    """A byte at a time, as a 16550 sends: the sidecar must not ask to be woken for each."""
    with uart_sidecar(short) as (sidecar, ring), sidecar.client() as client:
        for i in range(2000):
            assert ring.put(b"%d" % (i % 10)) == 1
        assert len(read_exactly(client.fileno(), 2000)) == 2000
        assert ring.wakeups < 1000


def test_last_words_reach_clients_before_the_end(short: Path) -> None:
    with uart_sidecar(short, scrollback=1 << 20) as (sidecar, ring), sidecar.client() as client:
        sidecar.wait_counter("clients", 1)
        words = pattern(300000) + b"reboot: Power down\r\n"
        ring.print(words[:250000])
        ring.drained()
        # No signal for the rest, nor for a client in the backlog: they are found by the last look.
        rest = words[250000:]
        assert ring.put(rest) == len(rest)
        with sidecar.client() as late:
            got: list[bytes] = []
            reader = threading.Thread(target=lambda: got.append(read_exactly(client.fileno(), len(words))))
            reader.start()
            assert sidecar.shutdown() == 0
            reader.join(20)
            assert got == [words]
            assert client.recv(1) == b""
            assert late.recv(4) == words[:4]


def test_shutdown_does_not_wait_for_a_client_that_never_reads(short: Path) -> None:
    with uart_sidecar(short) as (sidecar, ring), sidecar.client():
        sidecar.wait_counter("clients", 1)
        ring.print(bytes(4 << 20))
        assert sidecar.shutdown(timeout=5) == 0


def test_reset_keeps_consoles(short: Path) -> None:
    with uart_sidecar(short) as (sidecar, ring), sidecar.client() as client:
        ring.print(b"one ")
        sidecar.reset()
        ring.print(b"two")
        assert read_exactly(client.fileno(), 7) == b"one two"


@pytest.mark.parametrize(
    ("options", "why"), [({"size": 4096}, "Invalid argument"), ({"sealed": False}, "Operation not permitted")]
)
def test_ring_that_could_end_in_sigbus_is_refused(short: Path, options: dict[str, Any], why: str) -> None:
    with UartRing(**options) as ring, pytest.raises(SidecarGone, match=why):
        SerialSidecar(short / "c.sock", ring=ring).close()
