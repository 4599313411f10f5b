"""What every device of the kit can do: several queues, requests that wait, events of the host, a handler in C."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from harness.sidecar import Sidecar, SidecarGone
from motorcade.proto import messages as m
from motorcade.sidecars import _queue

HERE = Path(__file__).parent
POST, ROLE = "harness.kitdevices:PostDevice", m.KitBoot("post0", "post")


def test_a_request_waits_until_another_queue_wakes_it_and_so_does_every_one_behind_it() -> None:
    with Sidecar(POST, ROLE, {}, queues=2) as sidecar:
        sends, gets = sidecar.start()
        waiting = [gets.submit(into=[16]) for _ in range(3)]
        gets.kick()
        for text in (b"one", b"two2", b"three"):
            sends.run(out=[text[:2], text[2:]])
        gets.wait(3)
        assert [r.data[0][: r.written] for r in waiting] == [b"one", b"two2", b"three"]
        assert sidecar.offered & 1 << 3


def test_a_request_that_is_put_off_comes_again_by_itself() -> None:
    with Sidecar(POST, ROLE, {}, queues=2) as sidecar:
        sends, gets = sidecar.start()
        sends.run(out=[b"later"])
        assert gets.run(into=[16]).written == 5


def test_an_event_of_the_host_wakes_it() -> None:
    bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    with Sidecar(POST, ROLE, {"bell": bell}, queues=2) as sidecar:
        _, gets = sidecar.start()
        waiting = gets.submit(into=[16])
        gets.kick()
        os.eventfd_write(bell, 1)
        gets.wait(1)
        assert waiting.data[0][: waiting.written] == b"ding"
    os.close(bell)


def test_configuration_space_is_announced_when_it_is_another() -> None:
    with Sidecar(POST, ROLE, {}, queues=2) as sidecar:
        sends, _ = sidecar.start()
        assert sidecar.config == b"\0\0\0"
        sends.run(out=[b"x"])
        sidecar.wait_until(lambda: sidecar.config == b"\1\0\0", "the announcement")
        sidecar.ask(m.ConfigWrite(1, b"ab"))
        sidecar.wait_until(lambda: sidecar.config == b"\1ab", "the driver's own bytes")
        assert isinstance(sidecar.request(m.ConfigWrite(2, b"ab")), m.Error)


def test_a_clone_has_what_waited_and_who_waits() -> None:
    with Sidecar(POST, ROLE, {}, queues=2) as sidecar:
        sends, gets = sidecar.start()
        sends.run(out=[b"kept"])
        sends.run(out=[b"too"])
        assert gets.run(into=[16]).written == 4
        sidecar.quiesce()
        state = sidecar.save()
        assert state.data == b"too"
        sidecar.kill()
        with Sidecar(POST, ROLE, {}, queues=2, incoming=True, predecessor=sidecar) as clone:
            clone.restore(state, [sends, gets])
            assert clone.save() == state
            waiting = gets.submit(into=[16])
            gets.kick()  # while it rests
            clone.ask(m.Ping())
            assert not gets.reap()
            clone.resume()
            gets.wait(1)
            assert waiting.data[0][: waiting.written] == b"too"


def test_quiesce_and_resume_again_and_again_under_load_lose_nothing() -> None:
    with Sidecar(POST, ROLE, {}, queues=2) as sidecar:
        sends, gets = sidecar.start()
        for n in range(30):
            waiting = gets.submit(into=[16])
            gets.kick()
            sends.submit(out=[b"%d" % n])
            sends.kick()
            sidecar.quiesce()
            used = sends.used_idx, gets.used_idx
            sidecar.ask(m.Ping())
            assert (sends.used_idx, gets.used_idx) == used
            sidecar.resume()
            gets.wait(1)
            sends.wait(1)
            assert waiting.data[0][: waiting.written] == b"%d" % n


def test_one_queue_that_is_broken_leaves_the_other_alone() -> None:
    with Sidecar(POST, ROLE, {}, queues=2) as sidecar:
        sends, gets = sidecar.start()
        sends.run(out=[b"before"])
        sends.submit(into=[4])  # nothing to be read
        sends.kick()
        assert sidecar.wait_needs_reset().queue == 0
        assert gets.run(into=[16]).written == 6
        assert sidecar.stats().queues[0].errors == 1


def test_a_bug_in_the_device_ends_the_process_and_is_in_its_log() -> None:
    with Sidecar(POST, ROLE, {}, queues=2) as sidecar:
        sends, _ = sidecar.start()
        sends.submit(out=[b"die"])
        sends.kick()
        assert sidecar.wait_exit() == 1
        assert sidecar.stopped is not None and "ZeroDivisionError: a bug" in sidecar.stopped
        assert "handle" in sidecar.log_tail()


def test_a_queue_that_the_driver_never_made_ready_stays_unused() -> None:
    with Sidecar(POST, ROLE, {}, queues=2) as sidecar:
        sends = sidecar.queue(0)
        sidecar.activate([sends])
        sends.run(out=[b"x"])
        sidecar.quiesce()
        assert [q.index for q in sidecar.save().queues] == [0]


def native() -> Sidecar:
    return Sidecar("harness.kitdevices:NativeDevice", m.KitBoot("n0", "native"), {}, queues=1)


def test_a_function_in_c_answers_thousands_of_requests() -> None:
    with native() as sidecar:
        (queue,) = sidecar.start()
        for _ in range(50):
            requests = [queue.submit(out=[b"\1" + bytes([i])], into=[2]) for i in range(32)]
            queue.kick()
            queue.wait(32)
            assert [r.data[0] for r in requests] == [b"\2" + bytes([i + 1]) for i in range(32)]
        (stats,) = sidecar.stats().queues
        assert (stats.requests, stats.bytes_in, stats.bytes_out) == (1600, 3200, 3200)


def test_what_c_wrote_is_in_the_dirty_log() -> None:
    with native() as sidecar:
        (queue,) = sidecar.start()
        request = queue.submit(out=[b"\1" * 8192], into=[8192])
        sidecar.memory.take_dirty()
        queue.kick()
        queue.wait(1)
        first = request.into[0][0] // 4096
        assert {first, first + 1} <= sidecar.memory.take_dirty()


def test_c_may_put_a_request_off_until_it_is_woken() -> None:
    with native() as sidecar:
        (queue,) = sidecar.start()
        sidecar.ask(m.ConfigWrite(0, b"\1"))
        request = queue.submit(out=[b"a"], into=[1])
        queue.kick()
        sidecar.poll_until(lambda: sidecar.stats().queues[0].kicks > 0, "the kick")
        assert not queue.reap()
        sidecar.ask(m.ConfigWrite(0, b"\0"))
        queue.wait(1)
        assert request.data == [b"b"]


@pytest.mark.parametrize("text", [b"\0", b"\xff"])
def test_c_that_refuses_or_says_that_it_wrote_too_much_breaks_the_queue(text: bytes) -> None:
    with native() as sidecar:
        (queue,) = sidecar.start()
        queue.submit(out=[text], into=[4])
        queue.kick()
        assert "lacks a part" in sidecar.wait_needs_reset().reason
        assert sidecar.alive


def test_a_state_of_a_newer_version_is_refused() -> None:
    with Sidecar(POST, ROLE, {}, queues=2, incoming=True) as sidecar:
        outcome = sidecar.request(m.Load(m.DeviceState(9, b"", ())))
        assert isinstance(outcome, m.Error) and "version 9" in outcome.text


def test_more_queues_than_there_can_be() -> None:
    with pytest.raises(SidecarGone, match="Invalid argument"):
        Sidecar("harness.kitdevices:CrowdDevice", ROLE, {}, queues=17)


def test_stub_names_what_the_extension_has() -> None:
    stub = (HERE.parents[1] / "sidecars" / "_queue.pyi").read_text()
    declared = set(re.findall(r"^    (?:def )?((?:mc|MC)_\w+)", stub, re.MULTILINE))
    generic = {name for name in dir(_queue.lib) if name.startswith(("mc_vq", "MC_VQ", "mc_mem", "MC_MAX", "MC_MEM"))}
    assert {name for name in dir(_queue.lib) if name.startswith(("mc_", "MC_"))} - generic <= declared
    assert declared <= set(dir(_queue.lib))


def test_a_ping_is_answered_by_the_data_loop_itself() -> None:
    """A device whose loop hangs answers no ping, though its main thread answers everything else."""
    with Sidecar("harness.kitdevices:StuckDevice", ROLE, {}, queues=2) as sidecar:
        sends, _ = sidecar.start()
        sidecar.ask(m.Ping())
        sends.submit(out=[b"hang"])
        sends.kick()
        sidecar.poll_until(lambda: sidecar.stats().queues[0].kicks == 1, "the kick")
        outcomes: list[object] = []
        sidecar.server.request("post0", m.Ping(), 20_000, outcomes.append)
        for _ in range(20):
            sidecar.stats()
        assert outcomes == []
        sidecar.kill()


def test_requests_go_on_in_a_successor() -> None:
    """What its predecessor had answered is not answered again, and what it had in its hands is."""
    with Sidecar(POST, ROLE, {}, queues=2) as sidecar:
        sends, gets = sidecar.start()
        sends.run(out=[b"one"])
        assert gets.run(into=[16]).written == 3
        waiting = gets.submit(into=[16])
        gets.kick()
        sidecar.stats()
        sidecar.kill()
        last = sends.submit(out=[b"two2"])
        with Sidecar(POST, ROLE, {}, queues=2, predecessor=sidecar, takes_over=True, incoming=True) as successor:
            successor.take_over()
            sends.kick(force=True)
            gets.wait(1)
            assert waiting.data[0][: waiting.written] == b"two2"
            sends.wait(1)
            assert last.done
