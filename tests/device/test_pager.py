"""The pager process and processes that miss pages: what they read, and what it does without being asked."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from harness.pager import Frozen, PagerProcess, working_set
from harness.toucher import Toucher, digest
from motorcade.proto import messages as m
from motorcade.proto.memory import PAGE
from motorcade.proto.template import CHUNK

BLOCK = 32  # chunks of a huge page
MIXED = [1, 0, 1, 1, 0, 0, 1, 1] * 16 + [0] * 2 * BLOCK + [1] * 37 + [0]
FILLED = sum(layer != 0 for layer in MIXED)


@pytest.fixture
def frozen() -> Iterator[Frozen]:
    """A template with zeros between its chunks, and two whole huge pages of them."""
    with Frozen(MIXED) as frozen:
        yield frozen


@pytest.fixture
def memory(frozen: Frozen) -> int:
    """The guest memory of a machine that is made from it."""
    return frozen.new_memory()


@pytest.fixture
def core(frozen: Frozen, memory: int) -> Iterator[Toucher]:
    with Toucher(memory, frozen.size) as toucher:
        yield toucher


def test_two_processes_that_fault_over_all_of_memory_read_what_was_saved(
    frozen: Frozen, memory: int, core: Toucher
) -> None:
    with Toucher(memory, frozen.size) as other, PagerProcess(frozen, memory) as pager:
        pager.serve("core", core)
        pager.serve("blk-root", other)
        core.begin("walk", order="random", seed=1)
        other.begin("walk", order="random", seed=2)
        assert core.finish()["sum"] == other.finish()["sum"] == digest(frozen.bytes)
        pager.wait_hello()
        stats = pager.stats()
        assert stats["filled"] == FILLED
        assert stats["left"] == stats["stray"] == stats["lost"] == 0
        assert 0 < stats["fault-p50-ns"] <= stats["fault-p99-ns"]


def test_whole_huge_pages_of_zeros_are_left_to_the_kernel(frozen: Frozen, memory: int, core: Toucher) -> None:
    with PagerProcess(frozen, memory) as pager:
        pager.serve("core", core)
        assert core.read(0, 8) == frozen.bytes[:8]  # it is served now
        pager.wait_hello()
        before = pager.stats()["faults"]
        start = 128 * CHUNK
        assert core.digest(start, 2 * BLOCK * CHUNK) == digest(bytes(2 * BLOCK * CHUNK))
        assert pager.stats()["faults"] == before
        assert core.read(4 * CHUNK, PAGE) == bytes(PAGE)  # and less than that is not
        assert pager.stats()["zeroed"] == 1


def test_a_fault_in_the_kernel_is_answered_as_any(frozen: Frozen, memory: int, core: Toucher) -> None:
    with PagerProcess(frozen, memory) as pager:
        pager.serve("core", core)
        assert core.ask("kernel-read", offset=2 * CHUNK + 5, data=(b"read into it" * 50).hex()) == 600
        assert core.read(2 * CHUNK, 700) == frozen.bytes[2 * CHUNK : 2 * CHUNK + 5] + b"read into it" * 50 + bytes(
            frozen.bytes[2 * CHUNK + 605 : 2 * CHUNK + 700]
        )


def test_every_chunk_comes_from_its_own_ancestor() -> None:
    layers = [1, 2, 3, 0, 4, 4, 3, 1, 1, 2] * 12
    with Frozen(layers) as frozen:
        memory = frozen.new_memory()
        with Toucher(memory, frozen.size) as core, PagerProcess(frozen, memory) as pager:
            pager.serve("core", core)
            assert core.walk("down")["sum"] == digest(frozen.bytes)


def test_a_machine_whose_last_chunk_is_short_is_filled_to_its_end() -> None:
    with Frozen([1, 0, 1], size=2 * CHUNK + 3 * PAGE) as frozen:
        memory = frozen.new_memory()
        with Toucher(memory, frozen.size) as core, PagerProcess(frozen, memory) as pager:
            pager.serve("core", core)
            assert core.walk("down")["sum"] == digest(frozen.bytes)
            assert pager.stats()["left"] == 0


def test_what_was_written_stays_written(frozen: Frozen, memory: int, core: Toucher) -> None:
    with Toucher(memory, frozen.size) as other, PagerProcess(frozen, memory) as pager:
        pager.serve("core", core)
        core.write(3 * CHUNK + 77, b"the guest was here")
        pager.serve("blk-root", other)
        assert pager.request(m.Populate()) == m.Ok()
        frozen.bytes[3 * CHUNK + 77 : 3 * CHUNK + 95] = b"the guest was here"
        assert other.walk()["sum"] == core.walk()["sum"] == digest(frozen.bytes)


def test_the_working_set_of_the_first_seconds_is_recorded_and_spares_the_next_machine_its_faults(
    frozen: Frozen, memory: int, core: Toucher
) -> None:
    asked_for = [7, 3, 2, 160, 192, 193, 194, 195, 196, 197, 198, 199, 200, 201, 202, 4]
    with PagerProcess(frozen, memory) as pager:
        pager.serve("core", core)
        pager.wait_hello()
        for chunk in [*asked_for, 7, 3]:
            core.read(chunk * CHUNK + 3 * PAGE, 1)
        pager.wait_until(lambda: bool(pager.working_sets), "the working set")
        core.read(127 * CHUNK, 1)  # too late
        [recorded] = pager.working_sets
    chunks = [int.from_bytes(recorded[i : i + 4], "little") for i in range(0, len(recorded), 4)]
    assert chunks == [chunk for chunk in asked_for if chunk != 160]  # that is the kernel's

    memory = frozen.new_memory()
    with Toucher(memory, frozen.size) as core, PagerProcess(frozen, memory, working_set=working_set(chunks)) as pager:
        assert not pager.hello  # the guest is not to run before it is there
        pager.serve("core", core)
        pager.wait_hello()
        assert pager.stats()["ahead-chunks"] == len(chunks)
        for chunk in asked_for:
            assert core.read(chunk * CHUNK, CHUNK) == frozen.bytes[chunk * CHUNK : (chunk + 1) * CHUNK]
        assert pager.stats()["faults"] == 0
        assert core.walk()["sum"] == digest(frozen.bytes)
        assert not pager.working_sets


@pytest.mark.parametrize("wrong", ["empty", "short", "magic", "checksum", "outside", "count"])
def test_a_working_set_that_is_none_is_left_out_with_a_line_in_the_log(
    frozen: Frozen, memory: int, core: Toucher, wrong: str
) -> None:
    data = working_set([1, 2, 3])
    data = {
        "empty": b"",
        "short": data[:-1],
        "magic": b"\0" + data[1:],
        "checksum": data[:-1] + b"\1",
        "outside": working_set([1, len(MIXED)]),
        "count": data + bytes(4),
    }[wrong]
    with PagerProcess(frozen, memory, working_set=data) as pager:
        pager.wait_hello()
        assert "the working set is left out" in pager.log()
        pager.serve("core", core)
        assert core.walk()["sum"] == digest(frozen.bytes)


def test_populate_fills_all_and_no_process_needs_the_pager_afterwards(
    frozen: Frozen, memory: int, core: Toucher
) -> None:
    with Toucher(memory, frozen.size) as other, PagerProcess(frozen, memory) as pager:
        pager.wait_hello()
        pager.serve("core", core)
        pager.serve("blk-root", other)
        other.begin("walk", order="random", seed=3)
        assert pager.request(m.Populate()) == m.Ok()
        assert other.finish()["sum"] == digest(frozen.bytes)
        assert pager.request(m.Populate()) == m.Ok()
        stats = pager.stats()
        assert stats["left"] == 0 and stats["filled"] == FILLED
        pager.kill()
        assert core.walk()["sum"] == digest(frozen.bytes)


def test_populate_leaves_zeros_as_holes(frozen: Frozen, memory: int, core: Toucher) -> None:
    with PagerProcess(frozen, memory) as pager:
        pager.wait_hello()
        pager.serve("core", core)
        assert pager.request(m.Populate()) == m.Ok()
    assert os.fstat(memory).st_blocks * 512 == FILLED * CHUNK


def test_a_process_that_comes_when_all_is_there_needs_nothing(frozen: Frozen, memory: int, core: Toucher) -> None:
    with PagerProcess(frozen, memory) as pager:
        pager.wait_hello()
        pager.serve("core", core)
        assert pager.request(m.Populate()) == m.Ok()
        with Toucher(memory, frozen.size) as late:
            pager.serve("net-lan", late)
            assert late.walk()["sum"] == digest(frozen.bytes)
            assert pager.stats()["zeroed"] == 0


def test_without_userfaultfd_everything_is_there_before_it_is_ready(frozen: Frozen, memory: int) -> None:
    with PagerProcess(frozen, memory, eager=True) as pager:
        assert os.pread(memory, frozen.size, 0) == frozen.bytes
        assert os.fstat(memory).st_blocks * 512 == FILLED * CHUNK
        pager.wait_hello()
        assert pager.request(m.Populate()) == m.Ok()


def test_eager_copying_goes_on_where_a_predecessor_died_and_leaves_what_has_changed_since(
    frozen: Frozen, memory: int
) -> None:
    changed = b"a guest's" + bytes(PAGE - 9)
    os.pwrite(memory, changed, 2 * CHUNK + PAGE)
    with PagerProcess(frozen, memory, eager=True):
        frozen.bytes[2 * CHUNK + PAGE : 2 * CHUNK + 2 * PAGE] = changed
        assert os.pread(memory, frozen.size, 0) == frozen.bytes


def test_the_core_finds_in_it_a_sidecar_that_rests_when_asked(frozen: Frozen, memory: int) -> None:
    with PagerProcess(frozen, memory) as pager:
        pager.wait_hello()
        for request in (m.Ping(), m.Quiesce(), m.Quiesce(), m.Resume()):
            assert pager.request(request) == m.Ok()
        for foreign in (m.Save(), m.Activate(0, ())):
            answer = pager.request(foreign)
            assert isinstance(answer, m.Error) and answer.code is m.ErrorCode.UNKNOWN


@pytest.mark.parametrize("end", ["shutdown", "gone"])
def test_faults_are_answered_after_the_cores_end_since_others_may_flush(
    frozen: Frozen, memory: int, core: Toucher, end: str
) -> None:
    with PagerProcess(frozen, memory) as pager:
        pager.serve("blk-root", core)
        pager.wait_hello()
        if end == "shutdown":
            assert pager.request(m.Shutdown()) == m.Ok()
        else:
            pager.leave()
        assert core.walk()["sum"] == digest(frozen.bytes)
        pager.process.terminate()
        assert pager.process.wait(30) == 0


@pytest.mark.parametrize("end", ["term", "supervisor"])
def test_it_ends_in_good_order(frozen: Frozen, memory: int, end: str) -> None:
    with PagerProcess(frozen, memory) as pager:
        pager.wait_hello()
        if end == "term":
            pager.process.send_signal(signal.SIGTERM)
        else:
            pager.boot_socket.shutdown(2)
        assert pager.process.wait(30) == 0
        assert "ending: " in pager.log()


@pytest.mark.parametrize("end", ["shutdown", "gone"])
def test_an_eager_one_has_no_more_to_do_than_the_core(frozen: Frozen, memory: int, end: str) -> None:
    with PagerProcess(frozen, memory, eager=True) as pager:
        pager.wait_hello()
        if end == "shutdown":
            assert pager.request(m.Shutdown()) == m.Ok()
        else:
            pager.leave()
        assert pager.process.wait(30) == 0
