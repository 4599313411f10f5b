"""The control plane over a real ipc socket: who gets in, what is refused, and that nothing of it ends the core."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from harness.zmtp import RawPeer, peer_process
from motorcade.proto import schema
from motorcade.proto.framing import ControlClient, ControlServer, Gone, Outcome, Refused, Timeout
from motorcade.proto.schema import (
    ConfigChanged,
    Error,
    ErrorCode,
    Hello,
    Message,
    Ok,
    Ping,
    StatsReport,
    StatsRequest,
    Welcome,
)

ME = os.getpid()


def hello(device_id: str = "disk0", pid: int = ME, version: int = 1) -> Hello:
    return Hello(version, device_id, pid, 2, 0, (256,), b"")


class Core:
    """A ControlServer with a handler that welcomes everybody, driven until something is so."""

    def __init__(self, path: Path) -> None:
        self.server = ControlServer(self._handle)
        self.path = str(path / "core.sock")
        self.server.bind(self.path)
        self.received: list[tuple[str, Message]] = []
        self.outcomes: list[Outcome] = []
        self.clients: list[ControlClient] = []

    def _handle(self, device_id: str, message: Message) -> None:
        self.received.append((device_id, message))
        if isinstance(message.body, Hello):
            self.server.answer(device_id, message.id, Welcome(1))

    def until(self, done: Callable[[], object], *also: RawPeer, seconds: float = 20.0) -> None:
        """Serves until ``done()``; looks again when ``also`` have something to read, too."""
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, f"waited in vain; refused so far: {self.server.refusals.counts}"
            due = self.server.next_deadline()
            wait = end if due is None else min(end, due)
            select.select(
                [self.server.fileno(), *(p.fileno() for p in also)], [], [], max(0.0, wait - time.monotonic())
            )
            self.server.process()
            self.server.expire(time.monotonic())

    def refused(self, device_id: str, why: str) -> int:
        return sum(n for (d, w), n in self.server.refusals.counts.items() if d == device_id and w.startswith(why))

    def raw(self) -> RawPeer:
        """A hand-made ZMTP peer of this process, past its handshake."""
        peer = RawPeer(self.path)
        self.until(peer.ready, peer)
        return peer

    def raw_welcomed(self, device_id: str = "disk0") -> RawPeer:
        peer = self.raw()
        peer.send(schema.encode(Message(1, 1000, hello(device_id))))
        self.until(lambda: self.server.connected(device_id))
        assert schema.decode(peer.receive()).body == Welcome(1)
        return peer

    def ping(self, device_id: str = "disk0", deadline_ms: int = 20_000) -> None:
        self.server.request(device_id, Ping(), deadline_ms, self.outcomes.append)


@contextlib.contextmanager
def flood(peer: RawPeer, data: bytes, count: int, more: bool = False) -> Iterator[None]:
    """Sends ``data`` ``count`` times from a thread: the core's back-pressure makes it wait."""

    def send() -> None:
        for _ in range(count):
            peer.send(data, more)

    thread = threading.Thread(target=send)
    thread.start()
    yield
    thread.join()


@pytest.fixture
def core(tmp_path: Path) -> Iterator[Core]:
    core = Core(tmp_path)
    yield core
    core.server.close()
    assert list(tmp_path.iterdir()) == []


def test_a_sidecar_says_hello_and_answers(core: Core) -> None:
    with peer_process(core.path, "disk0") as sidecar:
        core.server.expect("disk0", sidecar.pid)
        sidecar.go()
        core.until(lambda: core.server.connected("disk0"))
        core.ping()
        core.server.request("disk0", StatsRequest(), 20_000, core.outcomes.append)
        core.server.request("disk0", schema.Activate(0, ()), 20_000, core.outcomes.append)
        core.until(lambda: len(core.outcomes) == 3)
        assert core.outcomes[0] == Ok()
        assert isinstance(core.outcomes[1], StatsReport)
        assert core.outcomes[2] == Error(ErrorCode.STATE, "not now")
        # The harness sends a notice for each request but pings.
        core.until(lambda: len(core.received) == 3)
        assert core.received[1] == ("disk0", Message(0, 0, ConfigChanged(b"c")))
        core.server.request("disk0", schema.Shutdown(), 20_000, core.outcomes.append)
        core.until(lambda: len(core.outcomes) == 4)
        assert sidecar.wait() == 0
    assert not core.server.refusals.counts


def test_the_socket_is_private(core: Core, tmp_path: Path) -> None:
    assert stat.S_IMODE(Path(core.path).stat().st_mode) == 0o600
    tmp_path.chmod(0o755)
    server = ControlServer()
    with pytest.raises(PermissionError, match="0700"):
        server.bind(str(tmp_path / "other.sock"))
    with pytest.raises(ValueError, match="107"):
        server.bind("/tmp/" + "x" * 103)
    server.close()
    tmp_path.chmod(0o700)


def test_a_process_that_is_not_expected_is_refused_at_once(core: Core) -> None:
    with peer_process(core.path, "disk0") as sidecar:
        core.server.expect("disk0", ME)
        sidecar.go()
        core.until(lambda: core.refused("?", "a connection by a process that is no sidecar"))
        assert sidecar.wait() == 3  # Refused, well before its time-out
    assert not core.server.connected("disk0")


def test_another_user_is_refused(core: Core) -> None:
    core.server.expect("disk0", ME, uid=os.geteuid() + 1)
    peer = RawPeer(core.path)
    core.until(peer.refused, peer)
    assert core.refused("disk0", "a connection by another user") == 1


def test_one_connection_a_process(core: Core) -> None:
    core.server.expect("disk0", ME)
    first = core.raw_welcomed()
    second = RawPeer(core.path)
    core.until(second.refused, second)
    assert core.refused("disk0", "a second connection") == 1
    core.ping()
    assert isinstance(schema.decode(first.receive()).body, Ping)


def test_a_routing_id_and_properties_of_the_peers_choice_mean_nothing(core: Core) -> None:
    """blk0 (a process of its own) claims to be net0 in every way that ZMTP has; net0 notices nothing."""
    core.server.expect("net0", ME)
    victim = core.raw_welcomed("net0")
    with peer_process(core.path, "net0", identity=b"net0", user_id=b"1") as thief:
        core.server.expect("blk0", thief.pid)
        thief.go()
        core.until(lambda: core.refused("blk0", "a hello with another name"))
        core.ping("net0")
        request = schema.decode(victim.receive())
        victim.send(schema.encode(Message(request.id, 0, Ok())))
        core.until(lambda: core.outcomes)
        assert core.outcomes == [Ok()]
        assert thief.wait() == 3  # told: invalid
    assert not core.server.connected("blk0")


def test_a_routing_id_in_use_cannot_be_claimed(core: Core) -> None:
    """Even the bytes that libzmq invented for another connection."""
    core.server.expect("net0", ME)
    victim = core.raw_welcomed("net0")
    route = core.server._peers["net0"].route
    assert route is not None
    with peer_process(core.path, "blk0", identity=route) as thief:
        core.server.expect("blk0", thief.pid)
        thief.go()
        core.until(lambda: core.server._peers["blk0"].token)  # admitted; libzmq ignores it from here
        core.ping("net0")
        request = schema.decode(victim.receive())
        victim.send(schema.encode(Message(request.id, 0, Ok())))
        core.until(lambda: core.outcomes)
    assert core.outcomes == [Ok()]


@pytest.mark.parametrize("garbage", [b"\x05\0hello garbage" * 10, b"\0" * 300, bytes(range(256)) * 8, b"\xff"])
def test_garbage_on_the_socket_is_ignored(core: Core, garbage: bytes) -> None:
    core.server.expect("disk0", ME)
    vandal = RawPeer(core.path, greet=False)
    vandal.raw(garbage)
    vandal.close()
    peer = core.raw_welcomed()
    core.ping()
    assert isinstance(schema.decode(peer.receive()).body, Ping)
    assert [d for d, _ in core.received] == ["disk0"]


def test_what_a_sidecar_may_not_send_is_counted_and_dropped(core: Core) -> None:
    core.server.expect("disk0", ME)
    peer = core.raw()
    peer.send(schema.encode(Message(0, 0, ConfigChanged(b"x"))))
    core.until(lambda: core.refused("disk0", "a message before its hello"))
    peer.send(schema.encode(Message(0, 0, hello())))
    core.until(lambda: core.refused("disk0", "a hello without an id"))
    peer.send(schema.encode(Message(1, 10, hello())))
    core.until(lambda: core.server.connected("disk0"))
    peer.receive()
    for data, why in (
        (schema.encode(Message(2, 10, hello())), "a second hello"),
        (schema.encode(Message(5, 10, Ping())), "a message that sidecars do not send"),
        (schema.encode(Message(0, 0, Ping())), "a message that sidecars do not send"),
        (schema.encode(Message(5, 0, ConfigChanged(b"x"))), "a message that sidecars do not send"),
        (schema.encode(Message(99, 0, Ok())), "an answer to nothing"),
        (schema.encode(Message(0, 0, Ok())), "an answer to nothing"),
        (b"", "a malformed message"),
        (b"\xff" * 64, "a malformed message"),
        (schema.encode(Message(2, 10, hello()))[:-8], "a malformed message"),
    ):
        before = core.refused("disk0", why)
        peer.send(data)
        core.until(lambda why=why, before=before: core.refused("disk0", why) > before)  # type: ignore[misc]
    assert len(core.received) == 1
    core.ping()
    assert isinstance(schema.decode(peer.receive()).body, Ping)


def test_messages_of_many_frames_are_dropped(core: Core) -> None:
    core.server.expect("disk0", ME)
    peer = core.raw_welcomed()
    with flood(peer, b"x", 5000, more=True):
        pass
    peer.send(schema.encode(Message(0, 0, ConfigChanged(b"x"))))
    peer.send(schema.encode(Message(0, 0, ConfigChanged(b"y"))))
    core.until(lambda: len(core.received) == 2)
    assert core.received[1][1].body == ConfigChanged(b"y")
    assert core.refused("?", "a message that is not one frame") == 1


def test_too_long_a_frame_ends_the_connection_and_nothing_else(core: Core) -> None:
    core.server.expect("disk0", ME)
    peer = core.raw_welcomed()
    peer.send(b"x" * (schema.MAX_CONTROL_BYTES + 1))
    core.until(peer.closed, peer)
    core.ping(deadline_ms=100)
    core.until(lambda: core.outcomes)
    # There is nobody to ask, but it may still run: not Gone. Whether ZeroMQ had noticed yet makes no difference.
    assert core.outcomes in ([Timeout(100)], [Timeout(100, unconnected=True)])


def test_hello_of_a_version_too_old(core: Core) -> None:
    core.server.expect("disk0", ME)
    peer = core.raw()
    peer.send(schema.encode(Message(7, 10, hello(version=0))))
    core.until(lambda: core.refused("disk0", "a hello"))
    answer = schema.decode(peer.receive())
    assert isinstance(answer.body, Error)
    assert (answer.id, answer.body.code) == (7, ErrorCode.VERSION)
    assert not core.server.connected("disk0")


def test_silence_ends_in_timeout_and_late_answers_are_refused(core: Core) -> None:
    core.server.expect("disk0", ME)
    peer = core.raw_welcomed()
    core.ping(deadline_ms=20)
    request = schema.decode(peer.receive())
    assert request.deadline_ms == 20
    core.until(lambda: core.outcomes)
    assert core.outcomes == [Timeout(20)]
    assert core.server.next_deadline() is None
    peer.send(schema.encode(Message(request.id, 0, Ok())))
    core.until(lambda: core.refused("disk0", "a late or second answer"))
    core.ping()
    second = schema.decode(peer.receive())
    for _ in range(2):
        peer.send(schema.encode(Message(second.id, 0, Ok())))
    core.until(lambda: core.refused("disk0", "a late or second answer") == 2)
    assert core.outcomes == [Timeout(20), Ok()]


def test_an_answer_of_the_wrong_kind_does_not_stop_the_clock(core: Core) -> None:
    core.server.expect("disk0", ME)
    peer = core.raw_welcomed()
    core.server.request("disk0", Ping(), 300, core.outcomes.append)
    request = schema.decode(peer.receive())
    for wrong in (Welcome(1), StatsReport(())):
        peer.send(schema.encode(Message(request.id, 0, wrong)))
    core.until(lambda: core.refused("disk0", "an answer of the wrong kind") == 2)
    core.until(lambda: core.outcomes)
    assert core.outcomes == [Timeout(300)]


def test_nobody_can_answer_for_another(core: Core) -> None:
    core.server.expect("net0", ME)
    net = core.raw_welcomed("net0")
    core.ping("net0")
    asked = schema.decode(net.receive())
    with peer_process(core.path, "blk0", forge=asked.id) as forger:
        core.server.expect("blk0", forger.pid)
        forger.go()
        core.until(lambda: core.refused("blk0", "a late or second answer"))
        assert not core.outcomes
    net.send(schema.encode(Message(asked.id, 0, Ok())))
    core.until(lambda: core.outcomes)


def test_forgetting_fails_what_is_open_and_silences_the_dead(core: Core) -> None:
    core.server.expect("disk0", ME)
    peer = core.raw_welcomed()
    core.ping()
    core.server.forget("disk0")
    assert not core.outcomes  # never from within a call
    core.until(lambda: core.outcomes)
    assert core.outcomes == [Gone()]
    peer.send(schema.encode(Message(0, 0, ConfigChanged(b"x"))))
    core.until(lambda: core.refused("?", "a message of a forgotten sidecar"))
    core.ping()
    core.until(lambda: len(core.outcomes) == 2)
    assert core.outcomes[1] == Gone()
    core.server.expect("disk0", ME)  # its replacement (of the same pid, here)
    replacement = core.raw_welcomed()
    core.ping()
    assert isinstance(schema.decode(replacement.receive()).body, Ping)


def test_a_peer_that_does_not_read_times_out_and_holds_nobody_up(core: Core) -> None:
    core.server.expect("disk0", ME)
    peer = core.raw_welcomed()
    big = schema.ConfigWrite(0, bytes(256))
    for _ in range(5000):
        core.server.request("disk0", big, 50, core.outcomes.append)
    core.until(lambda: len(core.outcomes) == 5000)
    assert set(core.outcomes) == {Timeout(50)}
    assert core.refused("disk0", "to read its messages") > 0
    assert isinstance(schema.decode(peer.receive()).body, schema.ConfigWrite)


def test_a_flood_is_served_in_portions(core: Core) -> None:
    core.server.expect("disk0", ME)
    peer = core.raw_welcomed()
    notice = schema.encode(Message(0, 0, ConfigChanged(b"x")))
    with flood(peer, notice, 500):
        largest = 0
        while len(core.received) < 501:
            assert select.select([core.server], [], [], 20)[0]
            before = len(core.received)
            core.server.process()
            largest = max(largest, len(core.received) - before)
    assert largest <= 64


def test_refusals_are_logged_but_not_flooded(core: Core, caplog: pytest.LogCaptureFixture) -> None:
    core.server.expect("disk0", ME)
    peer = core.raw_welcomed()
    with caplog.at_level(logging.WARNING), flood(peer, b"nonsense", 500):
        core.until(lambda: core.refused("disk0", "a malformed message") == 500)
    assert 1 <= len([r for r in caplog.records if "malformed" in r.getMessage()]) <= 20


def test_the_client_distrusts_the_core_as_well(tmp_path: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.bind(f"ipc://{tmp_path}/core.sock")
    client = ControlClient()
    client.connect(str(tmp_path / "core.sock"), "disk0")
    client.notify(ConfigChanged(b"x"))
    route, _ = router.recv_multipart()
    for frames in (
        [b"garbage"],
        [b"", b""],
        [schema.encode(Message(0, 10, Ping()))],
        [schema.encode(Message(9, 0, Ok()))],
        [schema.encode(Message(9, 10, hello()))],
        [schema.encode(Message(9, 10, Ping()))],
    ):
        router.send_multipart([route, *frames])
    got: list[Message] = []
    while not got:
        assert select.select([client], [], [], 20)[0]
        assert client.process(got.append)
    assert [m.body for m in got] == [Ping()]
    assert client.refusals.counts.total() == 5
    router.close(0)
    while client.process(got.append):
        assert select.select([client], [], [], 20)[0]
    client.close()
    context.destroy(0)


def test_a_hello_that_nobody_answers_times_out(tmp_path: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.bind(f"ipc://{tmp_path}/core.sock")
    client = ControlClient()
    client.connect(str(tmp_path / "core.sock"), "disk0")
    with pytest.raises(TimeoutError, match=r"0\.05"):
        client.hello(hello(), 0.05)
    route, _ = router.recv_multipart()
    router.send_multipart([route, schema.encode(Message(1, 0, Error(ErrorCode.VERSION, "too old")))])
    with pytest.raises(Refused, match="version: too old"):
        client.hello(hello(), 20)
    client.close()
    context.destroy(0)
