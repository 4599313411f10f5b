"""The micro-guest's words that the snapshot benches and tests rest on (tests/guests/serve.c)."""

from __future__ import annotations

import re

import pytest

from harness.microvm import MicroVm, wait_until

START, PAGES, PERCENT = 4 << 20, 4096, 60
RAM = f"ram={START}:{PAGES}:{PERCENT}"
FILLED = PAGES // 256 * (256 * PERCENT // 100)
pytestmark = pytest.mark.kvm


def filled(n: int) -> int:
    """Word 1 of page n as ram= wrote it."""
    return ((n + 1) * 0x9E3779B97F4A7C15 + 0xD1342543DE82EF95) % (1 << 64) if n % 256 < 256 * PERCENT // 100 else 0


def ask(vm: MicroVm, question: bytes) -> None:
    """Types it on the guest's console."""
    vm.peer.send(question)
    vm.uart.poll()


def test_ram_fills_the_stated_share_of_each_mebibyte_and_leaves_the_rest_zero() -> None:
    with MicroVm(f"{RAM} serve=0:0") as vm:
        vm.wait_for(b"ram %x\n" % FILLED)
        full = [any(vm.memory.read(START + n * 4096, 4096)) for n in range(PAGES)]
    assert sum(full) == FILLED
    assert full[: 256 * PERCENT // 100] == [True] * (256 * PERCENT // 100)


def test_a_serving_guest_beats_until_it_is_told_to_be_quiet() -> None:
    with MicroVm(f"{RAM} serve=100000:0") as vm:
        vm.wait_for(b"....")
        ask(vm, b"q0.")
        vm.wait_for(b"so be it\n")
        ask(vm, b"?")
        vm.wait_for(b"pong ")
        assert vm.peer.output.partition(b"so be it\n")[2].startswith(b"pong ")


def test_check_finds_the_one_word_that_was_changed_from_outside() -> None:
    with MicroVm(f"{RAM} serve=0:0") as vm:
        vm.wait_for(b"ram ")
        ask(vm, b"c")
        vm.wait_for(b"bad 0\n")
        vm.memory.view(START + 8 * 4096 + 16, 1)[0] ^= 1
        ask(vm, b"c")
        vm.wait_for(b"bad 1\n")


def test_touches_are_timed_one_by_one_and_writes_leave_a_mark_that_check_forgives() -> None:
    with MicroVm(f"{RAM} serve=0:0") as vm:
        vm.wait_for(b"ram ")
        ask(vm, b"r20.w20.c")
        output = vm.wait_for(b"\nbad 0\n")
        lines = re.findall(rb"touched 14 bad 0((?: [0-9a-f]+)+)\n", output)
        assert [len(line.split()) for line in lines] == [20, 20]
        words = [int.from_bytes(vm.memory.read(START + n * 4096 + 8, 8), "little") for n in range(PAGES)]
    assert sum(word != filled(n) for n, word in enumerate(words)) == 20


def test_dirt_is_written_at_each_beat() -> None:
    with MicroVm(f"{RAM} serve=100000:64") as vm:
        vm.wait_for(b".....")
        ask(vm, b"q0.c")
        output = vm.wait_for(b"bad 0\n")
        beats = output.count(b".")
        hole = START + (256 - 1) * 4096 + 8
        assert any(vm.memory.read(hole, 8)) == (beats * 64 >= 256)


def test_a_dozing_guest_wakes_by_interrupt_for_each_question() -> None:
    with MicroVm(f"{RAM} serve=0:0") as vm:
        vm.wait_for(b"ram ")
        ask(vm, b"z")
        vm.wait_for(b"dozing\n")
        for n in range(1, 4):
            ask(vm, b"?")
            wait_until(lambda: vm.peer.take() is not None and vm.peer.output.count(b"pong ") == n)  # noqa: B023
