"""The serial sidecar at rest, saved, and going on in another process: no byte lost or doubled, either way."""

from __future__ import annotations

import random
import shutil
import socket
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.console import SerialSidecar, read_exactly, read_until, uart_sidecar
from harness.driver import Queue
from harness.uart_ring import RX_SIZE
from motorcade.orchestrator import charbackend
from motorcade.proto import messages as m

F_SIZE = 1
FIXED = struct.Struct("<QII")  # features, bytes of input, bytes of output


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose path leaves room for a socket's name (107 bytes)."""
    path = Path(tempfile.mkdtemp(prefix="mc-"))
    yield path
    shutil.rmtree(path)


def pattern(n: int, start: int = 0) -> bytes:
    """Lines that say where they are, so that a lost or doubled byte shows."""
    return b"".join(b"%07d\n" % i for i in range(start, start + n // 8 + 1))[:n]


def console(features: int = 0, pending: bytes = b"", history: bytes = b"") -> m.DeviceState:
    return m.DeviceState(1, FIXED.pack(features, len(pending), len(history)) + pending + history)


def fill(rx: Queue, count: int, size: int = 64) -> None:
    """Gives the device ``count`` receive buffers."""
    for _ in range(count):
        rx.submit(into=[size])
    rx.kick()


def typed(rx: Queue, n: int, size: int = 64) -> bytes:
    """Waits for ``n`` bytes of input, giving a new buffer for each that came back."""
    data = b""
    while len(data) < n:
        for request in rx.wait(1):
            data += b"".join(request.data)[: request.written]
            rx.submit(into=[size])
        rx.kick()
    return data


# Behind the 16550.


def test_16550_at_rest_moves_nothing_and_loses_nothing(short: Path) -> None:
    lines = [pattern(3000, 1000 * i) for i in range(30)]
    with uart_sidecar(short, scrollback=1 << 20) as (sidecar, ring), sidecar.client() as client:
        said = b""
        for i, line in enumerate(lines):
            ring.print(line[:2000])
            client.sendall(b"%04d" % i)
            sidecar.quiesce()
            # The guest stood still before that: all that it had printed is taken, and shown.
            assert ring.tx_tail == ring.tx_head
            assert read_exactly(client.fileno(), 2000) == line[:2000]
            there = ring.rx_filled
            ring.put(line[2000:])
            ring.signal()
            client.sendall(b"more")
            sidecar.stats()
            assert ring.tx_head - ring.tx_tail & 0xFFFFFFFF == 1000
            assert ring.rx_filled == there
            with sidecar.client() as late:
                said += line[:2000]
                assert read_exactly(late.fileno(), len(said)) == said
            sidecar.resume()
            said += line[2000:]
            assert read_exactly(client.fileno(), 1000) == line[2000:]
            assert ring.read(8) == b"%04dmore" % i


def test_resume_makes_the_core_look_once(short: Path) -> None:
    with uart_sidecar(short) as (sidecar, ring):
        sidecar.quiesce()
        sidecar.resume()
        ring.wait_signal()


def test_input_on_its_way_is_neither_lost_nor_doubled(short: Path) -> None:
    """Some of it is in the ring, some staged, some still with the client."""
    data = pattern(40000)
    with uart_sidecar(short) as (sidecar, ring), sidecar.client() as client:
        client.sendall(data)
        ring.wait_rx_filled(RX_SIZE)
        taken = ring.read(1000)
        ring.wait_rx_filled(RX_SIZE)
        sidecar.quiesce()
        state = sidecar.save()
        assert sidecar.save() == state
        _, pending, _ = FIXED.unpack_from(state.data)
        assert RX_SIZE < pending <= 2 * RX_SIZE
        sidecar.resume()
        # The one that was saved goes on.
        assert taken + ring.read(len(data) - 1000) == data
    with uart_sidecar(short, incoming=True) as (sidecar, ring), sidecar.client() as client:
        client.sendall(b"after")
        sidecar.ask(m.Load(state))
        assert sidecar.save() == state
        assert ring.rx_filled == 0
        sidecar.resume()
        assert taken + ring.read(pending) == data[: 1000 + pending]
        assert ring.read(5) == b"after"


def opened(kind: str, path: Path) -> charbackend.CharBackend:
    if kind == "file":
        return charbackend.open_file(path)
    return charbackend.open_pty(path) if kind == "pty" else charbackend.open_socket(path)


def test_restored_console_shows_history_and_its_backend_does_not(short: Path) -> None:
    boot = pattern(200000)
    with uart_sidecar(short) as (sidecar, ring):
        ring.print(boot)
        sidecar.quiesce()
        state = sidecar.save()
    for kind in ("file", "pty", "socket"):
        path = short / kind
        backend = opened(kind, path)
        with (
            uart_sidecar(short, backend=kind, backend_fd=backend.fd, incoming=True) as (sidecar, ring),
            sidecar.client() as early,
        ):
            sidecar.wait_counter("clients", 1)
            sidecar.ask(m.Load(state))
            assert read_exactly(early.fileno(), 65536) == boot[-65536:]
            sidecar.resume()
            ring.print(b"alive\n")
            assert read_exactly(early.fileno(), 6) == b"alive\n"
            with sidecar.client() as late:
                assert read_exactly(late.fileno(), 65536) == (boot + b"alive\n")[-65536:]
            assert sidecar.counter("guest_out") == 6
            if kind == "pty":
                with path.open("rb", buffering=0) as tty:
                    assert read_until(tty.fileno(), b"\n") == b"alive\n"
            elif kind == "socket":
                with socket.socket(socket.AF_UNIX) as peer:
                    peer.connect(str(path))
                    assert read_until(peer.fileno(), b"\n") == b"alive\n"
            assert sidecar.shutdown() == 0
            if kind == "file":
                assert path.read_bytes() == b"alive\n"
        backend.close()


def test_without_scrollback_nothing_printed_is_saved(short: Path) -> None:
    with uart_sidecar(short, scrollback=0) as (sidecar, ring):
        ring.print(b"secret")
        sidecar.quiesce()
        assert sidecar.save() == console()


def test_guests_input_goes_first_and_in_one_piece_through_many_snapshots(short: Path) -> None:
    data = pattern(8000)
    state = console(pending=data, history=b"earlier")
    got = b""
    for _ in range(8):
        with uart_sidecar(short, incoming=True) as (sidecar, ring):
            sidecar.ask(m.Load(state))
            assert sidecar.save() == state
            sidecar.resume()
            got += ring.read(1000)
            sidecar.quiesce()
            state = sidecar.save()
    assert got == data
    assert state == console(history=b"earlier")


# virtio-console.


def test_virtio_at_rest_serves_nothing_and_loses_nothing(short: Path) -> None:
    with SerialSidecar(short / "c.sock", scrollback=1 << 20) as sidecar, sidecar.client() as client:
        rx, tx = sidecar.start()
        fill(rx, 4)
        for i in range(20):
            client.sendall(b"a%03d" % i)
            assert typed(rx, 4) == b"a%03d" % i
            tx.run(out=[b"line %03d\n" % i])
            sidecar.quiesce()
            before = (rx.used_idx, tx.used_idx)
            client.sendall(b"b%03d" % i)
            tx.submit(out=[b"more %03d\n" % i])
            tx.kick(force=True)
            rx.kick(force=True)
            sidecar.stats()
            assert (rx.used_idx, tx.used_idx) == before
            sidecar.resume()
            assert typed(rx, 4) == b"b%03d" % i
            tx.wait(1)
            assert read_exactly(client.fileno(), 18) == b"line %03d\nmore %03d\n" % (i, i)


def test_a_chain_in_hand_is_finished_and_the_next_is_not_begun(short: Path) -> None:
    data = pattern(900000)
    with SerialSidecar(short / "c.sock", scrollback=1 << 20) as sidecar, sidecar.client() as client:
        sidecar.wait_counter("clients", 1)
        _, tx = sidecar.start()
        for i in range(9):
            tx.submit(out=[data[100000 * i : 100000 * (i + 1)]])
        tx.kick()
        sidecar.quiesce()
        done = tx.used_idx
        state = sidecar.save()
        (position,) = (q for q in state.queues if q.index == 1)
        assert (position.last_avail, position.used_idx) == (done, done)
        assert sidecar.counter("guest_out") == 100000 * done
        sidecar.resume()
        assert read_exactly(client.fileno(), len(data)) == data
        assert len(tx.wait(9)) == 9


def test_virtio_console_goes_on_in_another_process(short: Path) -> None:
    with SerialSidecar(short / "a.sock") as first:
        rx, tx = first.start()
        fill(rx, 2, size=8)
        with first.client() as client:
            for i in range(30):
                tx.run(out=[b"%03d\n" % i])
            client.sendall(b"0123456789abcdefGHIJKL")
            first.poll_until(lambda: rx.used_idx == 2, "two full buffers")
            first.quiesce()
            state = first.save()
            first.kill()
        assert [(q.last_avail, q.used_idx) for q in state.queues] == [(2, 2), (30, 30)]
        with SerialSidecar(short / "b.sock", incoming=True, predecessor=first) as second:
            second.restore(state, [rx, tx])
            assert second.save() == state
            tx.submit(out=[b"live\n"])
            tx.kick(force=True)
            second.stats()
            assert tx.used_idx == 30
            second.resume()
            tx.wait(1)
            assert typed(rx, 22, size=8) == b"0123456789abcdefGHIJKL"
            with second.client() as client:
                assert read_exactly(client.fileno(), 125) == b"".join(b"%03d\n" % i for i in range(30)) + b"live\n"
                client.sendall(b"x")
                assert typed(rx, 1, size=8) == b"x"


def test_driver_of_a_terminal_goes_on_without_one(short: Path) -> None:
    backend = charbackend.open_pty(size=(132, 43))
    with SerialSidecar(short / "a.sock", backend="pty", backend_fd=backend.fd) as first:
        rx, tx = first.start()
        accepted = first.accepted([rx, tx])
        assert accepted & F_SIZE
        first.quiesce()
        state = first.save()
        first.kill()
        with SerialSidecar(short / "b.sock", incoming=True, predecessor=first) as second:
            assert not second.offered & F_SIZE
            second.restore(state, [rx, tx], accepted)
            second.resume()
            tx.run(out=[b"hello"])
    backend.close()


def test_dirty_log_has_the_pages_of_the_input(short: Path) -> None:
    with SerialSidecar(short / "c.sock") as sidecar, sidecar.client() as client:
        rx, tx = sidecar.start()
        fill(rx, 40, size=3000)
        sidecar.quiesce()
        client.sendall(pattern(40000))
        rx.set_used_event(0x8000)
        tx.submit(out=[b"out"])
        sidecar.memory.take_dirty()
        before = sidecar.memory.pages()
        sidecar.resume()
        sidecar.poll_until(lambda: sidecar.counter("guest_in") == 40000, "all of the input")
        sidecar.quiesce()
        changed = {i for i, (a, b) in enumerate(zip(before, sidecar.memory.pages(), strict=True)) if a != b}
        assert len(changed) > 10
        assert changed <= sidecar.memory.take_dirty()


def test_the_end_while_at_rest_touches_no_queue(short: Path) -> None:
    with SerialSidecar(short / "c.sock") as sidecar:
        _, tx = sidecar.start()
        sidecar.quiesce()
        tx.submit(out=[b"too late"])
        tx.kick(force=True)
        assert sidecar.shutdown() == 0
        assert tx.used_idx == 0


# States that nobody saved.


def test_hostile_states_are_refused_and_the_right_one_is_taken(short: Path) -> None:
    good = console(pending=b"typed", history=b"printed")
    bad = [m.DeviceState(version, good.data) for version in (0, 2, 0xFFFF)]
    bad += [m.DeviceState(1, good.data[:n]) for n in range(len(good.data))]
    bad += [m.DeviceState(1, good.data + b"\0"), console(1 << 28), console(pending=bytes(8193))]
    bad += [console(history=bytes(65537)), m.DeviceState(1, good.data, (m.QueueState(0, 0, 0),))]
    bad.append(m.DeviceState(1, FIXED.pack(0, 0xFFFFFFFF, 0xFFFFFFF5) + b"typedprinted"))
    with uart_sidecar(short, incoming=True) as (sidecar, ring):
        for wrong in bad:
            answer = sidecar.request(m.Load(wrong))
            assert isinstance(answer, m.Error) and answer.code is m.ErrorCode.INVALID, wrong
        sidecar.ask(m.Load(good))
        sidecar.ask(m.Load(console(pending=b"again", history=b"other")))
        sidecar.resume()
        assert ring.read(5) == b"again"
        with sidecar.client() as client:
            assert read_exactly(client.fileno(), 7) == b"printed"


def test_no_state_ends_the_process(short: Path) -> None:
    rng = random.Random(5)
    good = console(F_SIZE, b"typed", b"printed")
    with SerialSidecar(short / "c.sock", incoming=True) as sidecar:
        for _ in range(1000):
            data = bytearray(good.data)
            for _ in range(rng.choice((1, 2, 5))):
                data[rng.randrange(16)] = rng.randrange(256)
            if bytes(data) != good.data:
                assert isinstance(sidecar.request(m.Load(m.DeviceState(1, bytes(data)))), m.Ok | m.Error)
        assert sidecar.alive


def test_a_console_in_use_keeps_its_history_and_gets_the_saved_input(short: Path) -> None:
    """Once, wherever it was: in the ring, or on its way there."""
    with uart_sidecar(short) as (sidecar, ring), sidecar.client() as client:
        ring.print(b"mine")
        assert read_exactly(client.fileno(), 4) == b"mine"
        client.sendall(b"typed" * 1000)  # more than the ring has room for
        ring.wait_rx_filled(RX_SIZE)
        sidecar.quiesce()
        state = sidecar.save()
        sidecar.ask(m.Load(state))
        sidecar.ask(m.Load(state))
        sidecar.resume()
        typed = b""
        while len(typed) < 5000:
            typed += ring.read(min(4096, 5000 - len(typed)))
        assert typed == b"typed" * 1000
        with sidecar.client() as other:
            assert read_exactly(other.fileno(), 4) == b"mine"
        client.sendall(b".")
        assert ring.read(1) == b"."
