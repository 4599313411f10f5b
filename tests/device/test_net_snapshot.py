"""The net sidecar saved, and going on in another process, perhaps before another backend."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.frames import ACK, BROADCAST, GUEST_MAC, PSH, Tcp4, ethernet, tcp4, udp_payload
from harness.netns import NetNs
from harness.nic import GSO_TCPV4, GUEST_OFFLOADS, NEEDS_CSUM, OFFLOADS, OK, Header, Nic, bit, bits
from harness.wires import GUEST, HOST, OTHER_MAC, Wire, link, numbered, numbers, tap
from motorcade.proto import messages as m

CTRL_MQ, CTRL_MAC, CTRL_OFFLOADS = 4, 1, 5


@pytest.fixture
def ns() -> Iterator[NetNs]:
    with NetNs() as ns:
        yield ns


@pytest.fixture
def wire() -> Iterator[Wire]:
    with Wire() as wire:
        yield wire


@pytest.mark.root
def test_tap_to_none_to_tap_under_traffic(ns: NetNs) -> None:
    """A driver that uses every offload of the tap goes on without a link, and then before another tap."""
    with tap(ns, "t0") as first, tap(ns, "t1") as second, Nic("tap", first) as nic:
        nic.up()
        assert nic.features & bit("HOST_TSO4")
        with ns.packets("t0") as host:
            for n in range(30):
                host.send(numbered(n))
            assert numbers([nic.recv_frame() for _ in range(30)]) == list(range(30))
        nic.move("none", {})
        assert not nic.link_up
        nic.send(numbered(1))
        big = tcp4(GUEST, HOST, 5, 6, 1, 1, ACK | PSH, bytes(9000), partial=True)
        nic.send(
            ethernet(OTHER_MAC, GUEST_MAC, 0x0800, big),
            Header(NEEDS_CSUM, GSO_TCPV4, 54, 1000, csum_start=34, csum_offset=16),
        )
        assert nic.counters()["tx_dropped_link"] == 2
        assert nic.command(CTRL_OFFLOADS, 0, struct.pack("<Q", nic.features & bits("GUEST_CSUM"))) == OK
        nic.move("tap", second)
        assert nic.link_up
        with ns.packets("t1") as host:
            for n in range(30):
                host.send(numbered(n))
            assert numbers([nic.recv_frame() for _ in range(30)]) == list(range(30))
            nic.send(numbered(5).replace(GUEST_MAC, BROADCAST))
            while (frame := host.recv(2048))[:6] != BROADCAST:
                pass
            assert numbers([frame]) == [5]


@pytest.mark.root
def test_offloads_in_force_are_those_that_the_driver_chose(ns: NetNs) -> None:
    with tap(ns, "t0") as first, tap(ns, "t1") as second, Nic("tap", first) as nic:
        nic.up()
        assert nic.command(CTRL_OFFLOADS, 0, struct.pack("<Q", 0)) == OK
        nic.move("tap", second)
        # The kernel's own check: without GUEST_CSUM a tap finishes what it hands out.
        with ns.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            ns.ip("addr", "flush", "dev", "t0")
            sender.bind((HOST, 0))
            sender.sendto(b"x" * 100, (GUEST, 9))
        while udp_payload((got := nic.recv()).frame, 9) is None:
            pass
        assert got.header.flags & NEEDS_CSUM == 0


@pytest.mark.root
def test_queue_pairs_go_on(ns: NetNs) -> None:
    with tap(ns, "t0", 4) as first, tap(ns, "t1", 4) as second, Nic("tap", first, pairs=4) as nic:
        nic.up()
        assert nic.command(CTRL_MQ, 0, struct.pack("<H", 3)) == OK
        for backend, fds in (("none", {}), ("tap", second)):
            nic.move(backend, fds)
        with ns.packets("t1") as host:
            for pair in range(3):
                nic.send(numbered(pair).replace(GUEST_MAC, BROADCAST), pair=pair)
                while (frame := host.recv(2048))[:6] != BROADCAST:
                    pass
                assert numbers([frame]) == [pair]
        nic.tx[3].submit(out=[Header().pack() + numbered(3)])
        nic.tx[3].kick(force=True)
        nic.sidecar.stats()
        assert nic.tx[3].used_idx == 0
        assert nic.command(CTRL_MQ, 0, struct.pack("<H", 4)) == OK
        nic.tx[3].wait()


def test_frames_that_the_guest_had_no_buffers_for_come_after_the_restore(wire: Wire) -> None:
    frames = [numbered(n, 60 + n) for n in range(200)]
    with Nic("passt", wire.fds) as nic, Wire() as new:
        nic.up(buffers=4)
        torn = Wire.pack(numbered(999))[:20]  # lost with its stream
        wire.end.sendall(b"".join(map(Wire.pack, frames)) + torn)
        nic.poll_until(lambda: nic.counters()["rx_packets"] == 4, "four frames")
        assert wire.all_read()
        state = nic.end()
        assert len(state.data) > 200 * 60
        assert numbers([nic.recv_frame() for _ in range(4)]) == [0, 1, 2, 3]
        nic.successor("none", {})
        nic.restore(state)
        nic.sidecar.resume()
        # Four buffers again: each is posted once its frame was taken.
        assert [nic.recv_frame() for _ in range(50)] == frames[4:54]
        # What is left goes once more through a snapshot, now by itself.
        nic.move("passt", new.fds)
        new.send(numbered(200))
        assert numbers([nic.recv_frame() for _ in range(147)]) == list(range(54, 201))
        assert nic.nothing_comes()


def test_segments_go_on_where_they_stopped(tmp_path: Path) -> None:
    """A frame from a link that is being cut up for a guest that takes none that large."""
    payload = bytes(range(256)) * 60
    with (
        link(tmp_path / "l") as one,
        link(tmp_path / "l") as two,
        Nic("link", one) as a,
        Nic("link", two, name="b", mac=OTHER_MAC) as b,
    ):
        a.up()
        b.up(without=GUEST_OFFLOADS, buffers=3)
        a.wait_link(True)
        b.wait_link(True)
        a.send(
            ethernet(OTHER_MAC, GUEST_MAC, 0x0800, tcp4(GUEST, HOST, 5, 6, 100, 1, ACK | PSH, payload, partial=True)),
            Header(NEEDS_CSUM, GSO_TCPV4, 54, 1000, csum_start=34, csum_offset=16),
        )
        b.poll_until(lambda: b.counters()["rx_packets"] == 3, "three segments")
        b.move("none", {}, mac=OTHER_MAC)
        got = b""
        while len(got) < len(payload):
            segment = Tcp4.parse(b.recv_frame())
            assert segment is not None and segment.valid
            assert segment.seq == 100 + len(got)
            got += segment.data
        assert got == payload
        assert b.nothing_comes()
        a.wait_link(False)


def test_chosen_mac_is_kept_and_the_hosts_is_not(wire: Wire) -> None:
    chosen, clone = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")
    with Nic("none", {}) as nic:
        nic.up()
        nic.move("none", {}, mac=clone)
        assert nic.sidecar.config[:6] == clone
        assert nic.command(CTRL_MAC, 1, chosen) == OK
        nic.sidecar.wait_until(lambda: nic.sidecar.config[:6] == chosen, "the new MAC")
        nic.move("none", {}, mac=clone)
        assert nic.end().data.count(chosen) == 1


@pytest.mark.parametrize("backend", ["passt", "link"])
def test_a_nic_goes_on_without_its_link(wire: Wire, tmp_path: Path, backend: str) -> None:
    with link(tmp_path / "l") as fds, Nic(backend, wire.fds if backend == "passt" else fds) as nic:
        nic.up()
        nic.move("none", {})
        nic.wait_link(False)
        nic.send(numbered(1))
        assert nic.counters()["tx_dropped_link"] == 1
        nic.reset()
        nic.up()
        nic.send(numbered(1))


def test_without_a_link_everything_is_offered_and_dropped() -> None:
    with Nic("none", {}, pairs=16, mtu=1400) as nic:
        assert nic.sidecar.offered & OFFLOADS == OFFLOADS
        assert nic.sidecar.offered & bit("MQ")
        assert not nic.link_up
        nic.up()
        assert nic.command(CTRL_MQ, 0, struct.pack("<H", 16)) == OK
        for pair in range(16):
            nic.send(numbered(pair), pair=pair)
        assert nic.counters()["tx_dropped_link"] == 16
        assert nic.nothing_comes()


@pytest.mark.root
def test_what_passt_cannot_finish_is_refused_by_name(ns: NetNs, wire: Wire) -> None:
    with tap(ns, "t0") as fds, Nic("tap", fds) as nic:
        nic.up()
        state = nic.end()
        nic.successor("passt", wire.fds)
        answer = nic.sidecar.request(m.Load(state))
        assert isinstance(answer, m.Error)
        assert "backend passt cannot do: VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_ECN" in answer.text
        assert nic.sidecar.alive


def test_a_queue_that_was_broken_stays_so(wire: Wire) -> None:
    with Nic("passt", wire.fds) as nic:
        nic.up()
        nic.tx[0].set_avail_idx(5000)
        nic.tx[0].kick(force=True)
        nic.sidecar.wait_needs_reset()
        state = nic.move("none", {})
        assert [q.error != 0 for q in state.queues] == [False, True, False]
        assert nic.sidecar.needs_reset == []
        assert nic.command(CTRL_MAC, 1, GUEST_MAC) == OK


# States that nobody saved.


def states(nic: Nic, wire: Wire) -> m.DeviceState:
    nic.up(buffers=1)
    wire.send(numbered(1), numbered(2, 200), numbered(3))
    nic.poll_until(lambda: nic.counters()["rx_starved"] > 0, "a guest without buffers")
    return nic.end()


def test_hostile_states_are_refused_and_the_right_one_is_taken(wire: Wire) -> None:
    with Nic("passt", wire.fds) as nic:
        state = states(nic, wire)
        nic.successor("none", {})
        bad = [m.DeviceState(version, state.data, state.queues) for version in (0, 2, 0xFFFF)]
        bad += [m.DeviceState(1, state.data[:n], state.queues) for n in range(len(state.data))]
        bad.append(m.DeviceState(1, state.data + b"\0", state.queues))
        fixed = struct.Struct("<QQHH?6s")
        tail = state.data[fixed.size :]
        features, offloads, pairs, active, mac_set, mac = fixed.unpack_from(state.data)
        for values in (
            (1 << 63 | features, offloads, pairs, active, mac_set, mac),
            (features, offloads | 1 << 7, pairs, active, mac_set, mac),
            (features, offloads, 2, active, mac_set, mac),
            (features, offloads, 0, active, mac_set, mac),
            (features, offloads, 0xFFFF, active, mac_set, mac),
            (features, offloads, pairs, 0, mac_set, mac),
            (features, offloads, pairs, 2, mac_set, mac),
            (features, offloads, pairs, active, False, b"\1" + bytes(5)),
        ):
            bad.append(m.DeviceState(1, fixed.pack(*values) + tail, state.queues))
        bad.append(m.DeviceState(1, state.data, (m.QueueState(9, 0, 0),)))
        for wrong in bad:
            answer = nic.sidecar.request(m.Load(wrong))
            assert isinstance(answer, m.Error) and answer.code is m.ErrorCode.INVALID, wrong
            assert answer.text
        nic.restore(state)
        nic.sidecar.resume()
        assert numbers([nic.recv_frame() for _ in range(3)]) == [1, 2, 3]


def test_no_state_ends_the_process(wire: Wire) -> None:
    rng = random.Random(20)
    with Nic("passt", wire.fds) as nic:
        state = states(nic, wire)
        nic.successor("none", {})
        taken = 0
        for _ in range(1500):
            data = bytearray(state.data)
            for _ in range(rng.choice((1, 1, 2, 8))):
                data[rng.randrange(min(len(data), 80) if rng.random() < 0.7 else len(data))] = rng.randrange(256)
            answer = nic.sidecar.request(m.Load(m.DeviceState(1, bytes(data), state.queues)))
            assert isinstance(answer, m.Ok | m.Error)
            taken += answer == m.Ok()
        assert 0 < taken < 1500
        # The last that was taken, whatever it is, is given to a guest.
        nic.restore(state)
        nic.sidecar.resume()
        nic.recv_frame()


def test_hostile_positions_break_the_queue_and_nothing_else(wire: Wire) -> None:
    with Nic("passt", wire.fds) as nic:
        state = states(nic, wire)
        nic.successor("none", {})
        _, tx, ctrl = state.queues
        wrong = m.DeviceState(1, state.data, (m.QueueState(0, 40000, 7), tx, ctrl))
        nic.restore(wrong)
        nic.sidecar.resume()
        assert nic.sidecar.wait_needs_reset().queue == 0
        nic.send(numbered(1))
