"""The core's end of a sidecar: who is killed for what, and that a reset always ends."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from typing import Any, cast

import pytest

from motorcade.core.link import PING_MS, LinkState, SidecarLink
from motorcade.core.loop import Loop
from motorcade.core.virtio import Queue
from motorcade.orchestrator.spawn import is_traced
from motorcade.proto import messages
from motorcade.proto.framing import ControlServer, Gone, OnAnswer, Timeout


class Server:
    """Keeps the requests for the test to answer."""

    def __init__(self) -> None:
        self.asked: list[tuple[messages.Request, OnAnswer]] = []
        self.forgotten: list[str] = []

    def request(self, device_id: str, body: messages.Request, deadline_ms: int, on_answer: OnAnswer) -> None:
        assert device_id == "disk0"
        assert deadline_ms > 0
        self.asked.append((body, on_answer))

    def forget(self, device_id: str) -> None:
        self.forgotten.append(device_id)


class Bench:
    def __init__(self) -> None:
        self.loop, self.server = Loop(), Server()
        self.killed: list[str] = []
        self.spared_if_traced = False
        self.link = SidecarLink(
            "disk0", "blk", 42, self.loop, cast(ControlServer, self.server), self.kill
        )
        self.link.hello()

    def kill(self, device_id: str, reason: str, *, unless_traced: bool = False) -> None:
        assert device_id == "disk0"
        self.killed.append(reason)
        self.spared_if_traced = unless_traced

    def run_until_asked(self, count: int) -> None:
        assert self.loop.run_until(lambda: len(self.server.asked) >= count, 30)


@pytest.fixture
def bench() -> Iterator[Bench]:
    b = Bench()
    yield b
    b.loop.close()


def test_activate_says_what_the_driver_set_up(bench: Bench) -> None:
    bench.link.activate(5, {1: Queue(256, 64, True, 0x1000, 0x2000, 0x3000)}, b"kept")
    bench.run_until_asked(1)
    asked = bench.server.asked[0][0]
    assert isinstance(asked, messages.Activate)
    assert asked.activation  # no other set-up has that number
    queues = (messages.Queue(1, 64, 0x1000, 0x2000, 0x3000),)
    assert asked == messages.Activate(5, queues, config=b"kept", activation=asked.activation)


@pytest.mark.parametrize(
    ("outcome", "word"),
    [
        (Timeout(10_000), "within 10 s"),
        (messages.Error(messages.ErrorCode.STATE, "no such state"), "no such state"),
    ],
)
def test_silence_and_refusal_have_it_killed(bench: Bench, outcome: Any, word: str) -> None:
    bench.link.activate(0, {}, b"")
    bench.run_until_asked(1)
    bench.server.asked[0][1](outcome)
    assert len(bench.killed) == 1
    assert word in bench.killed[0]


def test_a_missed_ping_kills(bench: Bench) -> None:
    bench.link.ping()
    bench.server.asked[0][1](Timeout(30_000))
    assert bench.killed == [f"no sign of life for {PING_MS / 1000:g} s"]
    assert bench.spared_if_traced


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_whom_a_debugger_holds() -> None:
    """The supervisor looks, which has a /proc: such a one is not killed for a missed ping."""
    with subprocess.Popen(
        ["strace", "-o", "/dev/null", "sh", "-c", "echo $$; read line"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as traced:
        assert traced.stdin is not None
        assert traced.stdout is not None
        assert is_traced(int(traced.stdout.readline()))
        traced.stdin.close()
    assert not is_traced(os.getpid())


def test_an_answer_and_a_death_kill_nobody(bench: Bench) -> None:
    for outcome in (messages.Ok(), Gone()):
        bench.link.ping()
        bench.server.asked[-1][1](outcome)
    assert bench.killed == []


def test_reset_on_a_vcpu_waits_for_the_answer(bench: Bench) -> None:
    vcpu = threading.Thread(target=bench.link.reset)
    vcpu.start()
    bench.run_until_asked(1)
    assert vcpu.is_alive()
    bench.server.asked[0][1](messages.Ok())
    vcpu.join(30)
    assert not vcpu.is_alive()


def test_reset_of_a_silent_sidecar_waits_for_its_death(bench: Bench) -> None:
    """A missed deadline alone does not prove that guest memory is safe."""
    vcpu = threading.Thread(target=bench.link.reset)
    vcpu.start()
    bench.run_until_asked(1)
    bench.server.asked[0][1](Timeout(10_000))
    assert bench.killed
    assert vcpu.is_alive()
    bench.link.died("killed by SIGKILL")
    vcpu.join(30)
    assert not vcpu.is_alive()
    assert bench.server.forgotten == ["disk0"]


def test_nothing_is_asked_of_the_dead(bench: Bench) -> None:
    bench.link.died("exited")
    bench.link.reset()
    bench.link.ping()
    bench.link.shutdown()
    got: list[object] = []
    bench.link.stats(got.append)
    assert bench.server.asked == []
    assert got == [None]
    assert bench.link.state is LinkState.GONE
