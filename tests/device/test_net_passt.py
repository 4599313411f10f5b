"""The net sidecar before a real passt, as in `user` networking; it sees a network namespace of the test's own."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.frames import ACK, FIN, GUEST_MAC, PSH, RST, SYN, Tcp4, arp_request, ethernet, tcp4, udp, udp_payload
from harness.netns import NetNs
from harness.nic import NEEDS_CSUM, OFFLOADS, Header, Nic, bit
from motorcade.orchestrator import netbackend
from motorcade.orchestrator.errors import UserError

GATEWAY, GUEST = "10.0.0.254", "10.0.0.1"


@pytest.fixture
def ns() -> Iterator[NetNs]:
    with NetNs() as ns:
        ns.add_tap("up0", address=f"{GUEST}/24")
        ns.ip("route", "add", "default", "via", GATEWAY)
        yield ns


class User:
    """A NIC, the passt behind it, and the little of a network stack that the guest needs."""

    def __init__(self, ns: NetNs, forward: list[str]) -> None:
        fd, self.pid = ns.call(netbackend.spawn_passt, forward)
        self.pidfd = os.pidfd_open(self.pid)
        try:
            self.nic = Nic("passt", {"passt": fd})
        finally:
            os.close(fd)

    def __enter__(self) -> User:
        return self

    def __exit__(self, *_: object) -> None:
        self.nic.sidecar.close()
        self.nic.memory.close()
        # Nobody holds the socket any more, so it ends by itself.
        ended = bool(select.select([self.pidfd], [], [], 20)[0])
        if not ended:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.pidfd)
        assert ended

    def gateway(self) -> bytes:
        """The MAC behind which everything lies."""
        self.nic.send(arp_request(GUEST_MAC, GUEST, GATEWAY))
        while True:
            frame = self.nic.recv_frame()
            if frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\2":
                return frame[22:28]

    def send(self, mac: bytes, packet: bytes) -> None:
        self.nic.send(ethernet(mac, GUEST_MAC, 0x0800, packet))

    def segment(self) -> Tcp4:
        while True:
            if segment := Tcp4.parse(self.nic.recv_frame()):
                return segment


@pytest.mark.root
def test_offers_no_offloads(ns: NetNs) -> None:
    with User(ns, []) as user:
        assert user.nic.sidecar.offered & OFFLOADS == 0
        assert user.nic.link_up
        user.nic.up()
        mac = user.gateway()
        assert mac != GUEST_MAC
        user.nic.send(arp_request(GUEST_MAC, GUEST, GATEWAY), Header(NEEDS_CSUM, csum_start=14, csum_offset=2))
        assert user.nic.counters()["tx_dropped_header"] == 1


@pytest.mark.root
def test_dhcp(ns: NetNs) -> None:
    with User(ns, []) as user:
        user.nic.up()
        bootp = bytes([1, 1, 6, 0]) + b"\1\2\3\4" + bytes(20) + GUEST_MAC + bytes(10 + 192) + b"\x63\x82\x53\x63"
        discover = (bootp + bytes([53, 1, 1, 255])).ljust(300, b"\0")
        user.nic.send(ethernet(b"\xff" * 6, GUEST_MAC, 0x0800, udp("0.0.0.0", "255.255.255.255", 68, 67, discover)))
        offer = None
        while offer is None:
            offer = udp_payload(user.nic.recv_frame(), 68)
        assert offer[16:20] == socket.inet_aton(GUEST) and b"\x35\1\2" in offer[240:]  # option 53: an offer


@pytest.mark.root
@pytest.mark.parametrize("mrg", [True, False])
def test_a_forwarded_tcp_port_and_a_bulk_transfer_each_way(ns: NetNs, mrg: bool) -> None:
    with User(ns, ["127.0.0.1:8080:80", "udp:5353:53"]) as user:
        nic = user.nic.up(without=0 if mrg else bit("MRG_RXBUF"), buffers=64, size=2048 if mrg else 65562)
        mac = user.gateway()
        with ns.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
            client.setblocking(False)
            ns.call(client.connect_ex, ("127.0.0.1", 8080))
            syn = user.segment()
            assert syn.flags & SYN and syn.dport == 80
            seq, ack, port = 1000, syn.seq + 1, syn.sport

            def answer(flags: int, data: bytes = b"") -> None:
                user.send(mac, tcp4(GUEST, GATEWAY, 80, port, seq, ack, flags, data))

            answer(SYN | ACK)
            seq += 1
            # To the guest.
            data = os.urandom(200_000)
            sent, got = 0, bytearray()
            while len(got) < len(data):
                if sent < len(data) and select.select([], [client], [], 0)[1]:
                    sent += client.send(data[sent:])
                segment = user.segment()
                assert segment.valid
                if segment.data and segment.seq == ack:
                    got += segment.data
                    ack += len(segment.data)
                answer(ACK)
            assert bytes(got) == data
            # To the host.
            client.settimeout(20)
            data = os.urandom(60_000)
            for at in range(0, len(data), 1400):
                part = data[at : at + 1400]
                answer(ACK | PSH, part)
                seq += len(part)
                got_back = 0
                while got_back < len(part):
                    received = client.recv(65536)
                    assert received == data[at + got_back : at + got_back + len(received)]
                    got_back += len(received)
            answer(FIN | RST | ACK)
        with ns.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.sendto(b"question", ("127.0.0.1", 5353))
            question = None
            while question is None:
                question = udp_payload(nic.recv_frame(), 53)
            assert question == b"question"


@pytest.mark.root
def test_passt_that_dies_takes_the_link_down(ns: NetNs) -> None:
    with User(ns, []) as user:
        user.nic.up()
        user.gateway()
        signal.pidfd_send_signal(user.pidfd, signal.SIGKILL)
        user.nic.wait_link(False)
        user.nic.send(arp_request(GUEST_MAC, GUEST, GATEWAY))
        assert user.nic.counters()["tx_dropped_link"] == 1
        assert user.nic.sidecar.shutdown() == 0


@pytest.mark.root
def test_a_port_that_is_taken(ns: NetNs) -> None:
    with ns.socket(socket.AF_INET, socket.SOCK_STREAM) as taken:
        taken.bind(("127.0.0.1", 8080))
        taken.listen()
        for rule in ("8080:80", "127.0.0.1:8080:80"):
            with pytest.raises(UserError, match=r"tcp port .*:8080 of the host: Address already in use"):
                ns.call(netbackend.spawn_passt, [rule])


@pytest.mark.root
def test_a_host_without_a_network() -> None:
    with NetNs() as ns, pytest.raises(UserError, match=r"passt: .*(routable|interface)"):
        ns.call(netbackend.spawn_passt)


@pytest.mark.root
def test_a_host_with_ipv6_alone(ns: NetNs) -> None:
    """passt answers no ARP there, and is found ready all the same."""
    ns.ip("link", "del", "up0")
    ns.ip("tuntap", "add", "up6", "mode", "tap")
    ns.call(Path("/proc/sys/net/ipv6/conf/up6/disable_ipv6").write_text, "0")
    ns.ip("link", "set", "up6", "up")
    for address in ("fd00::1/64", "fe80::1/64"):
        ns.ip("addr", "add", address, "dev", "up6", "nodad")
    ns.ip("-6", "route", "add", "default", "via", "fd00::fe", "dev", "up6")
    with User(ns, []) as user:
        assert user.nic.up().link_up


class Peer:
    """The other end of a stream that is not passt."""

    def __init__(self) -> None:
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(20)
        with theirs:
            self.nic = Nic("passt", {"passt": theirs.fileno()}).up()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()
        self.nic.sidecar.close()
        self.nic.memory.close()

    def read(self, n: int) -> bytes:
        got = b""
        while len(got) < n:
            part = self.sock.recv(n - len(got))
            assert part
            got += part
        return got


def numbered(i: int, size: int) -> bytes:
    return ethernet(GUEST_MAC, b"\2" * 6, 0x88B5, struct.pack("!I", i).ljust(size, b"%d" % (i % 10)))


def test_frames_cut_anywhere_are_put_together() -> None:
    with Peer() as peer:
        frames = [numbered(i, 60 + 7 * i) for i in range(60)]
        stream = b"".join(struct.pack("!I", len(f)) + f for f in frames)
        step, at = 1, 0
        while at < len(stream):
            peer.sock.sendall(stream[at : at + step])
            at += step
            step = step * 3 % 1009 + 1
        for frame in frames:
            assert peer.nic.recv_frame() == frame


def test_a_reader_that_stalls_stops_the_guest_and_loses_nothing() -> None:
    with Peer() as peer:
        tx, sent = peer.nic.tx[0], 0
        while not peer.nic.counters()["tx_blocked"]:
            while tx._free:
                tx.submit(out=[Header().pack() + numbered(sent, 1000 + sent % 400)])
                sent += 1
            tx.kick()
            tx.reap()
        for i in range(sent):
            size = int.from_bytes(peer.read(4), "big")
            assert peer.read(size) == numbered(i, 1000 + i % 400)
        tx.wait(len(tx.in_flight))
        assert peer.nic.counters()["tx_packets"] == sent


def test_a_guest_without_buffers_stops_the_stream() -> None:
    with Peer() as peer:
        peer.nic.reset()
        peer.nic.up(buffers=2)
        peer.sock.setblocking(False)
        stream, sent, n = b"", 0, 0
        while True:
            if not stream:
                stream = struct.pack("!I", 1014) + numbered(n, 1000)
                n += 1
            try:
                done = peer.sock.send(stream)
            except BlockingIOError:
                if peer.nic.counters()["rx_starved"] and not select.select([], [peer.sock], [], 0.05)[1]:
                    break
                continue
            sent += done
            stream = stream[done:]
        peer.nic.post(peer.nic.rx[0], 100)
        peer.sock.settimeout(20)
        for i in range(n - 1):
            assert peer.nic.recv_frame() == numbered(i, 1000)


@pytest.mark.parametrize("length", [65535 + 19, 0xFFFFFFFF])
def test_a_stream_that_lost_its_borders_is_given_up(length: int) -> None:
    with Peer() as peer:
        peer.sock.sendall(struct.pack("!I", 13) + bytes(13))  # too short for a frame: skipped
        peer.sock.sendall(struct.pack("!I", 60) + numbered(1, 46))
        assert peer.nic.recv_frame() == numbered(1, 46)
        peer.sock.sendall(struct.pack("!I", length) + bytes(100))
        peer.nic.wait_link(False)
        assert peer.nic.sidecar.alive
