"""The net sidecar before a real tap, with the kernel's network stack at the other end."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.frames import ACK, GUEST_MAC, PSH, RST, SYN, Tcp4, arp_request, ethernet, ipv4, tcp4, udp, udp_payload
from harness.netns import NetNs
from harness.nic import (
    BIG,
    ERR,
    GSO_TCPV4,
    GUEST_OFFLOADS,
    NEEDS_CSUM,
    OFFLOADS,
    OK,
    Header,
    Nic,
    bit,
    bits,
)
from motorcade.orchestrator import netbackend

pytestmark = pytest.mark.root

SO_RCVBUFFORCE = 33  # asm-generic/socket.h
HOST, GUEST = "10.0.0.1", "10.0.0.2"
CTRL_MQ, CTRL_MAC, CTRL_RX, CTRL_OFFLOADS, CTRL_VLAN = 4, 1, 0, 5, 2


@pytest.fixture
def ns() -> Iterator[NetNs]:
    with NetNs() as ns:
        yield ns


def open_nic(ns: NetNs, pairs: int = 1, mtu: int = 0, name: str = "t0") -> tuple[Nic, list[int]]:
    ns.add_tap(name, multi_queue=pairs > 1)
    # The guest's address is known, so that no ARP comes between.
    ns.ip("neigh", "add", GUEST, "lladdr", GUEST_MAC.hex(":"), "dev", name)
    taps = ns.call(netbackend.open_tap, name, pairs)
    ns.wait_carrier(name)
    return Nic("tap", {f"tap.{i}": fd for i, fd in enumerate(taps)}, pairs=pairs, mtu=mtu), taps


@pytest.fixture
def nic(ns: NetNs) -> Iterator[Nic]:
    nic, taps = open_nic(ns)
    with nic:
        yield nic
    for fd in taps:
        os.close(fd)


@pytest.fixture
def mq(ns: NetNs) -> Iterator[Nic]:
    nic, taps = open_nic(ns, pairs=4)
    with nic:
        yield nic
    for fd in taps:
        os.close(fd)


def host_mac(ns: NetNs, name: str = "t0") -> bytes:
    # /sys shows the namespace of whoever mounted it, so ask ip.
    words = ns.ip("-o", "link", "show", name).split()
    return bytes.fromhex(words[words.index("link/ether") + 1].replace(":", ""))


def to_host(ns: NetNs, packet: bytes, name: str = "t0") -> bytes:
    return ethernet(host_mac(ns, name), GUEST_MAC, 0x0800, packet)


def bound(ns: NetNs, port: int, kind: int = socket.SOCK_DGRAM) -> socket.socket:
    sock = ns.socket(socket.AF_INET, kind)
    if kind == socket.SOCK_DGRAM:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
    sock.bind((HOST, port))
    return sock


def test_hello(ns: NetNs) -> None:
    nic, taps = open_nic(ns, pairs=2, mtu=1400)
    with nic:
        hello = nic.sidecar.hello
        assert hello is not None and hello.virtio_type == 1
        assert list(hello.queue_sizes) == [256, 256, 256, 256, 64]
        mac, status, pairs, mtu = struct.unpack("<6sHHH", hello.config)
        assert (mac, status, pairs, mtu) == (GUEST_MAC, 1, 2, 1400)
        wanted = bits("MAC", "MRG_RXBUF", "STATUS", "CTRL_VQ", "MQ", "MTU", "CSUM", "HOST_TSO4", "HOST_TSO6")
        wanted |= bits("GUEST_CSUM", "GUEST_TSO4", "GUEST_TSO6", "CTRL_GUEST_OFFLOADS")
        assert hello.features & wanted == wanted
    for fd in taps:
        os.close(fd)


def test_arp_and_ping(ns: NetNs, nic: Nic) -> None:
    nic.up()
    nic.send(arp_request(GUEST_MAC, GUEST, HOST))
    answer = nic.recv_frame()
    assert answer[:14] == GUEST_MAC + host_mac(ns) + b"\x08\x06"
    assert answer[20:22] == b"\0\2" and answer[28:32] == socket.inet_aton(HOST)
    echo = b"\x08\0" + struct.pack("!HHH", 0, 7, 1) + bytes(range(48))
    from harness.frames import checksum

    echo = echo[:2] + struct.pack("!H", checksum(echo)) + echo[4:]
    nic.send(to_host(ns, ipv4(GUEST, HOST, 1, echo)))
    reply = nic.recv_frame()
    assert reply[34] == 0 and reply[38:] == echo[4:]


@pytest.mark.parametrize("event_idx", [True, False])
@pytest.mark.parametrize("indirect", [True, False])
def test_many_packets_arrive_in_order(ns: NetNs, nic: Nic, event_idx: bool, indirect: bool) -> None:
    nic.up(event_idx=event_idx, indirect=indirect)
    n = 600
    with bound(ns, 5000) as sock:
        mac = host_mac(ns)
        tx = nic.tx[0]
        for start in range(0, n, 60):
            for i in range(start, start + 60):
                packet = udp(GUEST, HOST, 6000, 5000, struct.pack("!I", i) * (1 + i % 300))
                tx.submit(out=[Header().pack(), ethernet(mac, GUEST_MAC, 0x0800, packet)])
            tx.kick()
            tx.wait(60)
        for i in range(n):
            assert sock.recv(2048) == struct.pack("!I", i) * (1 + i % 300)
        for start in range(0, n, 60):
            for i in range(start, start + 60):
                sock.sendto(struct.pack("!I", i) * (1 + i % 300), (GUEST, 6000))
            for i in range(start, start + 60):
                assert udp_payload(nic.recv_frame(), 6000) == struct.pack("!I", i) * (1 + i % 300)
    counters = nic.counters()
    assert counters["tx_packets"] == counters["rx_packets"] == n
    stats = {q.index: q for q in nic.sidecar.stats().queues}
    assert stats[0].requests == n and stats[1].requests == n
    assert stats[1].bytes_in == sum(42 + 4 * (1 + i % 300) for i in range(n))


@pytest.mark.parametrize("parts", [[12], [], [1, 2, 11], [5, 12, 13, 26, 40], [12, 26], list(range(1, 60))])
def test_any_framing_of_the_header(ns: NetNs, nic: Nic, parts: list[int]) -> None:
    """5.1.6.2 and 2.7.4: the device makes no assumption about where descriptors begin and end."""
    nic.up()
    with bound(ns, 5000) as sock:
        nic.send(to_host(ns, udp(GUEST, HOST, 6000, 5000, b"framed")), parts=parts)
        assert sock.recv(100) == b"framed"


def test_a_chain_of_more_parts_than_writev_takes(ns: NetNs, nic: Nic) -> None:
    nic.up(indirect=True)
    with bound(ns, 5000) as sock:
        data = os.urandom(1200)
        frame = to_host(ns, udp(GUEST, HOST, 6000, 5000, data))
        nic.send(frame, parts=list(range(12, 12 + 1023)))
        assert sock.recv(2000) == data


def test_partial_checksums_from_the_guest(ns: NetNs, nic: Nic) -> None:
    nic.up()
    partial = to_host(ns, udp(GUEST, HOST, 6000, 5000, b"left to the device", partial=True))
    with bound(ns, 5000) as sock:
        nic.send(partial, Header(NEEDS_CSUM, csum_start=34, csum_offset=6))
        assert sock.recv(100) == b"left to the device"
        # The same frame with the flag not set has a wrong checksum: the kernel, not we, must refuse it.
        nic.send(partial)
        nic.send(to_host(ns, udp(GUEST, HOST, 6000, 5000, b"whole")))
        assert sock.recv(100) == b"whole"


def test_partial_checksums_to_the_guest(ns: NetNs, nic: Nic) -> None:
    nic.up()
    with bound(ns, 5000) as sock:
        sock.sendto(b"from the host", (GUEST, 6000))
        got = nic.recv()
        assert got.header.flags == NEEDS_CSUM and (got.header.csum_start, got.header.csum_offset) == (34, 6)
        nic.reset()
        nic.up(without=GUEST_OFFLOADS)
        sock.sendto(b"from the host", (GUEST, 6000))
        got = nic.recv()
        assert got.header == Header(num_buffers=1)
        assert (
            got.frame[14:]
            == udp(HOST, GUEST, 5000, 6000, b"from the host")[:4]
            + got.frame[18:34]
            + udp(HOST, GUEST, 5000, 6000, b"from the host")[20:]
        )


class Stream:
    """One TCP connection between a host socket and a guest's stack of a few lines."""

    def __init__(self, ns: NetNs, nic: Nic, isn: int = 1000) -> None:
        self.ns, self.nic, self.mac = ns, nic, host_mac(ns)
        self.sock = bound(ns, 5001, socket.SOCK_STREAM)
        self.sock.setblocking(False)
        self.sock.connect_ex((GUEST, 80))
        syn = self.recv()
        assert syn.flags & SYN
        self.port, self.ack, self.seq = syn.sport, syn.seq + 1, isn
        self.send_flags(SYN | ACK)
        self.seq += 1
        while not self.recv().flags & ACK:
            pass
        self.sock.settimeout(20)

    def recv(self) -> Tcp4:
        while True:
            self.last = self.nic.recv()
            if segment := Tcp4.parse(self.last.frame):
                return segment

    def send_flags(self, flags: int) -> None:
        packet = tcp4(GUEST, HOST, 80, self.port if hasattr(self, "port") else 5001, self.seq, self.ack, flags)
        self.nic.send(ethernet(self.mac, GUEST_MAC, 0x0800, packet))

    def close(self) -> None:
        self.send_flags(RST | ACK)
        self.sock.close()


@pytest.mark.parametrize("layout", ["mrg", "mrg-small", "big"])
def test_segmentation_to_the_guest(ns: NetNs, nic: Nic, layout: str) -> None:
    """A bulk transfer arrives in frames far above the MTU, spread over merged buffers or in one large one."""
    if layout == "big":
        nic.up(without=bit("MRG_RXBUF"), size=BIG, buffers=16)
    else:
        nic.up(size=1536 if layout == "mrg" else 300, buffers=200)
    stream = Stream(ns, nic)
    data = os.urandom(100_000)
    got = bytearray()
    largest = 0
    sent = 0
    while len(got) < len(data):
        if sent < len(data):
            stream.sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sent += stream.sock.send(data[sent:])
        segment = stream.recv()
        assert segment.seq == stream.ack & 0xFFFFFFFF
        got += segment.data
        largest = max(largest, len(stream.last.frame))
        if len(stream.last.frame) > 1514:
            header = stream.last.header
            assert header.gso_type & 0x7F == GSO_TCPV4 and header.flags & NEEDS_CSUM and header.gso_size <= 1460
            if layout != "big":
                assert header.num_buffers == -(-(12 + len(stream.last.frame)) // nic.size)
        stream.ack += len(segment.data)
        stream.send_flags(ACK)
    assert got == data
    assert largest > 4000
    stream.close()


def test_no_segmentation_where_the_guest_does_not_take_it(ns: NetNs, nic: Nic) -> None:
    nic.up(without=GUEST_OFFLOADS)
    stream = Stream(ns, nic)
    stream.sock.send(os.urandom(20_000))
    got = 0
    while got < 20_000:
        segment = stream.recv()
        assert segment.valid and len(stream.last.frame) <= 1514 and stream.last.header.flags == 0
        got += len(segment.data)
        stream.ack += len(segment.data)
        stream.send_flags(ACK)
    stream.close()


def test_segmentation_for_the_guest(ns: NetNs, nic: Nic) -> None:
    nic.up()
    stream = Stream(ns, nic)
    data = os.urandom(30_000)
    packet = tcp4(GUEST, HOST, 80, stream.port, stream.seq, stream.ack, ACK | PSH, data, partial=True)
    header = Header(NEEDS_CSUM, GSO_TCPV4, hdr_len=54, gso_size=1448, csum_start=34, csum_offset=16)
    nic.send(ethernet(stream.mac, GUEST_MAC, 0x0800, packet), header)
    got = b""
    while len(got) < len(data):
        got += stream.sock.recv(65536)
    assert got == data
    stream.close()


def test_a_frame_larger_than_the_only_buffer_is_dropped_and_counted(ns: NetNs, nic: Nic) -> None:
    nic.up(without=bit("MRG_RXBUF") | GUEST_OFFLOADS, size=600)
    with bound(ns, 5000) as sock:
        sock.sendto(bytes(1000), (GUEST, 6000))
        sock.sendto(b"fits", (GUEST, 6000))
        assert udp_payload(nic.recv_frame(), 6000) == b"fits"
    assert nic.counters()["rx_dropped_oversize"] == 1


def test_a_frame_larger_than_all_buffers_is_dropped_and_counted(ns: NetNs, nic: Nic) -> None:
    nic.up(ring=4, buffers=4, size=128, without=GUEST_OFFLOADS)
    with bound(ns, 5000) as sock:
        sock.sendto(bytes(1000), (GUEST, 6000))
        sock.sendto(b"fits", (GUEST, 6000))
        assert udp_payload(nic.recv_frame(), 6000) == b"fits"
    assert nic.counters()["rx_dropped_oversize"] == 1


@pytest.mark.parametrize("mrg", [True, False])
def test_without_buffers_nothing_is_lost_and_nobody_spins(ns: NetNs, nic: Nic, mrg: bool) -> None:
    nic.up(buffers=3, without=0 if mrg else bit("MRG_RXBUF"), size=1536 if mrg else BIG)
    with bound(ns, 5000) as sock:
        for i in range(40):
            sock.sendto(struct.pack("!I", i) * 100, (GUEST, 6000))
        # Held back, the driver sees three frames and no more.
        rx = nic.rx[0]
        first = rx.wait(3)
        nic.poll_until(lambda: nic.counters()["rx_starved"] > 0, "starvation")
        rx.wait_interrupt(0)  # one that was on its way when the third frame was seen
        before = cpu_ticks(nic.sidecar.pid)
        assert not rx.wait_interrupt(0.5)
        assert cpu_ticks(nic.sidecar.pid) - before <= 5  # of 50
        frames = [r.data[0][12 : r.written] for r in first]
        nic.post(rx, 2)
        frames += [nic.recv_frame() for _ in range(37)]
    assert [udp_payload(f, 6000) for f in frames] == [struct.pack("!I", i) * 100 for i in range(40)]


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def test_a_large_frame_waits_for_more_buffers(ns: NetNs, nic: Nic) -> None:
    nic.up(buffers=2, size=256, without=GUEST_OFFLOADS)
    with bound(ns, 5000) as sock:
        data = os.urandom(1200)
        sock.sendto(data, (GUEST, 6000))
        nic.poll_until(lambda: nic.counters()["rx_starved"] > 0, "starvation")
        assert nic.nothing_comes(0.1)
        nic.post(nic.rx[0], 1)
        assert nic.nothing_comes(0.1)
        nic.post(nic.rx[0], 5)
        got = nic.recv()
        assert udp_payload(got.frame, 6000) == data and got.header.num_buffers == 5


def test_queue_pairs(ns: NetNs, mq: Nic) -> None:
    mq.up()
    assert mq.command(CTRL_MQ, 0, struct.pack("<H", 4)) == OK
    with bound(ns, 5000) as sock:
        # The kernel steers a flow to the queue that it was last sent from.
        for pair in range(4):
            mq.send(to_host(ns, udp(GUEST, HOST, 6000 + pair, 5000, b"%d" % pair)), pair=pair)
            data, peer = sock.recvfrom(100)
            assert data == b"%d" % pair
            sock.sendto(b"back", peer)
            got = mq.recv()
            assert (got.pair, udp_payload(got.frame, 6000 + pair)) == (pair, b"back")
        # With one pair again, everything comes by the first, and the others' transmit queues are not read.
        assert mq.command(CTRL_MQ, 0, struct.pack("<H", 1)) == OK
        for pair in range(4):
            sock.sendto(b"one", (GUEST, 6000 + pair))
            assert mq.recv().pair == 0
        idle = mq.tx[2].submit(out=[Header().pack() + to_host(ns, udp(GUEST, HOST, 1, 5000, b"late"))])
        mq.tx[2].kick(force=True)
        mq.send(to_host(ns, udp(GUEST, HOST, 1, 5000, b"first")))
        assert sock.recv(100) == b"first"
        assert not idle.done and not mq.tx[2].reap()
        assert mq.command(CTRL_MQ, 0, struct.pack("<H", 3)) == OK
        assert sock.recv(100) == b"late"
    for n in (0, 5, 0xFFFF):
        assert mq.command(CTRL_MQ, 0, struct.pack("<H", n)) == ERR


def test_without_mq_the_control_queue_is_the_third(ns: NetNs, mq: Nic) -> None:
    """5.1.2."""
    mq.up(without=bit("MQ"))
    assert mq.ctrl is not None and mq.ctrl.index == 2
    assert mq.command(CTRL_RX, 0, b"\1") == OK
    assert mq.command(CTRL_MQ, 0, struct.pack("<H", 1)) == ERR
    mq.send(arp_request(GUEST_MAC, GUEST, HOST))
    assert mq.recv_frame()[20:22] == b"\0\2"


def test_control_commands(nic: Nic) -> None:
    nic.up()
    table = struct.pack("<I", 1) + bytes(6) + struct.pack("<I", 0)
    assert nic.command(CTRL_MAC, 0, table) == OK
    assert nic.command(CTRL_MAC, 0, struct.pack("<I", 2) + bytes(6) + struct.pack("<I", 0)) == ERR
    assert nic.command(CTRL_MAC, 0, struct.pack("<I", 0xFFFFFFFF) + bytes(100)) == ERR
    assert nic.command(CTRL_RX, 0, b"\1") == OK
    assert nic.command(CTRL_RX, 5, b"\0") == OK
    assert nic.command(CTRL_RX, 6, b"\0") == ERR
    assert nic.command(CTRL_RX, 0, b"") == ERR
    assert nic.command(CTRL_VLAN, 0, b"\1\0") == ERR
    assert nic.command(99, 0, b"") == ERR
    assert nic.command(CTRL_MAC, 1, bytes.fromhex("52540012fe99")) == OK
    nic.sidecar.wait_until(lambda: nic.sidecar.config[:6] == bytes.fromhex("52540012fe99"), "the new MAC")
    nic.reset()
    nic.up()
    nic.sidecar.wait_until(lambda: nic.sidecar.config[:6] == GUEST_MAC, "the first MAC again")


def test_offloads_withdrawn_while_running(ns: NetNs, nic: Nic) -> None:
    nic.up()
    with bound(ns, 5000) as sock:
        assert nic.command(CTRL_OFFLOADS, 0, struct.pack("<Q", 0)) == OK
        sock.sendto(b"x", (GUEST, 6000))
        assert nic.recv().header.flags == 0
        assert nic.command(CTRL_OFFLOADS, 0, struct.pack("<Q", bit("GUEST_CSUM"))) == OK
        sock.sendto(b"x", (GUEST, 6000))
        assert nic.recv().header.flags == NEEDS_CSUM
        assert nic.command(CTRL_OFFLOADS, 0, struct.pack("<Q", 1 << 40)) == ERR


def test_reset_and_up_again(ns: NetNs, nic: Nic) -> None:
    with bound(ns, 5000) as sock:
        for round_ in range(3):
            nic.up(event_idx=bool(round_ % 2), without=OFFLOADS if round_ == 1 else 0)
            nic.send(to_host(ns, udp(GUEST, HOST, 6000, 5000, b"round %d" % round_)))
            assert sock.recv(100) == b"round %d" % round_
            sock.sendto(b"back", (GUEST, 6000))
            assert udp_payload(nic.recv_frame(), 6000) == b"back"
            nic.reset()
    assert nic.sidecar.shutdown() == 0


def test_a_tap_that_is_down_costs_packets_only(ns: NetNs, nic: Nic) -> None:
    nic.up()
    frame = to_host(ns, udp(GUEST, HOST, 6000, 5000, b"x"))
    ns.ip("link", "set", "t0", "down")
    nic.send(frame)
    assert nic.counters()["tx_dropped_backend"] == 1
    ns.ip("link", "set", "t0", "up")
    ns.wait_carrier()
    with bound(ns, 5000) as sock:
        nic.send(frame)
        assert sock.recv(10) == b"x"


def test_a_removed_tap_takes_the_link_down(ns: NetNs, nic: Nic) -> None:
    nic.up()
    frame = to_host(ns, udp(GUEST, HOST, 6000, 5000, b"x"))
    ns.ip("link", "del", "t0")
    nic.wait_link(False)
    for _ in range(3):
        nic.send(frame)  # the guest does not wait for what nobody takes
    assert nic.counters()["tx_dropped_link"] == 3
    assert any("the tap is gone" in line["msg"] for line in nic.sidecar.log_lines())
    nic.reset()
    nic.up()
    nic.send(frame)
    assert nic.sidecar.shutdown() == 0
