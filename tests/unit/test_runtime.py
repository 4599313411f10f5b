"""The main that the sidecars share: its story, its answers, and how it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from socket import AF_UNIX, SOCK_SEQPACKET, socketpair

import pytest

from harness.disk import Disk
from harness.driver import Memory, Queue
from harness.sidecar import Sidecar, SidecarGone
from motorcade.proto import messages as m
from motorcade.proto.memory import Region
from motorcade.sidecars import lazymem


def start(behaviour: str = "", *, wait: bool = True, incoming: bool = False, **fds: int) -> Sidecar:
    """A sidecar with harness/fakedevice.py behind it."""
    role = m.BlkBoot(device_id="fake", path=behaviour)
    return Sidecar("harness.fakedevice:FakeDevice", role, fds, queues=2, wait=wait, incoming=incoming)


def queues(sidecar: Sidecar) -> list[Queue]:
    return [sidecar.queue(0), sidecar.queue(1)]


def error(sidecar: Sidecar, request: m.Request) -> m.Error:
    """The refusal of a request."""
    answer = sidecar.request(request)
    assert isinstance(answer, m.Error), answer
    return answer


def test_story() -> None:
    with start() as s:
        assert s.hello == m.Hello(1, "fake", s.pid, 2, 1 << 28, (256, 256), bytes(8))
        s.activate(queues(s), 0)
        s.wait_until(lambda: bool(s.config_changes), "a change that the activation made")
        assert s.config == b"\0\2" + bytes(6)
        s.reset()
        s.activate(queues(s)[:1], 1 << 28 | 1 << 32)
        s.poll_until(lambda: s.stats().queues[0].requests == 2, "run() to be entered again")
        assert s.shutdown() == 0
        assert [line["level"] for line in s.log_lines() if line["level"] in ("warning", "error")] == []
        assert {line["role"] for line in s.log_lines()} == {"fake"}


def test_requests_out_of_order() -> None:
    with start() as s:
        s.ask(m.Reset())
        s.ask(m.Ping())
        s.activate(queues(s), 0)
        assert error(s, m.Activate(0, ())).code is m.ErrorCode.STATE
        s.ask(m.Reset())
        s.ask(m.Reset())
        s.activate([], 0)
        assert s.shutdown() == 0


def test_the_core_cannot_make_it_reach_out_of_bounds() -> None:
    with start() as s:
        assert error(s, m.ConfigWrite(8, b"x")).code is m.ErrorCode.INVALID
        assert error(s, m.ConfigWrite(0xFFFFFFFF, b"x")).code is m.ErrorCode.INVALID
        assert error(s, m.ConfigWrite(0, bytes(9))).code is m.ErrorCode.INVALID
        s.ask(m.ConfigWrite(7, b"x"))
        s.wait_until(lambda: s.config[7:] == b"x", "the change")
        assert error(s, m.Activate(1 << 5, ())).code is m.ErrorCode.INVALID
        assert error(s, m.Activate(0, (m.Queue(2, 16, 0, 0, 0),))).code is m.ErrorCode.INVALID
        assert error(s, m.Activate(0, (m.Queue(0, 512, 0, 0, 0),))).code is m.ErrorCode.INVALID
        s.ask(m.Ping())


def test_reset_waits_for_the_data_thread_and_the_main_thread_does_not() -> None:
    ours, theirs = socketpair()
    with ours, theirs, start("stuck", pipe=theirs.fileno()) as s:
        s.activate(queues(s), 0)
        outcomes: list[object] = []
        s.server.request("fake", m.Reset(), 20_000, outcomes.append)
        s.server.request("fake", m.Reset(), 20_000, outcomes.append)
        for _ in range(3):
            s.ask(m.Ping())
        assert error(s, m.Activate(0, ())).code is m.ErrorCode.STATE
        assert s.stats().queues[0].requests == 1
        assert outcomes == [], "not answered while run() goes on"
        ours.send(b"x")
        s.wait_until(lambda: len(outcomes) == 2, "both answers")
        assert outcomes == [m.Ok(), m.Ok()]
        s.activate(queues(s), 0)


def test_broken_queue_is_said_once_an_activation() -> None:
    with start() as s:
        for _ in range(2):
            s.activate(queues(s), 0)
            s.ask(m.ConfigWrite(0, b"break"))
            s.ask(m.ConfigWrite(0, b"break"))
            s.ask(m.Ping())
            assert s.needs_reset == [m.NeedsReset(1, "the test says so")]
            s.reset()


def test_descriptors_of_the_kind_are_polled() -> None:
    poke = os.eventfd(0)
    with start(poke=poke) as s:
        for n in (1, 2):
            os.eventfd_write(poke, 1)
            s.wait_until(lambda n=n: s.config[0] == n, "the new configuration")  # type: ignore[misc]
    os.close(poke)


def test_always_on_runs_from_the_start_and_through_a_reset() -> None:
    with start("uart") as s:
        assert error(s, m.Activate(0, ())).code is m.ErrorCode.STATE
        s.wait_until(lambda: s.stats().queues[0].requests == 1, "run()")
        s.reset()
        s.ask(m.Ping())
        assert s.stats().queues[0].requests == 1
        assert s.shutdown() == 0


def test_quiesced_nothing_runs_until_resume() -> None:
    with start() as s:
        assert error(s, m.Save()).code is m.ErrorCode.STATE
        s.activate(queues(s), 0)
        s.poll_until(lambda: s.stats().queues[0].requests == 1, "run()")
        for _ in range(2):
            s.quiesce()
        assert s.save() == m.DeviceState(1, b"\0", (m.QueueState(0, 7, 7), m.QueueState(1, 7, 7)))
        s.ask(m.ConfigWrite(4, b"x"))
        assert s.save().data == b"x"
        assert s.stats().queues[0].requests == 1
        for _ in range(2):
            s.resume()
        s.poll_until(lambda: s.stats().queues[0].requests == 2, "run() to be entered again")
        assert error(s, m.Save()).code is m.ErrorCode.STATE
        assert s.shutdown() == 0


def test_reset_activation_and_shutdown_of_a_quiesced_device() -> None:
    with start() as s:
        s.activate(queues(s), 0)
        s.quiesce()
        s.reset()
        assert s.save().queues == ()
        s.activate(queues(s)[:1], 0)
        assert len(s.save().queues) == 1
        assert s.stats().queues[0].requests <= 1
        s.resume()
        s.poll_until(lambda: s.stats().queues[0].requests > 0, "run()")
        s.quiesce()
        assert s.shutdown() == 0


def test_resume_overtakes_a_quiesce_that_waits_for_the_backend() -> None:
    """No device may stay quiesced after a coordinator that gave up."""
    ours, theirs = socketpair()
    with ours, theirs, start("stuck", pipe=theirs.fileno()) as s:
        s.activate(queues(s), 0)
        outcomes: list[object] = []
        for body in (m.Quiesce(), m.Quiesce(), m.Resume()):
            s.server.request("fake", body, 20_000, outcomes.append)
        s.ask(m.Ping())
        assert error(s, m.Save()).code is m.ErrorCode.STATE
        assert outcomes == []
        ours.send(b"x")
        s.wait_until(lambda: len(outcomes) == 3, "three answers")
        assert outcomes == [m.Ok()] * 3
        s.poll_until(lambda: s.stats().queues[0].requests == 2, "run() to be entered again")
        ours.send(b"x")


def test_what_is_asked_while_the_backend_settles_waits_for_it() -> None:
    ours, theirs = socketpair()
    with ours, theirs, start("slow", pipe=theirs.fileno()) as s:
        s.activate(queues(s), 0)
        outcomes: list[object] = []
        for body in (m.Quiesce(), m.Reset(), m.Quiesce()):
            s.server.request("fake", body, 20_000, outcomes.append)
        s.ask(m.Ping())
        assert error(s, m.Activate(0, ())).code is m.ErrorCode.STATE
        assert s.config[1] == 2, "not reset under the data thread's hands"
        ours.send(b"x")
        s.wait_until(lambda: len(outcomes) == 3, "three answers")
        assert outcomes == [m.Ok()] * 3
        assert s.save().queues == ()


def test_a_backend_that_cannot_settle_goes_on() -> None:
    with start("restless") as s:
        s.activate(queues(s), 0)
        answer = error(s, m.Quiesce())
        assert "No space left" in answer.text
        s.poll_until(lambda: s.stats().queues[0].requests == 2, "run() to be entered again")
        assert error(s, m.Save()).code is m.ErrorCode.STATE
        s.ask(m.ConfigWrite(2, b"\1"))
        s.quiesce()


def test_incoming_starts_quiesced_and_goes_on_where_the_saved_one_was() -> None:
    with start(incoming=True) as s:
        q = queues(s)
        state = m.DeviceState(1, b"s", (m.QueueState(0, 65535, 3), m.QueueState(1, 1, 1, 5)))
        s.restore(state, q, 0)
        assert s.save().data == b"s"
        assert error(s, m.Load(state)).code is m.ErrorCode.STATE
        s.ask(m.ConfigWrite(0, b"break"))
        s.ask(m.Ping())
        assert s.needs_reset == [], "queue 1 was broken before the snapshot, and the driver was told then"
        assert s.stats().queues[0].requests == 0
        s.resume()
        s.poll_until(lambda: s.stats().queues[0].requests == 1, "run()")
        assert error(s, m.Load(state)).code is m.ErrorCode.STATE


def test_a_loaded_configuration_is_no_news() -> None:
    with start(incoming=True) as s:
        s.ask(m.Load(m.DeviceState(1, b"s")))
        s.ask(m.Ping())
        assert s.config_changes == []
        s.ask(m.ConfigWrite(5, b"x"))
        s.wait_until(lambda: s.config == b"\0\0\0\0sx\0\0", "the change")


@pytest.mark.parametrize(
    "state",
    [
        m.DeviceState(2, b"x"),
        m.DeviceState(1, b""),
        m.DeviceState(1, bytes(m.MAX_STATE)),
        m.DeviceState(1, b"x", (m.QueueState(2, 0, 0),)),
        m.DeviceState(1, b"x", (m.QueueState(1, 0, 0), m.QueueState(1, 0, 0))),
    ],
    ids=["version", "short", "long", "no such queue", "a queue twice"],
)
def test_a_state_that_cannot_be_is_refused(state: m.DeviceState) -> None:
    with start(incoming=True) as s:
        assert error(s, m.Load(state)).code is m.ErrorCode.INVALID
        s.ask(m.Load(m.DeviceState(1, b"x")))


def test_restored_activations_belong_to_a_quiesced_device() -> None:
    with start() as s:
        assert error(s, m.Activate(0, (), restored=True)).code is m.ErrorCode.STATE
        assert error(s, m.Load(m.DeviceState(1, b"x"))).code is m.ErrorCode.STATE
        for queue in (m.Queue(0, 16, 0, 0, 0, 1), m.Queue(0, 16, 0, 0, 0, 0, 1), m.Queue(0, 16, 0, 0, 0, 0, 0, 1)):
            assert error(s, m.Activate(0, (queue,))).code is m.ErrorCode.INVALID
        s.ask(m.Activate(0, (m.Queue(0, 16, 0, 0, 0),)))


@pytest.mark.parametrize("incoming", [False, True])
def test_always_on_holds_while_it_runs(incoming: bool) -> None:
    with start("uart", incoming=incoming) as s:
        if not incoming:
            s.quiesce()
        s.ask(m.Ping())  # changes are announced after an event
        s.wait_until(lambda: s.config[3] == 1, "the loop to hold")
        s.poll_until(lambda: s.stats().queues[0].requests == 1, "run()")
        s.ask(m.Load(m.DeviceState(1, b"y")))
        assert s.save() == m.DeviceState(1, b"y")
        s.quiesce()
        s.resume()
        s.wait_until(lambda: s.config[3] == 0, "the loop to go on")
        s.quiesce()
        assert s.stats().queues[0].requests == 1
        assert s.shutdown() == 0


@pytest.mark.skipif(bool(lazymem.permitted()), reason="userfaultfd is not permitted here")
def test_memory_that_fills_itself_is_registered_before_anything_touches_it() -> None:
    memory = Memory(regions=[Region(0, 4 << 20, 2 << 20), Region(4 << 30, 2 << 20, 0)])
    role = m.BlkBoot(device_id="fake", path="")
    with Sidecar("harness.fakedevice:FakeDevice", role, {}, queues=2, memory=memory, lazy=True, incoming=True) as s:
        assert [(r.size, r.offset) for r in s.mappings] == [(4 << 20, 2 << 20), (2 << 20, 0)]
        maps = re.findall(
            r"^([0-9a-f]+)-([0-9a-f]+) .*memfd:guest(?:.*\n)+?VmFlags:(.*)$",
            Path(f"/proc/{s.pid}/smaps").read_text(),
            re.MULTILINE,
        )
        for mapping in s.mappings:
            (flags,) = (f for start, end, f in maps if int(start, 16) <= mapping.address < int(end, 16))
            assert "um" in flags.split(), "registered for missing pages"
        assert Path(f"/proc/self/fd/{s.userfaultfd}").readlink() == Path("anon_inode:[userfaultfd]")
        s.ask(m.Ping())
    memory.close()


def test_a_dirty_log_that_does_not_cover_memory_is_refused(tmp_path: Path) -> None:
    memory = Memory()
    os.ftruncate(memory.dirty_fd, 504)
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    with Disk(image, memory=memory, wait=False) as s:
        with pytest.raises(SidecarGone):
            s.wait_until(lambda: s.hello is not None, "a hello that never comes")
        assert s.stopped == "ValueError: a dirty log of 504 bytes is too short for 4096 pages"
    memory.close()


def test_a_backend_that_does_not_start() -> None:
    with start("refuse", wait=False) as s:
        with pytest.raises(SidecarGone):
            s.wait_until(lambda: s.hello is not None, "a hello that never comes")
        assert s.exit_status == 1
        assert s.stopped == "ValueError: this backend is out of order"
        assert any("Traceback" in line.get("traceback", "") for line in s.log_lines())


@pytest.mark.parametrize(
    ("behaviour", "words"), [("crash", "the backend caught fire"), ("return", "though nobody asked it to")]
)
def test_a_data_thread_that_fails(behaviour: str, words: str) -> None:
    with start(behaviour) as s:
        with pytest.raises((SidecarGone, AssertionError)):
            s.activate(queues(s), 0)
            s.wait_until(lambda: False, "its end")
        assert s.exit_status == 1
        assert s.stopped is not None
        assert words in s.stopped
        assert words in s.log_tail()


def test_a_backend_that_does_not_close() -> None:
    with start("close-fails") as s:
        answer = error(s, m.Shutdown())
        assert "No space left" in answer.text
        assert s.wait_exit() == 1


@pytest.mark.parametrize("end", ["supervisor", "core", "SIGTERM"])
@pytest.mark.parametrize("state", ["idle", "active", "quiesced"])
def test_orderly_ends_that_the_core_did_not_ask_for(end: str, state: str) -> None:
    ours, theirs = socketpair()
    with ExitStack() as stack, ours, theirs, start(pipe=theirs.fileno()) as s:
        if state != "idle":
            s.activate(queues(s), 0)
        if state == "quiesced":
            s.quiesce()
        os.kill(s.pid, signal.SIGINT)  # the terminal's Ctrl-C is nothing to a sidecar
        s.ask(m.Ping())
        theirs.close()
        if end == "supervisor":
            s.boot_socket.close()
            s.boot_socket, keep = socketpair(AF_UNIX, SOCK_SEQPACKET)
            stack.callback(keep.close)
        elif end == "core":
            s.server.close()
            s.server = type(s.server)(lambda *_: None)
        else:
            os.kill(s.pid, signal.SIGTERM)
        ours.settimeout(20)
        assert s.wait_exit() == 0
        assert ours.recv(100) == b"closed", "the backend was flushed, once"


def test_privileges_are_gone() -> None:
    with start() as s:
        status = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{s.pid}/status").read_text().splitlines() if ":\t" in line
        )
        assert status["NoNewPrivs"] == "1"
        for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            assert int(status[name], 16) == 0, name
        if os.geteuid() == 0:
            assert int(status["CapBnd"], 16) == 0
        for thread in Path(f"/proc/{s.pid}/task").iterdir():
            assert "NoNewPrivs:\t1" in (thread / "status").read_text(), "ZeroMQ's threads too"
        limits = Path(f"/proc/{s.pid}/limits").read_text()
        assert re.search(r"Max core file size +0 +0 ", limits)


def test_usage() -> None:
    for arguments in ([], ["--boot-fd", "x"], ["--boot-fd", "0"], ["--boot-fd", "999"]):
        done = subprocess.run(
            [sys.executable, "-m", "motorcade.sidecars.blk", *arguments],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        )
        assert done.returncode == 2, arguments
        assert "Traceback" not in done.stderr
        assert "--boot-fd" in done.stderr
