"""The net sidecar at rest: it serves nothing, loses nothing, and all that it wrote is in the dirty log."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.frames import ACK, BROADCAST, GUEST_MAC, PSH, ethernet, tcp4, udp
from harness.netns import NetNs
from harness.nic import GSO_TCPV4, GUEST_OFFLOADS, NEEDS_CSUM, Header, Nic
from harness.wires import GUEST, HOST, OTHER_MAC, Wire, link, numbered, numbers, tap, used


@pytest.fixture
def ns() -> Iterator[NetNs]:
    with NetNs() as ns:
        yield ns


@pytest.fixture
def wire() -> Iterator[Wire]:
    with Wire() as wire:
        yield wire


@pytest.mark.root
def test_tap_at_rest_serves_nothing_and_loses_nothing(ns: NetNs) -> None:
    with tap(ns, "t0") as fds, ns.packets() as host, Nic("tap", fds) as nic:
        nic.up(buffers=64)
        sent = came = 0
        for _ in range(5):
            nic.sidecar.quiesce()
            before = used(nic)
            for _ in range(100):
                host.send(numbered(sent))
                sent += 1
            for n in range(20):
                nic.tx[0].submit(out=[Header().pack() + numbered(1000 + n).replace(GUEST_MAC, BROADCAST)])
            nic.tx[0].kick(force=True)
            nic.sidecar.stats()
            assert used(nic) == before
            nic.sidecar.resume()
            frames = [nic.recv_frame() for _ in range(100)]
            assert numbers(frames) == list(range(came, sent))
            came = sent
            nic.tx[0].wait(20)
            got: list[bytes] = []
            while len(got) < 20:
                frame = host.recv(2048)
                if frame[:6] == BROADCAST:
                    got.append(frame)
            assert numbers(got) == list(range(1000, 1020))
        assert nic.nothing_comes()


def test_far_end_of_a_link_does_not_see_the_other_rest(tmp_path: Path) -> None:
    with (
        link(tmp_path / "l") as one,
        link(tmp_path / "l") as two,
        Nic("link", one) as a,
        Nic("link", two, name="b") as b,
    ):
        a.up(buffers=32)
        b.up(buffers=32)
        a.wait_link(True)
        b.wait_link(True)
        changes = len(b.sidecar.config_changes)
        for resting, other in ((a, b), (b, a)):
            resting.sidecar.quiesce()
            before = used(resting)
            for n in range(50):
                other.send(numbered(n))
            resting.tx[0].submit(out=[Header().pack() + numbered(77)])
            resting.tx[0].kick(force=True)
            other.sidecar.stats()
            resting.sidecar.stats()
            assert used(resting) == before
            assert other.nothing_comes()
            resting.sidecar.resume()
            assert numbers([resting.recv_frame() for _ in range(50)]) == list(range(50))
            assert numbers([other.recv_frame()]) == [77]
        assert len(b.sidecar.config_changes) == changes, "the link never went down"
        assert a.counters()["tx_dropped_link"] == b.counters()["tx_dropped_link"] == 0


def test_link_can_be_made_up_around_a_rest(tmp_path: Path) -> None:
    """Quiesced while it listens, or before the other's greeting came."""
    with (
        link(tmp_path / "l") as one,
        link(tmp_path / "l") as two,
        Nic("link", one) as a,
        Nic("link", two, name="b") as b,
    ):
        a.up()
        a.sidecar.quiesce()
        b.up()
        b.sidecar.quiesce()
        a.sidecar.resume()
        b.sidecar.resume()
        a.wait_link(True)
        b.wait_link(True)
        a.send(numbered(1))
        assert numbers([b.recv_frame()]) == [1]
        a.sidecar.quiesce()
        a.reset()
        b.wait_link(False)


def test_stream_goes_on_in_the_middle_of_a_frame(wire: Wire) -> None:
    with Nic("passt", wire.fds) as nic:
        nic.up()
        data = Wire.pack(numbered(1, 1400)) + Wire.pack(numbered(2, 1400))
        for cut in (2, 700, 1404, 1406, 2000):
            wire.end.sendall(data[:cut])
            nic.poll_until(wire.all_read, "the sidecar to have read it")
            nic.sidecar.quiesce()
            nic.sidecar.save()
            nic.sidecar.resume()
            wire.end.sendall(data[cut:])
            assert [nic.recv_frame(), nic.recv_frame()] == [numbered(1, 1400), numbered(2, 1400)]


def test_stream_sends_the_rest_of_a_frame_once(wire: Wire) -> None:
    wire.nics.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with Nic("passt", wire.fds) as nic:
        nic.up()
        for n in range(40):
            nic.tx[0].submit(out=[Header().pack() + numbered(n, 9000)])
        nic.tx[0].kick()
        nic.poll_until(lambda: nic.counters()["tx_blocked"] > 0, "a full socket")
        wanted = b"".join(Wire.pack(numbered(n, 9000)) for n in range(40))
        got = b""
        while len(got) < len(wanted):
            nic.sidecar.quiesce()
            before = used(nic)
            # Room, which the resting sidecar must not use.
            with contextlib.suppress(BlockingIOError):
                got += wire.end.recv(5000, socket.MSG_DONTWAIT)
            nic.sidecar.stats()
            assert used(nic) == before
            nic.sidecar.resume()
        assert got == wanted
        nic.tx[0].wait(40)


def test_no_frame_of_a_busy_link_is_lost_in_many_rests(tmp_path: Path) -> None:
    frames = 4000
    with (
        link(tmp_path / "l") as one,
        link(tmp_path / "l") as two,
        Nic("link", one) as a,
        Nic("link", two, name="b") as b,
    ):
        a.up()
        b.up()
        a.wait_link(True)
        b.wait_link(True)

        def send() -> None:
            for n in range(frames):
                b.send(numbered(n))

        sender = threading.Thread(target=send)
        sender.start()
        for at in range(0, frames, 40):
            assert numbers([a.recv_frame() for _ in range(40)]) == list(range(at, at + 40))
            a.sidecar.quiesce()
            before = used(a)
            a.sidecar.save()
            assert used(a) == before
            a.sidecar.resume()
        sender.join()
        assert a.nothing_comes()


@pytest.mark.root
def test_no_frame_of_a_busy_tap_is_lost_in_many_rests(ns: NetNs) -> None:
    """Both ways at once; as many under way as a tap's own queue holds."""
    frames, window = 4000, threading.Semaphore(200)
    with tap(ns, "t0") as fds, ns.packets() as host, Nic("tap", fds) as nic:
        nic.up()

        def send() -> None:
            for n in range(frames):
                window.acquire()
                host.send(numbered(n))

        sender = threading.Thread(target=send)
        sender.start()
        for at in range(0, frames, 50):
            assert numbers([nic.recv_frame() for _ in range(50)]) == list(range(at, at + 50))
            window.release(50)
            for n in range(5):
                nic.tx[0].submit(out=[Header().pack() + numbered(at // 10 + n).replace(GUEST_MAC, BROADCAST)])
            nic.tx[0].kick()
            nic.sidecar.quiesce()
            nic.sidecar.save()
            nic.sidecar.resume()
            nic.tx[0].wait(5)
        sender.join()
        assert nic.nothing_comes()
        got: list[bytes] = []
        while len(got) < frames // 10:
            frame = host.recv(2048)
            if frame[:6] == BROADCAST:
                got.append(frame)
        assert numbers(got) == list(range(frames // 10))


def test_dirty_log_has_every_page_that_was_written(wire: Wire) -> None:
    """Also of frames that were read into guest buffers and then dropped."""
    with Nic("passt", wire.fds) as nic:
        nic.up(buffers=100, size=9000)
        dirty_while(nic, lambda: wire.send(*[numbered(n, 100 + 300 * n) for n in range(29)]), 29)


def dirty_while(nic: Nic, act: object, frames: int) -> None:
    assert callable(act)
    nic.sidecar.quiesce()
    nic.rx[0].set_used_event(0x8000)
    nic.memory.take_dirty()
    before = nic.memory.pages()
    act()
    nic.sidecar.resume()
    nic.poll_until(lambda: nic.counters()["rx_packets"] >= frames, f"{frames} frames")
    nic.sidecar.quiesce()
    changed = {i for i, (a, b) in enumerate(zip(before, nic.memory.pages(), strict=True)) if a != b}
    assert len(changed) > frames
    assert changed <= nic.memory.take_dirty()


def test_dirty_log_has_what_a_link_read_into_guest_memory(tmp_path: Path) -> None:
    with (
        link(tmp_path / "l") as one,
        link(tmp_path / "l") as two,
        Nic("link", one) as a,
        Nic("link", two, name="b") as b,
    ):
        a.up()
        b.up(without=GUEST_OFFLOADS, buffers=200, size=4096)
        a.wait_link(True)
        b.wait_link(True)

        def act() -> None:
            for n in range(20):
                a.send(numbered(n, 1000))
            big = tcp4(GUEST, HOST, 5, 6, 1, 1, ACK | PSH, os.urandom(30000), partial=True)
            gso = Header(NEEDS_CSUM, GSO_TCPV4, 54, 1000, csum_start=34, csum_offset=16)
            a.send(ethernet(OTHER_MAC, GUEST_MAC, 0x0800, big), gso)
            # Segmentation of what is no TCP: read, and then dropped.
            bad = ethernet(OTHER_MAC, GUEST_MAC, 0x0800, udp(GUEST, HOST, 5, 6, os.urandom(20000)))
            a.send(bad, gso)
            a.send(numbered(21))

        dirty_while(b, act, 51)
        assert b.counters()["rx_dropped_header"] == 1
