"""The balloon in whole machines: driven by guest code on /dev/kvm, over QMP, frozen, and in lazy clones."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from harness import wholevm
from harness.guestdriver import GuestDriver, Script
from harness.vm import Vm, VmHost, vm_host
from harness.vmmctl import Host
from motorcade.core.virtio_mmio import CONFIG
from motorcade.orchestrator.qmpclient import QmpClient, QmpError

pytestmark = pytest.mark.kvm

SLOT = 40
PAGE = 4096
SIZE = 32 << 20
DATA = 20 << 20  # where the guest keeps something in each of PAGES pages; a chunk of the pager's is 16 of them
PAGES = 48
MARK = 0xBA110000
GIVEN = [*range(4, 12), *range(20, 24)]  # of a chunk that the clone has filled, and of one that it has not


@pytest.fixture
def host(tmp_path: Path) -> Iterator[VmHost]:
    """Where the VMs of the test live."""
    with vm_host(tmp_path) as h:
        yield h


def address(page: int) -> int:
    return DATA + page * PAGE


def machine(folder: Path, guest: Path, **balloon: Any) -> dict[str, Any]:
    """A guest that fills its pages, and then, one step for each byte that it gets: gives GIVEN away; looks at its
    pages, three times."""
    s = Script()
    driver = GuestDriver(s, SLOT)
    for page in range(PAGES):
        s.store(address(page), MARK + page)
    s.words += ["print=filled", "echo=1", "print=", f"load={address(5)}"]
    driver.start()
    s.store(driver.data, *((DATA // PAGE) + page for page in GIVEN))
    driver.descriptor(0, driver.data, 4 * len(GIVEN), 0, 0)
    driver.offer()
    s.words += [f"slot={SLOT}", "isr"]
    driver.poke(CONFIG + 4, len(GIVEN))  # actual
    s.words += [f"peek={CONFIG + 4}", "print=given"]
    for n in range(3):
        s.words += ["echo=1", "print="]
        s.words += [f"load={address(page)}" for page in range(PAGES)]
        s.words += [f"print=looked-{n}"]
    s.words += ["serve=0:0"]
    return {
        "name": "balloon",
        "memory": "32M",
        "kernel": {"image": str(guest), "cmdline": "initrd", "initrd": str(s.write(folder))},
        "balloon": balloon or True,
    }


def lines(said: bytes) -> list[str]:
    return said.decode().split()


def give(uart: socket.socket) -> list[str]:
    uart.sendall(b"x")
    return lines(wholevm.hear(uart, b"given"))


def look(uart: socket.socket, n: int) -> list[int]:
    """What is in the pages."""
    uart.sendall(b"x")
    said = lines(wholevm.hear(uart, b"looked-%d" % n))
    at = said.index(f"looked-{n}")
    return [int(word, 16) for word in said[at - PAGES : at]]


EXPECTED = [0 if page in GIVEN else MARK + page for page in range(PAGES)]


def holes(vm: Vm, pages: Sequence[int]) -> list[int]:
    """Those of the guest's pages that take nothing of the host's memory."""
    link = next(x for x in Path(f"/proc/{vm.pid}/fd").iterdir() if "guest-memory" in str(x.readlink()))
    fd = os.open(link, os.O_RDONLY)
    try:
        return [page for page in pages if os.lseek(fd, address(page), os.SEEK_DATA) != address(page)]
    finally:
        os.close(fd)


def actual(qmp: QmpClient) -> int:
    return int(qmp.execute("query-balloon")["actual"])


def frozen(template: Path) -> list[int]:
    """The first word of each page, in a template's memory file (of its own layer)."""
    with (template / "memory").open("rb") as f:
        return [int.from_bytes(os.pread(f.fileno(), 4, address(page)), "little") for page in range(PAGES)]


def test_pages_go_and_come_back_as_zeros_and_snapshots_know_it(host: VmHost, guest: Path, tmp_path: Path) -> None:
    fields = machine(tmp_path, guest)
    vm = host.start(fields)
    with vm.attach() as uart, vm.qmp() as qmp:
        wholevm.hear(uart, b"filled")
        assert actual(qmp) == SIZE
        assert give(uart)[-2:] == [f"{len(GIVEN):x}", "given"]
        assert actual(qmp) == SIZE - len(GIVEN) * PAGE
        assert holes(vm, range(PAGES)) == GIVEN
        # A change of the target reaches the guest, and a snapshot.
        qmp.execute("balloon", {"value": SIZE // 2})
        stopped, live = tmp_path / "stopped", tmp_path / "live"
        assert vm.snapshot(stopped)["status"] == "completed"
        assert vm.snapshot(live, live=True)["status"] == "completed"
        assert frozen(stopped) == frozen(live) == EXPECTED
        assert holes(vm, range(PAGES)) == GIVEN
        assert look(uart, 0) == EXPECTED
        if not (changes := [e for e in qmp.events if e["event"] == "BALLOON_CHANGED"]):
            qmp.execute("query-status")
            changes = [e for e in qmp.events if e["event"] == "BALLOON_CHANGED"]
        assert [e["data"] for e in changes] == [{"actual": SIZE - len(GIVEN) * PAGE}]
    vm.close()
    for template in (stopped, live):
        clone = host.start(fields, template=template, paused=True)
        again = tmp_path / f"{template.name}-again"
        assert clone.snapshot(again)["status"] == "completed"
        wholevm.same(template, again)
        with clone.attach() as uart, clone.qmp() as qmp:
            # It starts with its template's balloon.
            said = qmp.execute("x-motorcade-balloon-stats")
            assert said == {
                "size": SIZE,
                "target": SIZE // 2,
                "actual": SIZE - len(GIVEN) * PAGE,
                "driver": True,
                "stats": {},
                "last-update": 0,
            }
            qmp.execute("cont")
            assert look(uart, 0) == EXPECTED
        clone.close()


@pytest.mark.parametrize("after", ["look", "snapshot", "pager", "live"])
def test_a_page_of_a_lazy_clone_that_was_given_away_is_not_the_templates_any_more(
    host: VmHost, guest: Path, tmp_path: Path, after: str
) -> None:
    fields = machine(tmp_path, guest)
    vm = host.start(fields)
    with vm.attach() as uart:
        wholevm.hear(uart, b"filled")
    template = tmp_path / "template"
    assert vm.snapshot(template)["status"] == "completed"
    vm.close()
    clone = host.start(fields, template=template)
    with clone.attach() as uart, clone.qmp() as qmp:
        wholevm.hear(uart, b"filled")
        assert f"{MARK + 5:x}" in give(uart)  # its first chunk was filled before
        assert holes(clone, GIVEN) == GIVEN
        if after == "pager":
            # Another pager knows what the last one knew.
            os.kill(next(int(p["pid"]) for p in clone.started["processes"] if p["role"] == "pager"), 9)
            assert look(uart, 0) == EXPECTED
        elif after != "look":
            # All of the template is fetched for it, but nothing that was given away.
            assert clone.snapshot(tmp_path / "second", live=after == "live")["status"] == "completed"
            assert holes(clone, GIVEN) == GIVEN
            assert frozen(tmp_path / "second") == EXPECTED
            stats = qmp.execute("x-motorcade-sidecar-stats", {"id": "pager"})["detail"]
            assert stats["left"] == 0 and stats["removals"] > 0
        assert look(uart, 0 if after != "pager" else 1) == EXPECTED
        assert look(uart, 1 if after != "pager" else 2) == EXPECTED
    clone.close()
    if after == "snapshot":
        with host.start(fields, template=tmp_path / "second").attach() as uart:
            assert look(uart, 0) == EXPECTED


def test_a_difference_from_a_template_has_the_holes(host: VmHost, guest: Path, tmp_path: Path) -> None:
    fields = machine(tmp_path, guest)
    vm = host.start(fields)
    with vm.attach() as uart:
        wholevm.hear(uart, b"filled")
        assert vm.snapshot(tmp_path / "base")["status"] == "completed"
        give(uart)
        assert vm.snapshot(tmp_path / "diff", base=str(tmp_path / "base"))["status"] == "completed"
    vm.close()
    with host.start(fields, template=tmp_path / "diff").attach() as uart:
        assert look(uart, 0) == EXPECTED


def test_memory_in_a_file_of_its_own_gets_holes_too(host: VmHost, guest: Path, tmp_path: Path) -> None:
    file = Path("/dev/shm") / f"mc-balloon-{os.getpid()}"
    try:
        vm = host.start(machine(tmp_path, guest) | {"memory_file": str(file)})
        with vm.attach() as uart:
            wholevm.hear(uart, b"filled")
            before = file.stat().st_blocks
            give(uart)
            assert before - file.stat().st_blocks >= (len(GIVEN) - 4) * PAGE // 512
            assert look(uart, 0) == EXPECTED
        vm.close()
    finally:
        file.unlink(missing_ok=True)


def test_a_reset_gives_all_back_and_keeps_the_target(host: VmHost, guest: Path, tmp_path: Path) -> None:
    vm = host.start(machine(tmp_path, guest))
    with vm.attach() as uart, vm.qmp() as qmp:
        wholevm.hear(uart, b"filled")
        qmp.execute("balloon", {"value": SIZE - 4 * PAGE})
        give(uart)
        assert actual(qmp) == SIZE - len(GIVEN) * PAGE
        qmp.execute("system_reset")
        wholevm.hear(uart, b"filled")
        said = qmp.execute("x-motorcade-balloon-stats")
        assert (said["actual"], said["target"], said["driver"]) == (SIZE, SIZE - 4 * PAGE, False)


def test_a_size_that_is_none_is_refused(host: VmHost, guest: Path, tmp_path: Path) -> None:
    vm = host.start(machine(tmp_path, guest))
    with vm.qmp() as qmp:
        for value in (0, -1, -(1 << 70), 1 << 63, 1 << 70, 1.5, "16M", None, True, [1]):
            with pytest.raises(QmpError, match=r"[Pp]arameter") as refused:
                qmp.execute("balloon", {"value": value})
            assert refused.value.error is not None and refused.value.error["class"] == "GenericError"
        assert qmp.execute("x-motorcade-balloon-stats")["target"] == SIZE


def test_more_than_there_is_means_all_and_less_than_a_guest_can_give_is_a_wish(
    host: VmHost, guest: Path, tmp_path: Path
) -> None:
    vm = host.start(machine(tmp_path, guest))
    with vm.qmp() as qmp:
        half = SIZE // 2
        for value, target in ((1, 0), (PAGE + 1, PAGE), (SIZE + 1, SIZE), ((1 << 63) - 1, SIZE), (half, half)):
            assert qmp.execute("balloon", {"value": value}) == {}
            said = qmp.execute("x-motorcade-balloon-stats")
            assert said["target"] - target in (0, PAGE) and said["actual"] == SIZE, (value, said)


def test_a_machine_without_one_says_so(host: VmHost, guest: Path, tmp_path: Path) -> None:
    fields = machine(tmp_path, guest)
    del fields["balloon"]
    with host.start(fields).qmp() as qmp:
        for command, arguments in (("query-balloon", {}), ("balloon", {"value": 1}), ("x-motorcade-balloon-stats", {})):
            with pytest.raises(QmpError, match="No balloon device has been activated") as refused:
                qmp.execute(command, arguments)
            assert refused.value.error is not None and refused.value.error["class"] == "DeviceNotActive"


def test_another_process_in_its_place_knows_what_the_last_one_knew(host: VmHost, guest: Path, tmp_path: Path) -> None:
    vm = host.start(machine(tmp_path, guest))
    given = len(GIVEN) * PAGE
    with vm.attach() as uart, vm.qmp() as qmp:
        wholevm.hear(uart, b"filled")
        qmp.execute("balloon", {"value": SIZE // 2})
        give(uart)
        first = vm.sidecar_pid("balloon")
        os.kill(first, 9)
        while (event := qmp.wait_event(60)) is None or event["event"] != "SIDECAR_RESTARTED":
            assert event is not None, "nobody took its place"
        said = qmp.execute("x-motorcade-balloon-stats")
        assert (said["target"], said["actual"], said["driver"]) == (SIZE // 2, SIZE - given, True)
        qmp.execute("balloon", {"value": SIZE - 8 * given})
        said = qmp.execute("x-motorcade-balloon-stats")
        assert (said["target"], said["actual"]) == (SIZE - 8 * given, SIZE - given)
        assert holes(vm, range(PAGES)) == GIVEN
        assert look(uart, 0) == EXPECTED


def test_vmmctl_shows_it_and_waits_for_what_the_guest_does(guest: Path, tmp_path: Path) -> None:
    fields = machine(tmp_path, guest)
    (tmp_path / "machine.yaml").write_text(json.dumps({**fields, "accel": "kvm"}))
    (tmp_path / "none.yaml").write_text(json.dumps({**fields, "accel": "kvm", "name": "none", "balloon": False}))
    given = len(GIVEN) * PAGE
    with Host() as host:
        host.vmmctl("up", "-d", str(tmp_path / "machine.yaml"))
        shown = host.vmmctl("balloon", "balloon").stdout
        assert shown == "balloon has 32 MiB of its 32 MiB; 0 MiB are in the balloon\n"
        for size, why in (("33M", "more than the 32M"), ("0", "nothing"), ("much", "expected a size")):
            assert why in host.vmmctl("balloon", "balloon", size, check=2).stderr
        assert "no driver" in host.vmmctl("balloon", "balloon", "16M", check=1).stderr
        said = host.vmmctl("balloon", "--no-wait", "balloon", str(SIZE - given)).stdout
        assert "it is to have 32.0 MiB, but has no driver for its balloon" in said
        with socket.socket(socket.AF_UNIX) as uart:
            uart.settimeout(60)
            uart.connect(str(host.run_dir / "balloon" / "console-ttyS0.sock"))
            wholevm.hear(uart, b"filled")
            give(uart)
        now = json.loads(host.vmmctl("balloon", "--json", "balloon", str(SIZE - given)).stdout)
        assert now["actual"] == now["target"] == SIZE - given
        # It does not do more than its script says.
        stuck = host.vmmctl("balloon", "--timeout", "0.2", "balloon", "16M", check=4)
        assert "gets no nearer to 16 MiB" in stuck.stderr
        host.vmmctl("balloon", "--no-wait", "balloon", "all")
        host.vmmctl("down", "--force", "balloon")
        host.vmmctl("balloon", "balloon", check=3)
        host.vmmctl("up", "-d", str(tmp_path / "none.yaml"))
        assert "machine.yaml has to say `balloon: true`" in host.vmmctl("balloon", "none", check=1).stderr
        host.vmmctl("down", "--force", "none")
