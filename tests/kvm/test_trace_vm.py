"""vmmctl sidecar trace, top and metrics on a live micro-guest, and clients of watch.sock of every kind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness import diskguest
from harness.vm import DEADLINE, Vm, VmHost, vm_host
from motorcade.orchestrator import cli, traceclient, watchserver
from motorcade.orchestrator.errors import EXIT_NOT_FOUND, EXIT_USAGE, UserError
from motorcade.orchestrator.traceclient import Happened, Lost, Note, Trace
from motorcade.proto import tap, watch
from motorcade.proto.watch import Kind

pytestmark = pytest.mark.kvm


@pytest.fixture
def host(tmp_path: Path) -> Iterator[VmHost]:
    """Where the VMs of the test live."""
    with vm_host(tmp_path) as h:
        yield h


def items(trace: Trace, enough: Callable[[list[traceclient.Item]], bool]) -> list[traceclient.Item]:
    """What comes until ``enough``."""
    found: list[traceclient.Item] = []
    for item in trace.read(time.monotonic() + DEADLINE):
        found.append(item)
        if enough(found):
            return found
    raise AssertionError(found)


def of_kind(found: list[traceclient.Item], kind: Kind) -> list[watch.Event]:
    return [i.event for i in found if isinstance(i, Happened) and i.event.kind == kind]


def test_a_request_is_seen_on_its_whole_way(host: VmHost, guest: Path, tmp_path: Path) -> None:
    vm = host.start(diskguest.machine(tmp_path, guest, "wrf"))
    assert diskguest.do(vm) == 0  # before anybody looks
    with Trace(vm.run_dir / "watch.sock", ["root"]) as trace:
        assert diskguest.do(vm) == 0
        found = items(trace, lambda seen: bool(of_kind(seen, Kind.INTERRUPT)) and len(types(seen)) >= 4)
        # The notification arrives when it likes: the loop has just begun, and looks by itself.
        kinds = [Kind(i.event.kind) for i in found if isinstance(i, Happened) and i.event.kind != Kind.KICK]
        assert kinds == [Kind.TAKE, Kind.SUBMIT, Kind.COMPLETE, Kind.PUSH, Kind.INTERRUPT]
        times = [i.event.ns for i in found if isinstance(i, Happened)]
        assert times == sorted(times)
        [take], [push], [submit] = (of_kind(found, k) for k in (Kind.TAKE, Kind.PUSH, Kind.SUBMIT))
        assert (take.length, take.arg, push.length) == (16, 513, 513)
        assert (submit.arg, submit.length) == (8 * 512, 512)
        assert push.arg <= push.ns - take.ns + 1_000_000
        assert types(found) == ["Reset", "Ok", "Activate", "Ok"]  # of the driver's start
        assert diskguest.do(vm) == 0
        found = items(trace, lambda seen: bool(of_kind(seen, Kind.INTERRUPT)))
        assert [e.queue for e in of_kind(found, Kind.SUBMIT)] == [watch.NO_QUEUE]
        assert trace.lost == 0
    wait_until_off(vm)


def types(found: list[traceclient.Item]) -> list[str]:
    """Of the disk's control messages."""
    return [i.type for i in found if isinstance(i, tap.Said) and i.device == "root"]


def wait_until_off(vm: Vm) -> None:
    """Nobody looks any more, and nothing is recorded."""
    end = time.monotonic() + DEADLINE
    with vm.qmp() as qmp:
        while True:
            before = recorded(vm)
            qmp.execute("x-motorcade-sidecar-stats", {"id": "root"})
            if recorded(vm) == before and not switched_on(vm):
                return
            assert time.monotonic() < end


def ring_file(vm: Vm, device: str) -> Path:
    """The memfd, by the supervisor's descriptor."""
    wanted = f"/memfd:motorcade-watch-{device} (deleted)"
    return next(p for p in Path(f"/proc/{vm.pid}/fd").iterdir() if str(p.readlink()) == wanted)


def switched_on(vm: Vm) -> bool:
    return any(ring_file(vm, d).read_bytes()[4:8] != bytes(4) for d in ("root", "core"))


def recorded(vm: Vm) -> int:
    return int.from_bytes(ring_file(vm, "core").read_bytes()[64:72], "little")


def test_a_file_for_perfetto(
    host: VmHost, guest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vm = host.start(diskguest.machine(tmp_path, guest, "ww"))
    out = tmp_path / "trace.json"
    work = lambda: [diskguest.do(vm), diskguest.do(vm), vm.close()]  # noqa: E731
    run_trace(vm, work, "web", "root", "--perfetto", str(out))
    assert "web is over" in capsys.readouterr().err
    trace = json.loads(out.read_text())
    slices = [e for e in trace["traceEvents"] if e["ph"] in "be" and e["name"] == "request"]
    assert {e["pid"] for e in slices} == {vm.sidecar_pid("root")}
    assert [e["ph"] for e in slices] == ["b", "e", "b", "e"]
    assert [e["name"] for e in trace["traceEvents"] if e["ph"] == "b" and e["cat"] == "control"] >= ["Activate"]


def run_trace(vm: Vm, meanwhile: Callable[[], object], *args: str) -> None:
    """The command, which ends by itself, with something happening while it traces."""

    def work() -> None:
        with vm.qmp() as qmp:
            while not switched_on(vm):
                qmp.execute("query-status")
        meanwhile()

    thread = threading.Thread(target=work)
    thread.start()
    assert cli.main(["sidecar", "trace", *args]) == 0
    thread.join()


def test_what_is_printed(host: VmHost, guest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vm = host.start(diskguest.machine(tmp_path, guest, "w"))

    def one() -> None:
        diskguest.do(vm)
        vm.close()

    run_trace(vm, one, "web", "root")
    out = capsys.readouterr().out
    assert " root       queue 0  take      head 0    528 bytes from the guest, room for 1" in out
    assert " root       -> Activate #" in out


def test_ctrl_c_ends_it_in_good_order(
    host: VmHost, guest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vm = host.start(diskguest.machine(tmp_path, guest, "w"))
    run_trace(vm, lambda: os.kill(os.getpid(), signal.SIGINT), "web", "core", "--json")
    wait_until_off(vm)
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all("message" in line for line in said)


def test_a_sidecar_that_dies_under_trace(host: VmHost, guest: Path, tmp_path: Path) -> None:
    vm = host.start(diskguest.machine(tmp_path, guest, "w"))
    with Trace(vm.run_dir / "watch.sock", ["root"]) as trace:
        os.kill(vm.sidecar_pid("root"), signal.SIGKILL)
        found = items(trace, lambda seen: isinstance(seen[-1], Note))
    note = found[-1]
    assert isinstance(note, Note)
    assert (note.device, note.text) == ("root", "killed by SIGKILL")


def test_a_ring_full_of_lies(host: VmHost, guest: Path, tmp_path: Path) -> None:
    """What a sidecar could write into it: whatever that is, the reader shows numbers, and goes on."""
    vm = host.start(diskguest.machine(tmp_path, guest, "ww"))
    with Trace(vm.run_dir / "watch.sock", ["root"]) as trace, ring_file(vm, "root").open("r+b") as ring:
        ring.seek(watch.RING_AT)
        ring.write(os.urandom(watch.EVENTS * watch.EVENT_SIZE))
        ring.seek(64)
        ring.write(struct.pack("<Q", 1 << 50))
        ring.flush()
        found = items(trace, lambda seen: trace.lost >= 1 << 50)
        assert all(isinstance(i, Lost | tap.Said) for i in found)
        ring.seek(watch.RING_AT + ((1 << 50) % watch.EVENTS) * watch.EVENT_SIZE)
        ring.write(struct.pack("<QQqIHBB", (1 << 50) + 1, (1 << 64) - 1, -1, 0xFFFFFFFF, 0xFFFF, 255, 255))
        ring.seek(64)
        ring.write(struct.pack("<Q", (1 << 50) + 1))
        ring.flush()
        [lie] = [i for i in items(trace, lambda seen: isinstance(seen[-1], Happened)) if isinstance(i, Happened)]
        assert (lie.event.kind, lie.event.queue) == (255, 255)
        assert diskguest.do(vm) == 0
        items(trace, lambda seen: bool(of_kind(seen, Kind.PUSH)))


def test_events_that_come_too_fast_are_counted(host: VmHost, guest: Path, tmp_path: Path) -> None:
    vm = host.start(diskguest.machine(tmp_path, guest, "w"))
    with Trace(vm.run_dir / "watch.sock", ["root"]) as trace, ring_file(vm, "root").open("r+b") as ring:
        ring.seek(64)
        ring.write(struct.pack("<Q", watch.EVENTS + 100))
        ring.flush()
        items(trace, lambda seen: trace.lost >= watch.EVENTS + 100)
        assert diskguest.do(vm) == 0
        items(trace, lambda seen: bool(of_kind(seen, Kind.PUSH)))


def test_clients_that_leave_or_stay_silent_harm_nobody(
    host: VmHost, guest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchserver, "REQUEST_SECONDS", 1.5)  # the supervisor is forked from here
    vm = host.start(diskguest.machine(tmp_path, guest, "ww"))
    path = vm.run_dir / "watch.sock"

    def connect() -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(DEADLINE)
        sock.connect(str(path))
        return sock

    silent, gone = connect(), connect()
    gone.sendall(b'{"do":"trace","devices":["root"],"control":true}\n')
    gone.close()
    deaf = connect()  # never reads
    deaf.sendall(b'{"do":"trace","devices":["root"],"control":true}\n')
    for nonsense in (b"\n", b"[1]\n", b'{"do":1}\n', b'{"do":"trace","devices":{"a":1}}\n', b"[" * 9000, b"\xff\xfe\n"):
        with connect() as sock:
            sock.sendall(nonsense)
            assert b"error" in sock.recv(4096)
    with pytest.raises(UserError, match="nothing of nobody is recorded"):
        Trace(path, ["nobody"])
    assert diskguest.do(vm) == 0
    assert traceclient.status(path)["queues"][0]["requests"] == 1
    assert silent.recv(10) == b""
    crowd = [connect() for _ in range(watchserver.MAX_CLIENTS + 1)]
    assert any(b"too many" in said(sock) for sock in crowd)
    for sock in (silent, deaf, *crowd):
        sock.close()
    wait_until_off(vm)
    assert diskguest.do(vm) == 0


def said(sock: socket.socket) -> bytes:
    """What is there, or will be once its time is up."""
    with contextlib.suppress(ConnectionResetError):
        return sock.recv(4096)
    return b""


def test_bad_arguments(host: VmHost, guest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    host.start(diskguest.machine(tmp_path, guest, "w"))

    def fails(*args: str) -> str:
        try:
            status = cli.main(["sidecar", "trace", *args])
        except SystemExit as e:
            status = int(e.code or 0)
        assert status in (EXIT_NOT_FOUND, EXIT_USAGE)
        return capsys.readouterr().err

    assert "web has no device rot (did you mean root?)" in fails("web", "rot")
    assert "no VM is called wob" in fails("wob", "root")
    assert "there is no event 'pull' (there are: take, push" in fails("web", "root", "--events", "push,pull")
    assert "more than 0" in fails("web", "root", "--seconds", "0")

