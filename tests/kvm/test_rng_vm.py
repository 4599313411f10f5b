"""virtio-rng in whole machines: named in machine.yaml, seen by a guest on /dev/kvm, frozen and cloned."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import wholevm
from harness.guestdriver import GuestDriver, Script
from harness.vm import Vm, VmHost, vm_host
from motorcade.orchestrator import config

pytestmark = pytest.mark.kvm

SLOT = 40
ROOM = 16  # bytes that the guest asks for


@pytest.fixture
def host(tmp_path: Path) -> Iterator[VmHost]:
    """Where the VMs of the test live."""
    with vm_host(tmp_path) as h:
        yield h


def machine(folder: Path, guest: Path, **options: Any) -> dict[str, Any]:
    """A guest that fills a buffer, prints it, waits for a byte, and does so again."""
    s = Script()
    rng = GuestDriver(s, SLOT)
    rng.start()
    rng.descriptor(0, rng.data, ROOM, 2, 0)
    rng.offer()
    s.words += [
        f"slot={SLOT}",
        "isr",
        *(f"load={rng.data + 4 * n}" for n in range(ROOM // 4)),
        "print=first",
        "echo=1",
        "print=",
    ]
    rng.descriptor(1, rng.data + ROOM, ROOM, 2, 0)
    wholevm.again(rng, 1)
    s.words += [*(f"load={rng.data + ROOM + 4 * n}" for n in range(ROOM // 4)), "print=second", "serve=0:0"]
    return {
        "name": "dice",
        "memory": "32M",
        "kernel": {"image": str(guest), "cmdline": "initrd", "initrd": str(s.write(folder))},
        "devices": [{"id": "rng0", "kind": "rng", **options}],
    }


def words(said: bytes) -> list[bytes]:
    """The random words that the guest printed."""
    lines = said.replace(b"\r", b"").splitlines()
    start = lines.index(b"isr 1 then 0") + 1
    return lines[start : start + ROOM // 4]


def second(vm: Vm) -> list[bytes]:
    """What the guest gets when it goes on."""
    with vm.attach() as uart:
        uart.sendall(b"x")
        return words(wholevm.hear(uart, b"second").partition(b"first")[2])


def test_a_guest_gets_entropy_and_so_does_each_of_its_clones_of_its_own(
    host: VmHost, guest: Path, tmp_path: Path
) -> None:
    fields = machine(tmp_path, guest)
    vm = host.start(fields)
    with vm.attach() as uart:
        got = [words(wholevm.hear(uart, b"first"))]
    template, again = tmp_path / "template", tmp_path / "again"
    info = vm.snapshot(template)
    assert info["status"] == "completed", info
    with vm.qmp() as qmp:
        [listed] = [s for s in qmp.execute("x-motorcade-sidecars") if s["id"] == "rng0"]
        assert (listed["kind"], listed["slot"]) == ("rng", SLOT)
        assert qmp.execute("x-motorcade-sidecar-stats", {"id": "rng0"})["queues"][0]["bytes-out"] == ROOM
    got.append(second(vm))
    vm.close()
    clone = host.start(fields, template=template, paused=True)
    assert clone.snapshot(again)["status"] == "completed"
    wholevm.same(template, again)
    with clone.qmp() as qmp:
        qmp.execute("cont")
    got.append(second(clone))
    clone.close()
    got.append(second(host.start(fields, template=template)))
    assert all(len(w) == ROOM // 4 for w in got)
    assert len({tuple(w) for w in got}) == len(got)


def test_a_request_that_waits_for_its_rate_is_answered_in_the_clone(host: VmHost, guest: Path, tmp_path: Path) -> None:
    fields = machine(tmp_path, guest, rate=ROOM)
    vm = host.start(fields)
    with vm.attach() as uart:
        wholevm.hear(uart, b"first")
        uart.sendall(b"x")  # the bucket is empty: this one waits
    assert vm.snapshot(tmp_path / "template")["status"] == "completed"
    vm.close()
    clone = host.start(fields, template=tmp_path / "template")
    with clone.attach() as uart:
        assert len(words(wholevm.hear(uart, b"second").partition(b"first")[2])) == ROOM // 4


def test_a_template_goes_on_with_its_own_devices_only(host: VmHost, guest: Path, tmp_path: Path) -> None:
    fields = machine(tmp_path, guest)
    assert host.start(fields).snapshot(tmp_path / "template")["status"] == "completed"
    for devices in ([], [{"id": "other", "kind": "rng"}]):
        with pytest.raises(config.ConfigError, match=r"the template .* has devices rng0"):
            host.start(fields | {"name": "else", "devices": devices}, template=tmp_path / "template")
