"""Snapshot, restore paused, snapshot again: equal templates, byte for byte. Real machines with every kind of device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import wholevm
from harness.vm import VmHost, vm_host

pytestmark = pytest.mark.kvm

BUSY = f"ram={wholevm.RAM}:{wholevm.PAGES}:60 serve=20000:64"  # 64 pages every few microseconds, round and round


@pytest.fixture
def host(tmp_path: Path) -> Iterator[VmHost]:
    """Where the VMs of the test live."""
    with vm_host(tmp_path) as h:
        yield h


@pytest.mark.parametrize("live", [False, True])
def test_a_machine_in_the_middle_of_everything(host: VmHost, guest: Path, tmp_path: Path, live: bool) -> None:
    machine = wholevm.machine(tmp_path, guest)
    vm = host.start(machine)
    wholevm.busy(vm)
    first, second, child, third = (tmp_path / name for name in ("first", "second", "child", "third"))
    info = vm.snapshot(first, live=live)
    assert info["status"] == "completed", info
    wholevm.finish(vm)
    vm.close()
    clone = host.start(machine, template=first, paused=True)
    for target, base in ((second, {}), (child, {"base": str(first)})):
        info = clone.snapshot(target, **base)
        assert info["status"] == "completed", info
    wholevm.same(first, second)
    assert (child / "memory").stat().st_blocks == 0  # nothing has changed
    with clone.qmp() as qmp:
        qmp.execute("cont")
    wholevm.finish(clone)
    clone.close()
    grandchild = host.start(machine, template=child, paused=True)
    assert grandchild.snapshot(third)["status"] == "completed"
    wholevm.same(first, third)
    with grandchild.qmp() as qmp:
        qmp.execute("cont")
    wholevm.finish(grandchild)


@pytest.mark.parametrize("live", [False, True])
def test_a_difference_is_worth_the_whole(host: VmHost, guest: Path, tmp_path: Path, live: bool) -> None:
    """What is restored from a template and its base, and what is restored from all of that in one, are the same."""
    fields = {"name": "web", "memory": "32M", "kernel": {"image": str(guest), "cmdline": BUSY}}
    vm = host.start(fields)
    with vm.attach() as uart:
        wholevm.hear(uart, b"." * 100)
        assert vm.snapshot(tmp_path / "base", live=live)["status"] == "completed"
        wholevm.hear(uart, b"." * 20)
        info = vm.snapshot(tmp_path / "child", live=live, base=str(tmp_path / "base"))
        assert info["status"] == "completed", info
    vm.close()
    for of, target in (("child", "whole"), ("whole", "again")):
        clone = host.start(fields, template=tmp_path / of, paused=True)
        for name, options in ((target, {}), (f"{target}-child", {"base": str(tmp_path / "base")})):
            info = clone.snapshot(tmp_path / name, **options)
            assert info["status"] == "completed", info
        clone.close()
    wholevm.same(tmp_path / "whole", tmp_path / "again")
    wholevm.same(tmp_path / "child", tmp_path / "whole-child")
    wholevm.same(tmp_path / "child", tmp_path / "again-child")
    last = host.start(fields, template=tmp_path / "again-child")
    with last.attach() as uart:
        uart.sendall(b"q0.")
        wholevm.hear(uart, b"so be it")
        uart.sendall(b"c")
        wholevm.hear(uart, b"bad 0")
