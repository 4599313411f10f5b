"""The vhost-user front-end before backends that lie, stop, or end: its process and the guest are none the worse."""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.fakevhost import FEATURES, PROTOCOLS, FakeBackend, Lie, reply
from harness.sidecar import Sidecar, SidecarGone
from motorcade.proto import messages as m
from motorcade.sidecars.vhostuser import protocol
from motorcade.sidecars.vhostuser.protocol import HEADER, REPLY, U64, VERSION, VRING_STATE, Protocol, Request

DEVICE = "motorcade.sidecars.vhostuser.device:VhostUserDevice"
SEAL = Protocol.INFLIGHT_SHMFD

Backends = Callable[..., FakeBackend]


@pytest.fixture
def backends(tmp_path: Path) -> Iterator[Backends]:
    """Makes them; they end with the test."""
    made: list[FakeBackend] = []

    def make(**how: Any) -> FakeBackend:
        made.append(FakeBackend(tmp_path / f"b{len(made)}.sock", **how))
        return made[-1]

    yield make
    for backend in made:
        backend.close()


def bridge(backend: FakeBackend, **options: Any) -> Sidecar:
    """The sidecar, with its hello: a device of type 62 and four bytes of configuration space."""
    wait = options.pop("wait", True)
    said = {"type": 62, "socket": str(backend.path), "config_size": 4, "queue_size": 16, "stateless": True, **options}
    fds = backend.connect()
    try:
        role = m.KitBoot("dev0", "vhost-user", json.dumps(said))
        return Sidecar(DEVICE, role, fds, queues=said.get("queues", 1), reopen=backend.connect, wait=wait)
    finally:
        os.close(fds["backend"])


def back(sidecar: Sidecar, times: int = 1) -> None:
    """Plays the supervisor until it has had another connection so many times."""
    sidecar.poll_until(lambda: sidecar.stats().detail == (m.Counter("reconnects", times),), "the backend")


def descriptors(sidecar: Sidecar) -> int:
    """How many it has open."""
    return len(list(Path(f"/proc/{sidecar.pid}/fd").iterdir()))


def test_a_backend_of_any_type_answers(backends: Backends) -> None:
    backend = backends(features=FEATURES | 1 << 34 | 1 << 24 | 1 << 28, config=b"conf")
    with bridge(backend) as sidecar:
        assert sidecar.hello is not None and sidecar.hello.virtio_type == 62 and sidecar.config == b"conf"
        assert sidecar.offered == 1 << 5 | 1 << 28 | 1 << 29  # no packed rings, nothing from before virtio 1.0
        (queue,) = sidecar.start(event_idx=False)
        request = queue.run([b"ping"], [4])
        assert request.data == [b"ZZZZ"] and backend.taken == [b"ping"]
        assert backend.accepted == 1 << 32 | 1 << 30 | 1 << 5
        sidecar.ask(m.ConfigWrite(1, b"xy"))
        sidecar.wait_until(lambda: sidecar.config == b"cxyf", "what the driver wrote")
        assert backend.written == [(1, b"xy")]
        assert sidecar.shutdown() == 0


def with_fds(data: bytes, count: int) -> Lie:
    return lambda _: (data, [os.dup(0) for _ in range(count)])


LIES: list[tuple[str, dict[Request, Lie], str]] = [
    ("it closes", {Request.GET_FEATURES: lambda _: b""}, "closed the connection"),
    ("another message", {Request.GET_FEATURES: lambda _: reply(2, U64.pack(0))}, "sent message 2"),
    (
        "no reply",
        {Request.GET_FEATURES: lambda _: HEADER.pack(1, VERSION, 8) + U64.pack(0)},
        "sent message 1 with flags 0x1",
    ),
    (
        "gigabytes",
        {Request.GET_FEATURES: lambda _: HEADER.pack(1, VERSION | REPLY, 1 << 31) + bytes(4096)},
        "sent 2147483648 bytes",
    ),
    ("too short", {Request.GET_FEATURES: lambda _: reply(1, b"abc")}, "sent 3 bytes"),
    ("one descriptor", {Request.GET_FEATURES: with_fds(reply(1, U64.pack(FEATURES)), 1)}, "sent descriptors"),
    ("20 descriptors", {Request.GET_FEATURES: with_fds(reply(1, U64.pack(FEATURES)), 20)}, "more than 8 descriptors"),
    ("too few queues", {Request.GET_QUEUE_NUM: lambda _: reply(17, U64.pack(0))}, "has 0 queues, not 1"),
    ("no channel", {Request.SET_BACKEND_REQ_FD: lambda _: reply(21, U64.pack(1))}, "refused SET_BACKEND_REQ_FD"),
    ("no configuration", {Request.GET_CONFIG: lambda _: reply(24, b"")}, "does not give 4 bytes of configuration"),
    (
        "too much configuration",
        {Request.GET_CONFIG: lambda _: reply(24, protocol.CONFIG.pack(0, 4, 0) + bytes(200))},
        "sent 212 bytes",
    ),
]


@pytest.mark.parametrize(("lies", "why"), [lie[1:] for lie in LIES], ids=[lie[0] for lie in LIES])
def test_lies_before_the_hello_are_a_reason_not_to_start(
    backends: Backends, lies: dict[Request, Lie], why: str
) -> None:
    with pytest.raises(SidecarGone, match=why):
        bridge(backends(lies=lies))


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"features": FEATURES & ~(1 << 32)}, "VERSION_1 is missing"),
        ({"protocols": 0}, "no configuration space to give"),
    ],
)
def test_backends_that_cannot_do(backends: Backends, how: dict[str, Any], why: str) -> None:
    with pytest.raises(SidecarGone, match=why):
        bridge(backends(**how))


def test_silence_has_a_deadline_everywhere(backends: Backends) -> None:
    mute = backends(lies={Request.GET_FEATURES: lambda _: None})
    stays = backends(lies={Request.GET_VRING_BASE: lambda _: None})
    with bridge(mute, wait=False) as never, bridge(stays, reconnect=0) as sidecar:
        (queue,) = sidecar.start(event_idx=False)
        queue.run([b"ping"], [4])
        sidecar.reset()  # it is not answered, and comes to an end nevertheless
        with pytest.raises(SidecarGone, match="does not give its answer to GET_FEATURES within 5 s"):
            never.wait_until(lambda: False, "its end")
        assert "GET_VRING_BASE within 8 s" in sidecar.log_tail()
        (again,) = sidecar.start(event_idx=False)
        back(sidecar)
        assert again.run([b"pong"], [4]).data == [b"ZZZZ"]
        assert stays.connections == 2


@pytest.mark.parametrize(
    ("lie", "why"),
    [
        (lambda _: reply(11, VRING_STATE.pack(7, 0)), "answered that queue 7"),
        (lambda _: reply(11, VRING_STATE.pack(0, 70000)), "queue 0 is at 70000"),
        (lambda _: reply(11, VRING_STATE.pack(0, 9000)), "where it cannot be"),
    ],
)
def test_a_backend_that_lies_about_where_it_is_keeps_no_machine_from_going_on(
    backends: Backends, lie: Lie, why: str
) -> None:
    backend = backends(lies={Request.GET_VRING_BASE: lie})
    with bridge(backend) as sidecar:
        (queue,) = sidecar.start(event_idx=False)
        queue.run([b"ping"], [4])
        sidecar.quiesce()  # what is in the rings is known without it
        (state,) = sidecar.save().queues
        assert (state.last_avail, state.used_idx) == (1, 1)
        assert why in sidecar.log_tail()
        sidecar.resume()
        back(sidecar)
        assert queue.run([b"pong"], [4]).data == [b"ZZZZ"]


@pytest.mark.parametrize("words", [b"\0" * 12, HEADER.pack(1, VERSION | REPLY, 8) + bytes(8), b"x" * 100000])
def test_words_that_nobody_asked_for_end_the_connection_and_not_the_device(backends: Backends, words: bytes) -> None:
    backend = backends()
    with bridge(backend) as sidecar:
        (queue,) = sidecar.start(event_idx=False)
        queue.run([b"ping"], [4])
        before = descriptors(sidecar)
        assert backend.connection is not None
        backend.connection.setblocking(False)
        backend.connection.send(words)
        sidecar.wait_log("speaks unasked")
        back(sidecar)
        queue.run([b"pong"], [4])
        assert descriptors(sidecar) == before


def test_its_own_channel_takes_what_comes(backends: Backends) -> None:
    """A flood of changes reaches the guest in a measure; nonsense ends the connection; descriptors are closed."""
    backend = backends(config=b"0000")
    with bridge(backend) as sidecar:
        (queue,) = sidecar.start(event_idx=False)
        queue.run([b"ping"], [4])
        before = descriptors(sidecar)
        assert backend.requests is not None
        change = HEADER.pack(protocol.CONFIG_CHANGE, VERSION, 0)
        backend.config = b"1111"
        for _ in range(300):
            socket.send_fds(backend.requests, [change[:5]], [0])
            backend.requests.send(change[5:])
        sidecar.wait_until(lambda: sidecar.config == b"1111", "the change")
        assert backend.seen.count(Request.GET_CONFIG) < 30
        backend.requests.send(HEADER.pack(99, VERSION | protocol.NEED_REPLY, 2) + b"ab")
        number, _, size, refused = struct.unpack("<IIIQ", backend.requests.recv(20, socket.MSG_WAITALL))
        assert (number, size, refused) == (99, 8, 1)
        assert queue.run([b"pong"], [4]).data == [b"ZZZZ"]
        assert descriptors(sidecar) == before
        backend.requests.send(HEADER.pack(99, VERSION, 1 << 31))
        back(sidecar)
        assert "sent a request 99 of 2147483648 bytes" in sidecar.log_tail()
        assert queue.run([b"pang"], [4]).data == [b"ZZZZ"]


def test_a_change_while_no_driver_is_there_is_seen_by_the_next_one(backends: Backends) -> None:
    backend = backends(config=b"0000")
    with bridge(backend) as sidecar:
        sidecar.ask(m.Ping())
        backend.config = b"2222"
        assert backend.requests is not None
        backend.requests.send(HEADER.pack(protocol.CONFIG_CHANGE, VERSION | protocol.NEED_REPLY, 0))
        assert struct.unpack("<IIIQ", backend.requests.recv(20, socket.MSG_WAITALL))[3] == 0
        sidecar.start(event_idx=False)
        sidecar.wait_until(lambda: sidecar.config == b"2222", "the change")


def test_one_that_goes_while_no_driver_is_there_is_asked_for_when_one_comes(backends: Backends) -> None:
    backend = backends()
    with bridge(backend) as sidecar:
        backend.drop()
        sidecar.wait_log("closed the connection")
        (queue,) = sidecar.start(event_idx=False)
        back(sidecar)
        assert queue.run([b"ping"], [4]).data == [b"ZZZZ"]


def test_requests_that_come_back_after_the_stop_are_waited_for_and_announced(backends: Backends) -> None:
    backend = backends(hold=True, late=True)
    with bridge(backend) as sidecar:
        (queue,) = sidecar.start(event_idx=False)
        for n in range(3):
            queue.submit([b"h%d" % n], [4])
        queue.kick()
        sidecar.ping_until(lambda: len(backend.taken) == 3, "the requests")
        sidecar.quiesce()
        (state,) = sidecar.save().queues
        assert (state.last_avail, state.used_idx, queue.used_idx) == (3, 3, 3)
        assert [r.data for r in queue.wait(3)] == [[b"ZZZZ"]] * 3


def test_a_ring_that_it_gives_up_needs_a_reset(backends: Backends) -> None:
    backend = backends()
    with bridge(backend) as sidecar:
        (queue,) = sidecar.start(event_idx=False)
        queue.run([b"ping"], [4])
        os.eventfd_write(backend.rings[0].error, 1)
        notice = sidecar.wait_needs_reset()
        assert notice.queue == 0 and "gave it up" in notice.reason
        sidecar.reset()
        (queue,) = sidecar.start(event_idx=False)
        assert queue.run([b"pong"], [4]).data == [b"ZZZZ"]


def test_one_that_ends_again_and_again_is_given_up(backends: Backends) -> None:
    backend = backends(lies={Request.SET_MEM_TABLE: lambda _: b""})
    with bridge(backend) as sidecar:
        sidecar.start(event_idx=False)
        notice = sidecar.wait_needs_reset()
        assert notice.queue == m.NO_QUEUE and "6 times in a row" in notice.reason
        outcome = sidecar.request(m.Quiesce())
        assert isinstance(outcome, m.Error) and "6 times in a row" in outcome.text
        sidecar.reset()
        backend.lies.clear()
        (queue,) = sidecar.start(event_idx=False)
        back(sidecar, 6)
        assert queue.run([b"pong"], [4]).data == [b"ZZZZ"]


def test_a_backend_that_does_not_come_back_is_not_waited_for_longer_than_said(backends: Backends) -> None:
    backend = backends()
    with bridge(backend, reconnect=0.3) as sidecar:
        (queue,) = sidecar.start(event_idx=False)
        queue.run([b"ping"], [4])
        backend.close()
        notice = sidecar.wait_needs_reset()
        assert notice.queue == m.NO_QUEUE
        assert "no backend within 0.3 s: no backend at" in notice.reason and "Connection refused" in notice.reason
        sidecar.ask(m.Ping())
        sidecar.reset()
        assert sidecar.shutdown() == 0


def test_the_inflight_region_of_the_dead_is_given_to_the_next(backends: Backends) -> None:
    backend = backends(protocols=PROTOCOLS | Protocol.INFLIGHT_SHMFD, hold=True)
    with bridge(backend, stateless=False) as sidecar:
        (queue,) = sidecar.start(event_idx=False)
        request = queue.submit([b"held"], [4])
        queue.kick()
        sidecar.ping_until(lambda: backend.taken == [b"held"], "the request")
        head = request.head
        assert "state of its own" in str(sidecar.request(m.Quiesce()))
        backend.hold = False
        backend.drop()
        back(sidecar)
        queue.wait(1)
        assert backend.taken == [b"held", b"held"]
        assert backend.inflight == [bytes(4), struct.pack("<HH", 1, head)]
        assert backend.seen.count(Request.GET_INFLIGHT_FD) == 1


def test_with_requests_in_hand_and_its_backend_away_it_is_not_frozen(backends: Backends) -> None:
    """Who has closed a connection may still be at work in guest memory."""
    backend = backends(hold=True)
    with bridge(backend) as sidecar:
        (queue,) = sidecar.start(event_idx=False)
        queue.submit([b"held"], [4])
        queue.kick()
        sidecar.ping_until(lambda: backend.taken == [b"held"], "the request")
        backend.close()
        sidecar.wait_log("closed the connection")
        outcome = sidecar.request(m.Quiesce())
        assert isinstance(outcome, m.Error) and "is away, with requests in hand" in outcome.text
        sidecar.reset()
        sidecar.quiesce()


def test_answers_that_come_after_the_connection_are_not_asked_for_again(backends: Backends) -> None:
    backend = backends(hold=True)
    with bridge(backend) as sidecar:
        (queue,) = sidecar.start(event_idx=False)
        for n in range(3):
            queue.submit([b"h%d" % n], [4])
        queue.kick()
        sidecar.ping_until(lambda: len(backend.taken) == 3, "the requests")
        backend.answer_on_drop = 2
        backend.hold = False
        backend.drop()
        back(sidecar)
        assert [r.data for r in queue.wait(3)] == [[b"ZZZZ"]] * 3
        assert backend.taken == [b"h0", b"h1", b"h2", b"h2"]


def test_without_a_region_a_backend_with_a_state_is_not_gone_on_from(backends: Backends) -> None:
    backend = backends(hold=True)
    with bridge(backend, stateless=False) as sidecar:
        (queue,) = sidecar.start(event_idx=False)
        queue.submit([b"held"], [4])
        queue.kick()
        sidecar.ping_until(lambda: backend.taken == [b"held"], "the request")
        backend.drop()
        notice = sidecar.wait_needs_reset()
        assert "had 1 requests in hand, and machine.yaml does not say that it is stateless" in notice.reason


@pytest.mark.parametrize(
    ("lie", "why"),
    [
        (lambda _: reply(31, protocol.INFLIGHT.pack(4096, 0, 1, 16)), "no descriptor"),
        (with_fds(reply(31, protocol.INFLIGHT.pack(1 << 40, 0, 1, 16)), 1), "inflight region of 1099511627776 bytes"),
        (with_fds(reply(31, protocol.INFLIGHT.pack(4096, 5, 1, 16)), 1), "bytes at 5"),
        (with_fds(reply(31, protocol.INFLIGHT.pack(4096, 0, 1, 16)), 3), "sent 3 descriptors"),
    ],
)
def test_an_inflight_region_that_is_none(backends: Backends, lie: Lie, why: str) -> None:
    backend = backends(protocols=PROTOCOLS | Protocol.INFLIGHT_SHMFD, lies={Request.GET_INFLIGHT_FD: lie})
    with bridge(backend) as sidecar:
        before = descriptors(sidecar)
        sidecar.start(event_idx=False)
        assert "6 times in a row" in sidecar.wait_needs_reset().reason
        assert why in sidecar.log_tail()
        assert descriptors(sidecar) <= before


def test_another_backend_that_lacks_what_the_driver_uses(backends: Backends) -> None:
    backend = backends()
    with bridge(backend) as sidecar:
        (queue,) = sidecar.start(event_idx=False)
        queue.run([b"ping"], [4])
        backend.features &= ~(1 << 5)
        backend.drop()
        assert "lacks feature bits 0x20" in sidecar.wait_needs_reset().reason
        assert sidecar.alive


def test_a_driver_that_puts_its_ring_nowhere_breaks_only_that_ring(backends: Backends) -> None:
    backend = backends()
    with bridge(backend, queues=2) as sidecar:
        good, bad = sidecar.queue(0, event_idx=False), sidecar.queue(1, event_idx=False)
        wrong = m.Queue(1, bad.size, 1 << 50, bad.driver, bad.device)
        sidecar.ask(m.Activate(sidecar.accepted([good]), (good.config, wrong)))
        assert sidecar.wait_needs_reset().queue == 1
        assert good.run([b"ping"], [4]).data == [b"ZZZZ"]
        assert list(backend.rings) == [0]
