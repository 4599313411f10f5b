"""Two net sidecars, wired together: offloads that carry through, and are finished for a guest that takes none."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.frames import (
    ACK,
    CWR,
    FIN,
    GUEST_MAC,
    PSH,
    TCP,
    Tcp4,
    checksum,
    ethernet,
    ipv6,
    pseudo,
    tcp4,
    tcp_segment,
    udp,
)
from harness.nic import BIG, GSO_ECN, GSO_TCPV4, GSO_TCPV6, GUEST_OFFLOADS, NEEDS_CSUM, Header, Nic, bit
from motorcade.orchestrator import netbackend
from motorcade.proto import messages as m

MAC_A, MAC_B = GUEST_MAC, bytes.fromhex("52540012fe02")
A, B = "10.0.0.1", "10.0.0.2"


def open_end(path: Path, name: str) -> Nic:
    fd = netbackend.link(str(path))
    try:
        return Nic("link", {"link": fd}, name=name, mac=MAC_A if name == "a" else MAC_B)
    finally:
        os.close(fd)


@pytest.fixture
def wire(tmp_path: Path) -> Path:
    return tmp_path / "wire"


@pytest.fixture
def ends(wire: Path) -> Iterator[tuple[Nic, Nic]]:
    with open_end(wire, "a") as a, open_end(wire, "b") as b:
        yield a, b


def frame(payload: bytes) -> bytes:
    return ethernet(MAC_B, MAC_A, 0x88B5, payload.ljust(46, b"\0"))


def exchange(a: Nic, b: Nic) -> None:
    """Both ways."""
    a.send(frame(b"to b"))
    assert b.recv_frame() == frame(b"to b")
    b.send(frame(b"to a"))
    assert a.recv_frame() == frame(b"to a")


def test_either_may_come_first(ends: tuple[Nic, Nic]) -> None:
    for first, second in (ends, ends[::-1]):
        first.up()
        assert not first.link_up
        second.up()
        first.wait_link(True)
        second.wait_link(True)
        exchange(first, second)
        first.reset()
        # A guest without a driver has no carrier at the other end either.
        second.wait_link(False)
        second.send(frame(b"to nobody"))
        assert second.counters()["tx_dropped_link"] == 1
        second.reset()


def test_a_peer_comes_back(ends: tuple[Nic, Nic]) -> None:
    a, b = ends
    a.up(), b.up()
    for gone, stays in ((a, b), (b, a)):
        gone.wait_link(True)
        stays.wait_link(True)
        gone.reset()
        stays.wait_link(False)
        gone.up()
        gone.wait_link(True)
        stays.wait_link(True)
        exchange(gone, stays)


@pytest.mark.parametrize("order", ["a", "b"])
def test_a_killed_peer_is_replaced(wire: Path, order: str) -> None:
    """Whether the one that listened or the one that connected is killed."""
    with open_end(wire, "a" if order == "a" else "b") as stays:
        with open_end(wire, "b" if order == "a" else "a") as killed:
            first, second = (stays, killed) if order == "a" else (killed, stays)
            first.up()
            second.up()
            stays.wait_link(True)
            killed.sidecar.kill()
        stays.wait_link(False)
        with open_end(wire, "b" if order == "a" else "a") as again:
            again.up()
            again.wait_link(True)
            stays.wait_link(True)
            exchange(stays, again)
            assert again.sidecar.shutdown() == 0


def test_a_third_is_turned_away_and_gets_its_turn(ends: tuple[Nic, Nic], wire: Path) -> None:
    a, b = ends
    a.up(), b.up()
    a.wait_link(True)
    b.wait_link(True)
    with open_end(wire, "c") as c:
        c.up()
        a.poll_until(
            lambda: a.counters()["link_refused"] + b.counters()["link_refused"] > 0, "the third to be turned away"
        )
        assert not c.link_up
        exchange(a, b)
        listener = a if a.counters()["link_refused"] else b
        (b if listener is a else a).reset()
        c.wait_link(True)
        exchange(listener, c)


def test_back_pressure_loses_nothing(ends: tuple[Nic, Nic]) -> None:
    a, b = ends
    a.up()
    b.up(buffers=1)
    a.wait_link(True)
    sent, tx = 0, a.tx[0]
    while not a.counters()["tx_blocked"]:
        for _ in range(50):
            if tx._free:
                tx.submit(
                    out=[Header().pack() + ethernet(MAC_B, MAC_A, 0x88B5, sent.to_bytes(4, "big") + bytes(60_000))]
                )
                sent += 1
        tx.kick()
        tx.reap()
        assert sent < 1000
    # The receiver's buffers are too small for more than a few at a time.
    b.post(b.rx[0], 200)
    for i in range(sent):
        assert b.recv_frame()[14:18] == i.to_bytes(4, "big")


def test_offloads_carry_through(ends: tuple[Nic, Nic]) -> None:
    a, b = ends
    a.up(), b.up()
    a.wait_link(True)
    data = os.urandom(20_000)
    header = Header(NEEDS_CSUM, GSO_TCPV4 | GSO_ECN, hdr_len=54, gso_size=1448, csum_start=34, csum_offset=16)
    packet = ethernet(MAC_B, MAC_A, 0x0800, tcp4(A, B, 1, 2, 0, 0, ACK, data, partial=True))
    a.send(packet, header)
    got = b.recv()
    assert got.frame == packet
    header.num_buffers = -(-(12 + len(packet)) // b.size)
    assert got.header == header


@pytest.mark.parametrize("mrg", [True, False])
def test_segments_for_a_guest_that_takes_none_larger(ends: tuple[Nic, Nic], mrg: bool) -> None:
    a, b = ends
    a.up()
    b.up(without=GUEST_OFFLOADS | (0 if mrg else bit("MRG_RXBUF")), buffers=5)
    a.wait_link(True)
    data = os.urandom(20_000)
    header = Header(NEEDS_CSUM, GSO_TCPV4, hdr_len=54, gso_size=1448, csum_start=34, csum_offset=16)
    packet = tcp4(A, B, 1, 2, 0xFFFFFFF0, 5, ACK | PSH | FIN | CWR, data, partial=True)
    a.send(ethernet(MAC_B, MAC_A, 0x0800, packet), header)
    got = b""
    count = -(-len(data) // 1448)
    for i in range(count):
        received = b.recv()
        assert received.header == Header(num_buffers=1)
        segment = Tcp4.parse(received.frame)
        assert segment is not None and segment.valid and segment.ident == 7 + i
        assert segment.seq == (0xFFFFFFF0 + i * 1448) & 0xFFFFFFFF and segment.ack == 5
        last = i == count - 1
        assert segment.flags == ACK | (PSH | FIN if last else 0) | (CWR if i == 0 else 0)
        got += segment.data
    assert got == data
    assert b.counters()["segmented"] == 1


def test_segments_of_ipv6(ends: tuple[Nic, Nic]) -> None:
    a, b = ends
    a.up()
    b.up(without=GUEST_OFFLOADS)
    a.wait_link(True)
    data = os.urandom(3001)
    source, target = socket.inet_pton(socket.AF_INET6, "fd00::1"), socket.inet_pton(socket.AF_INET6, "fd00::2")
    packet = ipv6("fd00::1", "fd00::2", TCP, tcp_segment(source, target, 1, 2, 9, 9, ACK, data, True))
    header = Header(NEEDS_CSUM, GSO_TCPV6, hdr_len=74, gso_size=1000, csum_start=54, csum_offset=16)
    a.send(ethernet(MAC_B, MAC_A, 0x86DD, packet), header)
    got = b""
    for n in (1000, 1000, 1000, 1):
        frame = b.recv_frame()
        assert int.from_bytes(frame[18:20], "big") == 20 + n == len(frame) - 54
        assert checksum(frame[54:], pseudo(source, target, TCP, 20 + n)) == 0
        got += frame[74:]
    assert got == data


def test_checksums_for_a_guest_that_takes_no_partial_ones(ends: tuple[Nic, Nic]) -> None:
    a, b = ends
    a.up()
    b.up(without=GUEST_OFFLOADS)
    a.wait_link(True)
    partial = ethernet(MAC_B, MAC_A, 0x0800, udp(A, B, 1, 2, b"odd", partial=True))
    a.send(partial, Header(NEEDS_CSUM, csum_start=34, csum_offset=6))
    got = b.recv()
    assert got.frame == ethernet(MAC_B, MAC_A, 0x0800, udp(A, B, 1, 2, b"odd")) and got.header == Header(num_buffers=1)


class Impostor:
    """A peer that speaks to the sidecar with bytes of its own."""

    def __init__(self, wire: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(20)
        self.sock.connect(str(wire / "socket"))

    def greet(self) -> None:
        self.sock.send(self.sock.recv(100))


def test_a_peer_that_makes_no_sense(wire: Path) -> None:
    with open_end(wire, "a") as a:
        a.up()
        a.poll_until(lambda: (wire / "socket").exists(), "the socket")
        bad = Impostor(wire)
        bad.sock.send(b"hello")
        assert len(bad.sock.recv(100)) == 16
        assert bad.sock.recv(100) == b""  # turned away
        bad.sock.close()
        bad = Impostor(wire)
        bad.greet()
        a.wait_link(True)
        whole = frame(b"whole")
        for message in (
            b"x",
            bytes(12),
            bytes(12) + bytes(13),
            Header(NEEDS_CSUM, csum_start=1000, csum_offset=16).pack() + whole,
            Header(0, GSO_TCPV4, gso_size=10).pack() + whole,
            Header(NEEDS_CSUM, 77, gso_size=10).pack() + whole,
            bytes(12) + bytes(66_000),
            bytes(12) + bytes(140_000),
            Header(flags=0xFE, num_buffers=999, csum_start=77).pack() + whole,
        ):
            bad.sock.send(message)
        got = a.recv()
        assert got.frame == whole and got.header == Header(num_buffers=1)
        counters = a.counters()
        assert counters["rx_dropped_header"] == 6 and counters["rx_dropped_oversize"] == 2
        bad.sock.close()
        a.wait_link(False)
        assert a.sidecar.alive


def test_frames_that_only_claim_to_be_tcp(wire: Path) -> None:
    with open_end(wire, "a") as a:
        a.up(without=GUEST_OFFLOADS | bit("MRG_RXBUF"), size=BIG, buffers=20)
        a.poll_until(lambda: (wire / "socket").exists(), "the socket")
        bad = Impostor(wire)
        bad.greet()
        a.wait_link(True)
        good = ethernet(MAC_B, MAC_A, 0x0800, tcp4(A, B, 1, 2, 0, 0, ACK, bytes(3000), partial=True))
        header = Header(NEEDS_CSUM, GSO_TCPV4, gso_size=1000, csum_start=34, csum_offset=16)
        broken = 0
        for i, value in ((12, 0x86), (14, 0x65), (14, 0x4F), (14, 0x41), (23, 17), (46, 0x00), (46, 0x40)):
            message = bytearray(good)
            message[i] = value
            bad.sock.send(header.pack() + message)
            broken += 1
        for cut in (14, 20, 34, 53):
            short = Header(NEEDS_CSUM, GSO_TCPV4, gso_size=1000, csum_start=0, csum_offset=2)
            bad.sock.send(short.pack() + good[:cut])
            broken += 1
        bad.sock.send(header.pack() + good)
        assert [len(a.recv_frame()) for _ in range(3)] == [1054] * 3
        assert a.counters()["rx_dropped_header"] == broken
        bad.sock.close()


def test_frames_are_lost_on_request(ends: tuple[Nic, Nic]) -> None:
    """As many as asked for, in the direction asked for; what a NIC cannot do is refused."""
    a, b = ends
    a.up()
    b.up()
    a.wait_link(True)
    b.wait_link(True)
    a.sidecar.ask(m.Inject("tx", 2, "drop"))
    for n in range(3):
        a.send(frame(b"%d" % n))
    assert b.recv_frame() == frame(b"2")
    b.sidecar.ask(m.Inject("rx", 1, "drop"))
    for n in range(2):
        a.send(frame(b"again %d" % n))
    assert b.recv_frame() == frame(b"again 1")
    assert (a.counters()["injected"], b.counters()["injected"]) == (2, 1)
    b.sidecar.ask(m.Inject("any", 5, "drop"))
    b.sidecar.ask(m.Inject("any", 0))
    exchange(a, b)
    for wrong in (m.Inject("read", 1, "drop"), m.Inject("rx", 1, "ioerr"), m.Inject("rx", 1, "drop", 5)):
        answer = a.sidecar.request(wrong)
        assert isinstance(answer, m.Error)
        assert "a NIC" in answer.text
