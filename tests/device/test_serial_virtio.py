"""virtio-console (virtio 1.2, section 5.3): a real sidecar process, the driver in the test."""

from __future__ import annotations

import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.console import SerialSidecar, read_exactly, read_until
from harness.driver import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Queue
from harness.sidecar import SidecarGone
from motorcade.orchestrator import charbackend
from motorcade.proto import messages as m
from motorcade.proto.messages import SerialBoot
from motorcade.sidecars.device import RING_EVENT_IDX, RING_INDIRECT_DESC

F_SIZE, F_MULTIPORT, F_EMERG_WRITE = 1, 2, 4


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose path leaves room for a socket's name (107 bytes)."""
    path = Path(tempfile.mkdtemp(prefix="mc-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def sidecar(short: Path) -> Iterator[SerialSidecar]:
    """No backend, 1 MiB of scrollback, not activated."""
    with SerialSidecar(short / "c.sock", scrollback=1 << 20) as sidecar:
        yield sidecar


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


def test_hello(sidecar: SerialSidecar) -> None:
    assert sidecar.hello is not None
    assert sidecar.hello.virtio_type == 3
    assert len(sidecar.hello.queue_sizes) == 2
    assert sidecar.offered == RING_EVENT_IDX | RING_INDIRECT_DESC | F_EMERG_WRITE
    assert sidecar.config == struct.pack("<HHII", 0, 0, 1, 0)


@pytest.mark.parametrize("event_idx", [True, False])
@pytest.mark.parametrize("indirect", [True, False])
def test_both_ways(sidecar: SerialSidecar, event_idx: bool, indirect: bool) -> None:
    rx, tx = sidecar.start(event_idx=event_idx, indirect=indirect)
    fill(rx, 4)
    with sidecar.client() as client:
        for i in range(20):
            line = b"line %d\r\n" % i
            assert tx.run(out=[line[:3], line[3:]]).written == 0
            assert read_exactly(client.fileno(), len(line)) == line
            client.sendall(b"%03d" % i)
            assert typed(rx, 3) == b"%03d" % i


def test_client_before_the_driver_and_input_kept_for_it(sidecar: SerialSidecar) -> None:
    with sidecar.client() as client:
        client.sendall(b"early")
        sidecar.wait_counter("clients", 1)
        rx, tx = sidecar.start()
        fill(rx, 1)
        assert typed(rx, 5) == b"early"
        tx.run(out=[b"hello"])
        assert read_exactly(client.fileno(), 5) == b"hello"


def test_console_survives_the_guests_reboot(sidecar: SerialSidecar) -> None:
    rx, tx = sidecar.start()
    fill(rx, 2)
    with sidecar.client() as client:
        tx.run(out=[b"first "])
        client.sendall(b"a")
        assert typed(rx, 1) == b"a"
        sidecar.reset()
        client.sendall(b"between")
        rx.restart()
        tx.restart()
        sidecar.activate([rx, tx])
        fill(rx, 2)
        tx.run(out=[b"second"])
        assert read_exactly(client.fileno(), 12) == b"first second"
        assert typed(rx, 7) == b"between"
    with sidecar.client() as late:
        assert read_exactly(late.fileno(), 12) == b"first second"


def test_nothing_is_touched_after_reset(sidecar: SerialSidecar) -> None:
    rx, tx = sidecar.start()
    fill(rx, 1)
    with sidecar.client() as client:
        tx.run(out=[b"x"])
        assert read_exactly(client.fileno(), 1) == b"x"
        sidecar.reset()
        before = (rx.used_idx, tx.used_idx)
        tx.submit(out=[b"stale"])
        tx.kick(force=True)
        rx.kick(force=True)
        client.sendall(b"y")
        # Two round trips through the loop: it has seen the input, and kicks that it must not look at.
        with sidecar.client():
            sidecar.wait_counter("clients_total", 2)
        assert (rx.used_idx, tx.used_idx) == before
        assert sidecar.counter("guest_out") == 1


def test_reset_in_the_middle_of_a_transfer(sidecar: SerialSidecar) -> None:
    rx, tx = sidecar.start()
    big = [b"%07d\n" % i * 8192 for i in range(4)]
    for round_ in range(20):
        for part in big:
            tx.submit(out=[part])
        tx.kick(force=True)
        sidecar.reset()
        used = tx.used_idx
        assert sidecar.counter("guest_out") >= 0
        assert tx.used_idx == used, f"round {round_}: the used ring moved after the reset"
        rx.restart()
        tx.restart()
        sidecar.activate([rx, tx])
    with sidecar.client() as client:
        tx.run(out=[b"END"])
        read_until(client.fileno(), b"END")


def test_chain_larger_than_a_batch(sidecar: SerialSidecar) -> None:
    _, tx = sidecar.start()
    data = b"".join(b"%07d\n" % i for i in range(100000))
    with sidecar.client() as client:
        sidecar.wait_counter("clients", 1)
        request = tx.submit(out=[data[:300000], data[300000:300001], data[300001:]])
        tx.kick()
        assert read_exactly(client.fileno(), len(data)) == data
        assert tx.wait(1) == [request]
    report = sidecar.stats()
    assert [q.index for q in report.queues] == [0, 1]
    assert report.queues[1].requests == 1
    assert report.queues[1].bytes_in == len(data)


def test_never_reading_client_does_not_hold_up_the_driver(sidecar: SerialSidecar) -> None:
    _, tx = sidecar.start()
    with sidecar.client():
        sidecar.wait_counter("clients", 1)
        for _ in range(64):
            tx.run(out=[bytes(65536)])
        with sidecar.client() as other:
            tx.run(out=[b"END"])
            read_until(other.fileno(), b"END")


def test_input_back_pressure(sidecar: SerialSidecar) -> None:
    rx, _ = sidecar.start()
    data = b"".join(b"%07d\n" % i for i in range(4096))
    with sidecar.client() as client:
        client.sendall(data[:100])
        fill(rx, 1, size=10)
        assert typed(rx, 10, size=10) == data[:10]
        client.sendall(data[100:])
        assert typed(rx, len(data) - 10, size=1000) == data[10:]


def test_input_is_split_over_a_chains_buffers(sidecar: SerialSidecar) -> None:
    rx, _ = sidecar.start()
    rx.submit(into=[3, 1, 100])
    rx.kick()
    with sidecar.client() as client:
        client.sendall(b"abcdef")
        request = rx.wait(1)[0]
        assert request.written == 6
        assert request.data[:2] == [b"abc", b"d"]
        assert request.data[2][:2] == b"ef"


def test_driver_that_only_prints(sidecar: SerialSidecar) -> None:
    tx = sidecar.queue(1)
    sidecar.activate([tx])
    with sidecar.client() as client:
        client.sendall(b"nobody takes this")
        tx.run(out=[b"out"])
        assert read_exactly(client.fileno(), 3) == b"out"


def test_emergency_write(sidecar: SerialSidecar) -> None:
    with sidecar.client() as client:
        for byte in b"panic":
            sidecar.ask(m.ConfigWrite(8, bytes([byte, 0, 0, 0])))
        assert read_exactly(client.fileno(), 5) == b"panic"
        sidecar.ask(m.ConfigWrite(0, b"\1\2"))  # not writable: ignored
        assert sidecar.config == struct.pack("<HHII", 0, 0, 1, 0)


def test_size_of_the_terminal_behind_it(short: Path) -> None:
    backend = charbackend.open_pty(size=(132, 43))
    with SerialSidecar(short / "c.sock", backend="pty", backend_fd=backend.fd) as sidecar:
        assert sidecar.offered & F_SIZE
        assert not sidecar.offered & F_MULTIPORT
        assert sidecar.config == struct.pack("<HHII", 132, 43, 1, 0)
    backend.close()


def raw(*descriptors: tuple[int, int, int], head: int = 0) -> Callable[[Queue], object]:
    """Makes a chain of these descriptors (address, length, flags) available, in the table's order."""

    def put(queue: Queue) -> None:
        for i, (addr, length, flags) in enumerate(descriptors):
            queue.write_desc(i, addr, length, flags, (i + 1) % len(descriptors))
        queue.put_avail(head)
        queue.publish()

    return put


HOSTILE: dict[str, tuple[int, Callable[[Queue], object]]] = {
    "receive buffer that cannot be written": (0, lambda q: q.submit(out=[b"x"])),
    "transmit chain with nothing to read": (1, lambda q: q.submit(into=[8])),
    "address out of RAM": (1, raw((1 << 40, 8, 0))),
    "address that wraps": (1, raw(((1 << 64) - 4, 8, 0))),
    "buffer of no length": (1, raw((0x1000, 0, 0))),
    "head past the table": (1, raw(head=0xFFFF)),
    "loop": (1, raw((0x1000, 8, DESC_F_NEXT))),
    "avail index too far": (0, lambda q: q.set_avail_idx(q.size + 1)),
    "indirect not negotiated": (1, raw((0x1000, 16, DESC_F_INDIRECT))),
    "readable after writable": (0, raw((0x1000, 8, DESC_F_NEXT | DESC_F_WRITE), (0x1000, 8, 0))),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_broken_queue_stops_alone(sidecar: SerialSidecar, name: str) -> None:
    index, breaks = HOSTILE[name]
    queues = sidecar.start(event_idx=False)
    with sidecar.client() as client:
        breaks(queues[index])
        queues[index].kick(force=True)
        client.sendall(b"?")
        assert sidecar.wait_needs_reset().queue == index
        if index == 0:
            queues[1].run(out=[b"alive"])
            assert read_exactly(client.fileno(), 5) == b"alive"
        else:
            fill(queues[0], 1)
            assert typed(queues[0], 1) == b"?"
        sidecar.reset()
        for queue in queues:
            queue.restart()
        sidecar.activate(queues)
        fill(queues[0], 4)
        queues[1].run(out=[b"again"])
        assert read_until(client.fileno(), b"again")
        assert not sidecar.needs_reset


def test_queue_outside_ram_is_broken_from_the_start(sidecar: SerialSidecar) -> None:
    sidecar.ask(m.Activate(sidecar.offered, (m.Queue(1, 256, 1 << 40, 1 << 41, 1 << 42),)))
    assert sidecar.wait_needs_reset().queue == 1
    assert sidecar.alive


@pytest.mark.parametrize(
    ("flavour", "backend", "match"),
    [("tty", "none", "flavour"), ("virtio", "ptty", "backend"), ("uart", "none", "ring")],
)
def test_boot_that_makes_no_sense(short: Path, flavour: str, backend: str, match: str) -> None:
    from harness.sidecar import Sidecar

    console = charbackend.open_socket(short / "c.sock")
    with pytest.raises(SidecarGone, match=match):
        Sidecar("serial", SerialBoot("con0", flavour, backend, 0), {"console": console.fd}, queues=2)
    console.close()


def test_stub_names_what_the_extension_has() -> None:
    from motorcade.sidecars import _serial

    stub = (Path(__file__).parents[2] / "sidecars" / "_serial.pyi").read_text()
    declared = set(re.findall(r"^    (?:def )?((?:mc|MC)_\w+)", stub, re.MULTILINE))
    generic = {name for name in dir(_serial.lib) if name.startswith(("mc_vq", "MC_VQ", "mc_mem", "MC_MAX", "MC_MEM"))}
    assert declared - generic == set(dir(_serial.lib)) - generic
