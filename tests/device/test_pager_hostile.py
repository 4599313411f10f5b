"""Damaged templates, pagers and processes that die, and processes that lie about themselves."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.pager import Frozen, PagerProcess, working_set
from harness.toucher import Toucher, digest
from motorcade.proto import boot as bootlink
from motorcade.proto import messages as m
from motorcade.proto.memory import PAGE
from motorcade.proto.template import CHUNK

LAYERS = [1, 2, 3, 0, 0, 3, 2, 1] * 24
LAST = {1: 191, 2: 190, 3: 189}  # the last chunk of each layer
NAMES = {
    1: "the template's memory",
    2: "the memory of the template's ancestor 1",
    3: "the memory of the template's ancestor 2",
}


@pytest.fixture
def frozen() -> Iterator[Frozen]:
    with Frozen(LAYERS) as frozen:
        yield frozen


@pytest.fixture
def memory(frozen: Frozen) -> int:
    return frozen.new_memory()


@pytest.fixture
def core(frozen: Frozen, memory: int) -> Iterator[Toucher]:
    with Toucher(memory, frozen.size) as toucher:
        yield toucher


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_a_flipped_bit_is_damage_and_nobody_sees_it(frozen: Frozen, memory: int, core: Toucher, layer: int) -> None:
    frozen.flip(layer, LAST[layer] * CHUNK + CHUNK - 1)
    with PagerProcess(frozen, memory) as pager:
        pager.serve("core", core)
        core.begin("walk", order="random", seed=layer)
        assert f"{NAMES[layer]} at {LAST[layer] * CHUNK:#x} is damaged" in pager.wait_damaged()
        pager.wait_hello()
        assert pager.request(m.Ping()) == m.Ok()  # it waits for its end, and says it once
        assert len(pager.damaged) == 1
        with pytest.raises(TimeoutError):
            core.finish(0.1)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_a_file_that_is_truncated_is_found_before_the_machine_runs(frozen: Frozen, memory: int, layer: int) -> None:
    os.ftruncate(frozen.files[layer - 1], LAST[layer] * CHUNK + CHUNK - 1)
    with PagerProcess(frozen, memory, ready=False) as pager:
        assert pager.wait_exit() == 1
        assert f"{NAMES[layer]} is truncated" in pager.damaged[0]
        assert NAMES[layer] in pager.failed


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_a_file_that_is_truncated_while_the_machine_runs_is_damage(
    frozen: Frozen, memory: int, core: Toucher, layer: int
) -> None:
    with PagerProcess(frozen, memory) as pager:
        pager.serve("core", core)
        os.ftruncate(frozen.files[layer - 1], LAST[layer] * CHUNK + CHUNK // 2)
        core.begin("walk", order="up", seed=0)
        assert f"{NAMES[layer]} at {LAST[layer] * CHUNK:#x} is truncated" in pager.wait_damaged()


def test_damage_in_the_working_set_is_found_before_the_hello(frozen: Frozen, memory: int, core: Toucher) -> None:
    frozen.flip(2, 6 * CHUNK)
    with PagerProcess(frozen, memory, working_set=working_set([0, 1, 6, 7])) as pager:
        pager.serve("core", core)
        pager.wait_damaged()
        assert not pager.hello


def test_damage_is_found_by_populate(frozen: Frozen, memory: int, core: Toucher) -> None:
    frozen.flip(3, LAST[3] * CHUNK)
    with PagerProcess(frozen, memory) as pager:
        pager.wait_hello()
        pager.serve("core", core)
        pager.server.request("pager", m.Populate(), 30000, lambda _: None)
        assert NAMES[3] in pager.wait_damaged()


def test_damage_is_found_by_eager_copying(frozen: Frozen, memory: int) -> None:
    frozen.flip(3, LAST[3] * CHUNK)
    with PagerProcess(frozen, memory, eager=True, ready=False) as pager:
        assert pager.wait_exit() == 1
        assert NAMES[3] in pager.damaged[0]


def test_a_damaged_state_is_damage(frozen: Frozen, memory: int) -> None:
    os.pwrite(frozen.state, b"\xff", 200)
    with PagerProcess(frozen, memory, ready=False) as pager:
        assert pager.wait_exit() == 1
        assert "the template's state" in pager.damaged[0]


def test_a_guest_memory_that_is_too_small_is_refused(frozen: Frozen, memory: int) -> None:
    os.ftruncate(memory, frozen.size - PAGE)
    with PagerProcess(frozen, memory, ready=False) as pager:
        assert pager.wait_exit() == 1
        assert "do not fit" in pager.failed and not pager.damaged


def test_a_pager_that_is_killed_under_load_is_replaced_and_no_fault_waits_for_ever() -> None:
    with Frozen([1, 2, 0, 1] * 512) as frozen:  # 128 MiB
        memory = frozen.new_memory()
        with Toucher(memory, frozen.size) as core, Toucher(memory, frozen.size) as other:
            core.begin("walk", order="random", seed=1)
            other.begin("walk", order="random", seed=2)
            filled = 0
            for _ in range(6):
                with PagerProcess(frozen, memory) as pager:
                    pager.serve("core", core)
                    pager.serve("blk-root", other)
                    pager.wait_hello()
                    filled += pager.stats()["filled"]
                    pager.kill()
            assert filled  # it was busy
            with PagerProcess(frozen, memory) as pager:
                pager.serve("core", core)
                pager.serve("blk-root", other)
                assert core.finish()["sum"] == other.finish()["sum"] == digest(frozen.bytes)


def test_a_replacement_needs_no_connection_to_the_core(frozen: Frozen, memory: int, core: Toucher) -> None:
    with PagerProcess(frozen, memory, control=False) as pager:
        pager.serve("core", core)
        assert core.walk()["sum"] == digest(frozen.bytes)
        pager.process.terminate()
        assert pager.wait_exit() == 0


def test_what_the_guest_wrote_survives_a_pager(frozen: Frozen, memory: int, core: Toucher) -> None:
    with PagerProcess(frozen, memory) as pager:
        pager.serve("core", core)
        core.write(5 * CHUNK + 1, b"new")
        core.write(3 * CHUNK + 1, b"new")
        pager.kill()
    with PagerProcess(frozen, memory) as pager:
        pager.wait_hello()
        pager.serve("core", core)
        assert pager.request(m.Populate()) == m.Ok()
        for chunk in (3, 5):
            frozen.bytes[chunk * CHUNK + 1 : chunk * CHUNK + 4] = b"new"
        assert core.walk()["sum"] == digest(frozen.bytes)


def test_a_process_that_dies_while_its_faults_are_served_is_nobody_elses_trouble(
    frozen: Frozen, memory: int, core: Toucher
) -> None:
    with PagerProcess(frozen, memory) as pager:
        pager.wait_hello()
        for _ in range(4):
            with Toucher(memory, frozen.size) as doomed:
                pager.serve("blk-root", doomed)
                doomed.begin("touch")
                pager.request(m.Ping())
        with Toucher(memory, frozen.size) as alive:
            pager.serve("core", core)
            pager.serve("blk-root", alive)
            core.begin("walk", order="random", seed=1)
            assert alive.walk("down")["sum"] == core.finish()["sum"] == digest(frozen.bytes)
        assert pager.stats()["lost"] == 0


def test_a_hundred_replaced_processes_take_one_place(frozen: Frozen, memory: int, core: Toucher) -> None:
    with PagerProcess(frozen, memory) as pager:
        for _ in range(150):
            pager.serve("blk-root", core)
        assert core.walk()["sum"] == digest(frozen.bytes)
        assert len(list(Path(f"/proc/{pager.process.pid}/fd").iterdir())) < 40


@pytest.mark.parametrize(
    "mappings",
    [
        (),
        (m.Mapping(0x10000, CHUNK + 1, 0),),
        (m.Mapping(0x10000, CHUNK, len(LAYERS) * CHUNK),),
        (m.Mapping(0x10000, CHUNK, (1 << 64) - CHUNK),),
        (m.Mapping((1 << 64) - PAGE, CHUNK, 0),),
        (m.Mapping(0, 0, 0),),
    ],
)
def test_mappings_that_cannot_be_are_refused(
    frozen: Frozen, memory: int, core: Toucher, mappings: tuple[m.Mapping, ...]
) -> None:
    with PagerProcess(frozen, memory) as pager:
        bootlink.send_life(pager.boot_socket, m.Serve("net-lan", mappings), [core.uffd])
        pager.serve("core", core)
        assert core.walk()["sum"] == digest(frozen.bytes)
        assert "net-lan cannot be served" in pager.log()


def test_a_descriptor_that_is_no_userfaultfd_is_refused(frozen: Frozen, memory: int, core: Toucher) -> None:
    ours, theirs = socket.socketpair()
    with PagerProcess(frozen, memory) as pager, ours, theirs:
        for fd in (theirs.fileno(), memory, pager.boot_socket.fileno()):
            bootlink.send_life(pager.boot_socket, m.Serve("net-lan", core.mappings), [fd])
        bootlink.send_life(pager.boot_socket, m.Serve("net-lan", core.mappings))
        bootlink.send_life(pager.boot_socket, m.Ready(), [memory])
        pager.serve("core", core)
        assert core.walk()["sum"] == digest(frozen.bytes)


def test_a_process_that_lies_about_where_its_memory_is_reads_its_own_lies_alone() -> None:
    with Frozen([1] * 24) as frozen:
        memory = frozen.new_memory()
        with (
            Toucher(memory, frozen.size) as core,
            Toucher(memory, frozen.size) as liar,
            PagerProcess(frozen, memory) as pager,
        ):
            [true] = liar.mappings
            half = frozen.size // 2
            # What it calls the lower half is at its upper half: chunks count as filled that are not there.
            lie = (m.Mapping(true.address + half, half, 0),)
            bootlink.send_life(pager.boot_socket, m.Serve("net-lan", lie), [liar.uffd])
            for chunk in range(12, 24):
                liar.read(chunk * CHUNK, 1)
            pager.serve("core", core)
            assert core.digest(0, half) == digest(frozen.bytes[:half])
            pager.wait_hello()
            liar.begin("read", offset=0, size=1)
            core.read(0, 1)
            assert pager.stats()["stray"] == 0  # that page was there
            assert pager.stats()["lost"] == 0
