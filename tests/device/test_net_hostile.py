"""A guest that does its worst to its own NIC: the queue breaks, or the packet is dropped; the process lives on."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.frames import GUEST_MAC, ethernet
from harness.nic import (
    GSO_ECN,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP,
    NEEDS_CSUM,
    OFFLOADS,
    Header,
    Nic,
    bit,
)
from motorcade.orchestrator import netbackend

FRAME = ethernet(b"\xff" * 6, GUEST_MAC, 0x88B5, bytes(range(100)))


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Nic, Nic]]:
    """A guest and its witness, over a link, which takes the same headers as a tap and needs no root."""
    fds = [netbackend.link(str(tmp_path / "wire")) for _ in range(2)]
    with Nic("link", {"link": fds[0]}, name="a") as a, Nic("link", {"link": fds[1]}, name="b") as b:
        for fd in fds:
            os.close(fd)
        yield a, b


def up(a: Nic, b: Nic, *, without: int = 0, buffers: int = 128) -> None:
    a.up(without=without, buffers=buffers)
    b.up()
    a.wait_link(True)
    b.wait_link(True)


BAD_HEADERS = {
    "csum_start past the frame": Header(NEEDS_CSUM, csum_start=114, csum_offset=0),
    "csum_offset past the frame": Header(NEEDS_CSUM, csum_start=100, csum_offset=13),
    "a sum that wraps 16 bits": Header(NEEDS_CSUM, csum_start=0xFFFF, csum_offset=0xFFFF),
    "unknown gso": Header(NEEDS_CSUM, 2, gso_size=100, csum_start=34, csum_offset=16),
    "gso 255": Header(NEEDS_CSUM, 255, gso_size=100, csum_start=34, csum_offset=16),
    "ecn alone": Header(NEEDS_CSUM, GSO_ECN, gso_size=100, csum_start=34, csum_offset=16),
    "ufo, which a link has not": Header(NEEDS_CSUM, GSO_UDP, gso_size=100, csum_start=34, csum_offset=6),
    "gso without checksum": Header(0, GSO_TCPV4, gso_size=100),
    "gso of size 0": Header(NEEDS_CSUM, GSO_TCPV6, gso_size=0, csum_start=34, csum_offset=16),
    "hdr_len past the frame": Header(NEEDS_CSUM, GSO_TCPV4, hdr_len=115, gso_size=9, csum_start=34, csum_offset=16),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_bad_headers_are_dropped_and_counted(pair: tuple[Nic, Nic], name: str) -> None:
    a, b = pair
    up(a, b)
    a.send(FRAME, BAD_HEADERS[name])
    a.send(FRAME)
    assert b.recv_frame() == FRAME
    assert b.nothing_comes(0.05)
    assert a.counters()["tx_dropped_header"] == 1
    assert not a.sidecar.needs_reset


def test_offloads_that_were_not_accepted(pair: tuple[Nic, Nic]) -> None:
    a, b = pair
    up(a, b, without=OFFLOADS)
    a.send(FRAME, Header(NEEDS_CSUM, csum_start=34, csum_offset=6))
    a.send(FRAME, Header(NEEDS_CSUM, GSO_TCPV4, gso_size=20, csum_start=34, csum_offset=16))
    assert a.counters()["tx_dropped_header"] == 2
    a.send(FRAME, Header(flags=2 | 4 | 0x80, csum_start=5, num_buffers=7))  # bits that a device ignores
    got = b.recv()
    assert got.frame == FRAME and got.header == Header(num_buffers=1)


def test_frames_too_short_and_too_long(pair: tuple[Nic, Nic]) -> None:
    a, b = pair
    up(a, b)
    tx = a.tx[0]
    tx.run(out=[b"x"])
    tx.run(out=[bytes(12)])
    tx.run(out=[bytes(12 + 13)])
    tx.run(out=[bytes(12 + 65535 + 19)])
    tx.run(out=[], into=[64])
    assert a.counters()["tx_dropped_header"] == 5
    a.send(bytes(14))
    assert b.recv_frame() == bytes(14)
    a.send(bytes(65535 + 18))
    assert len(b.recv_frame()) == 65535 + 18


def test_random_headers(pair: tuple[Nic, Nic]) -> None:
    """Whatever passes the check must be sound at the other end, where the guest takes no offloads at all."""
    a, b = pair
    a.up()
    b.up(without=OFFLOADS, buffers=200)
    a.wait_link(True)
    rng = random.Random(5)
    tx = a.tx[0]
    for _ in range(12):
        for _ in range(50):
            header = Header(
                rng.choice([0, 1, 1, 1, 3, 255]),
                rng.choice([0, 1, 1, 4, 4, 3, 0x81, 0x84, rng.randrange(256)]),
                rng.choice([0, 54, rng.randrange(65536)]),
                rng.choice([1, 7, 100, 1448, 65535]),
                rng.choice([34, 54, rng.randrange(200)]),
                rng.choice([6, 16, rng.randrange(200)]),
            )
            body = rng.choice([b"\x45", b"\x60", b"\x4f", rng.randbytes(1)]) + rng.randbytes(rng.randrange(300))
            kind = rng.choice([b"\x08\x00", b"\x86\xdd", b"\x81\x00", b"\x88\xa8"])
            tx.submit(out=[header.pack() + bytes(12) + kind + body])
        tx.kick()
        tx.wait(50)
        while not b.nothing_comes(0.01):
            assert b.recv().header == Header(num_buffers=1)
    a.send(FRAME)
    while b.recv_frame() != FRAME:
        pass
    assert a.counters()["tx_dropped_header"] > 0
    assert a.sidecar.alive and b.sidecar.alive


def test_a_broken_transmit_queue_stops_alone(pair: tuple[Nic, Nic]) -> None:
    a, b = pair
    up(a, b)
    tx = a.tx[0]
    tx.write_desc(0, 1 << 60, 100, 0)
    tx.put_avail(0)
    tx.publish()
    tx.kick(force=True)
    assert a.sidecar.wait_needs_reset().queue == 1
    b.send(FRAME)
    assert a.recv_frame() == FRAME
    a.reset()
    a.up()
    a.wait_link(True)
    a.send(FRAME)
    assert b.recv_frame() == FRAME


@pytest.mark.parametrize("flaw", ["outside", "readable", "short", "index", "loop"])
def test_a_broken_receive_queue_stops_alone(pair: tuple[Nic, Nic], flaw: str) -> None:
    a, b = pair
    up(a, b, buffers=0)
    rx = a.rx[0]
    gpa = a.memory.alloc(2048)
    match flaw:
        case "outside":
            rx.write_desc(0, (1 << 64) - 10, 2048, 2)
        case "readable":
            rx.write_desc(0, gpa, 2048, 0)
        case "short":
            rx.write_desc(0, gpa, 11, 2)
        case "loop":
            rx.write_desc(0, gpa, 64, 2 | 1, 0)
        case "index":
            rx.set_avail_idx(20_000)
    if flaw != "index":
        rx.put_avail(0)
        rx.publish()
    rx.kick(force=True)
    b.send(FRAME)
    assert a.sidecar.wait_needs_reset().queue == 0
    a.send(FRAME)
    assert b.recv_frame() == FRAME
    assert a.sidecar.alive


def test_control_chains_without_an_answer_byte(pair: tuple[Nic, Nic]) -> None:
    a, b = pair
    up(a, b)
    assert a.ctrl is not None
    assert a.ctrl.run(out=[b"\1"], into=[1]).status == 1
    assert a.ctrl.run(out=[], into=[1]).status == 1
    assert a.ctrl.run(out=[os.urandom(3000)], into=[0x100]).data[0][0] in (0, 1)
    a.ctrl.submit(out=[b"\0\0\1"])
    a.ctrl.kick(force=True)
    assert a.sidecar.wait_needs_reset().queue == 2
    a.send(FRAME)
    assert b.recv_frame() == FRAME


def test_rings_that_are_not_legal_from_the_start(pair: tuple[Nic, Nic]) -> None:
    from dataclasses import replace

    from motorcade.proto.messages import Activate

    a, _ = pair
    rx, tx = a.sidecar.queue(0), a.sidecar.queue(1)
    a.sidecar.ask(Activate(a.sidecar.offered & ~bit("MQ"), (replace(rx.config, desc=1 << 50), tx.config)))
    assert a.sidecar.wait_needs_reset().queue == 0
    tx.run(out=[Header().pack() + FRAME])
    assert a.counters()["tx_dropped_link"] == 1


def test_kicks_for_queues_that_were_never_set_up(pair: tuple[Nic, Nic]) -> None:
    from motorcade.proto.messages import Activate

    a, _ = pair
    tx = a.sidecar.queue(1)
    a.sidecar.ask(Activate(a.sidecar.offered, (tx.config,)))
    for kick in a.sidecar.kicks:
        os.eventfd_write(kick, 1)
    tx.run(out=[Header().pack() + FRAME])
    assert a.sidecar.alive and not a.sidecar.needs_reset
