"""The zygote's protocol and life: what it refuses, when it ends, and that there is one. No VM comes to run."""

from __future__ import annotations

import os
import select
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from harness.zygotes import DEADLINE, await_full, await_gone, family, run_directory, status
from motorcade.orchestrator import daemon, lifeline, pool, zygoteclient
from motorcade.orchestrator.machine import Console, Disk, Kernel, Mac, Machine, Net, Size
from motorcade.orchestrator.zygoteclient import Zygote, ZygoteError

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def run_dir() -> Iterator[Path]:
    with run_directory() as path:
        yield path


@pytest.fixture
def zygote(run_dir: Path) -> Iterator[Zygote]:
    with zygoteclient.start(pool=0) as z:
        yield z


def machine(**changes: object) -> Machine:
    fields = {"name": "web", "kernel": Kernel(image="/nowhere/vmlinux"), "accel": "kvm", **changes}
    return Machine(**fields)  # type: ignore[arg-type]


def test_an_order_arrives_as_it_was() -> None:
    disks, nets = [Disk(id="root", path="r", overlay=True)], [Net(id="lan", user=True, mac=Mac(b"\x52\x54\0\1\2\3"))]
    all_of_it = machine(disks=disks, nets=nets, consoles=[Console(id="ttyS0")], memory=Size(1 << 30))
    order = daemon.Order(all_of_it, "/a/b.yaml", "kvm", True)
    again = daemon.decode_order(daemon.encode_order(order))
    assert again == order
    assert isinstance(again.machine.nets[0].mac, Mac)
    assert isinstance(again.machine.memory, Size)


def test_a_supervisor_is_the_zygotes_child_and_speaks_over_the_lifeline(zygote: Zygote) -> None:
    """The order cannot be carried out, and that is what vmmctl hears."""
    pid, line = zygote.fork()
    with line:
        assert psutil.Process(pid).ppid() == status(zygote)["pid"]
        daemon.start(line, daemon.Order(machine(), "web.yaml", "kvm", False))
        line.settimeout(DEADLINE)
        while (message := lifeline.receive(line)) is not None and message["event"] == "progress":
            pass
        assert message is not None
        assert (message["event"], "/nowhere/vmlinux" in message["message"]) == ("failed", True)
        assert lifeline.receive(line) is None


def test_a_bad_order_is_answered_with_its_reason(zygote: Zygote) -> None:
    _, line = zygote.fork()
    with line:
        line.send(b'[{"name": "web"}]')
        line.settimeout(DEADLINE)
        message = lifeline.receive(line)
        assert message is not None
        assert message["event"] == "failed"
        assert "ValidationError" in message["message"]


def test_a_supervisor_without_an_order_goes_away_and_is_reaped(zygote: Zygote) -> None:
    pid, line = zygote.fork()
    process = psutil.Process(pid)
    line.close()
    await_gone([process])
    while status(zygote)["running"]:
        pass


def test_a_supervisor_has_the_environment_of_vmmctl(zygote: Zygote, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here: the directory of run directories, which is a file."""
    monkeypatch.setenv("MOTORCADE_RUN_DIR", "/dev/null")
    _, line = zygote.fork()
    with line:
        daemon.start(line, daemon.Order(machine(), "web.yaml", "kvm", False))
        line.settimeout(DEADLINE)
        message = lifeline.receive(line)
    assert message is not None
    assert "/dev/null" in message["message"]


def test_nonsense_is_refused_and_the_next_one_served(zygote: Zygote, run_dir: Path) -> None:
    for data in (b"", b"{", b"[]", b"1", b"\xff" * 100, b'{"do": "dance"}', b'{"do": "fork"}', b"x" * (64 << 10)):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(str(run_dir / "zygote.sock"))
            sock.settimeout(DEADLINE)
            sock.send(data)
            assert not data or b"refused" in sock.recv(1000)
    assert status(zygote)["running"] == 0


def test_shapes_that_are_none_are_refused(run_dir: Path) -> None:
    with zygoteclient.start(pool=1) as zygote:
        bad = ({"gpu": 1}, {"blk": -1}, {"blk": 0}, {"blk": 65}, {"blk": "1"}, {"blk": 33, "net": 33})
        shapes = [{}, [], "x", *({"sidecars": sidecars} for sidecars in bad)]
        for shape in (*shapes, *({"sidecars": {}, "memory": size} for size in (-4096, 1, 1 << 60, "4096", None))):
            with pytest.raises(ZygoteError, match="refuses"):
                zygote.fork(shape)  # type: ignore[arg-type]
        assert status(zygote)["pool"] == []


def test_descriptors_that_nobody_asked_for_are_closed(zygote: Zygote) -> None:
    with pytest.raises(ZygoteError, match="lifeline"):
        zygote.ask({"do": "fork", "code": zygoteclient.fingerprint(), "place": zygoteclient.place()})
    before = psutil.Process(status(zygote)["pid"]).num_fds()
    for _ in range(50):
        with pytest.raises(ZygoteError):
            zygote.ask({"do": "dance"}, (0,))
    for fds in ((0, 0), (0, 0, 0)):
        with pytest.raises(ZygoteError):
            zygote.ask({"do": "fork", "code": zygoteclient.fingerprint(), "place": zygoteclient.place()}, fds)
    assert psutil.Process(status(zygote)["pid"]).num_fds() == before


def test_another_namespace_and_other_code_are_refused(zygote: Zygote) -> None:
    fork = {"do": "fork", "code": zygoteclient.fingerprint(), "place": zygoteclient.place(), "shape": None}
    with pytest.raises(ZygoteError, match="namespaces"):
        zygote.ask({**fork, "place": [1, 2, 3, 4]}, (0,))
    with pytest.raises(ZygoteError, match="code"):
        zygote.ask({**fork, "code": "of another tree"}, (0,))
    assert status(zygote)["current"]  # it is the client that is of another tree: no reason to go


def test_one_whose_code_was_replaced_ends(run_dir: Path, tmp_path: Path) -> None:
    """At the first request of a vmmctl with the new code; that one starts its VM without."""
    for name in ("core", "motorcade", "orchestrator", "proto", "sidecars"):
        shutil.copytree(REPO / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-P", "-m", "motorcade.orchestrator.zygote"], env=environment, check=True)
    ask = (
        "from motorcade.orchestrator import zygoteclient as c\n"
        "with c.find() as z: print(z.fork()[0])\n"
        "(c.Path(c.__file__).parent / 'pool.py').touch()\n"
        "print(c.fork())\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", ask], env=environment, check=True, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[1] == "None"
    with zygoteclient.start() as zygote:  # in its place, of this tree
        assert status(zygote)["code"] == zygoteclient.fingerprint()


def test_two_that_start_at_once_are_one(run_dir: Path) -> None:
    command = [sys.executable, "-P", "-m", "motorcade.orchestrator.zygote", "--pool", "0"]
    starts = [subprocess.Popen(command) for _ in range(6)]
    assert [start.wait(DEADLINE) for start in starts] == [0] * 6
    title = f"zygote ({run_dir})"
    alive = [p for p in psutil.process_iter(["cmdline"]) if title in " ".join(p.info["cmdline"] or [])]
    with zygoteclient.start() as zygote:
        assert [p.pid for p in alive] == [status(zygote)["pid"]]


def test_the_socket_of_a_dead_one_is_taken_over(run_dir: Path) -> None:
    with zygoteclient.start(pool=0) as first:
        processes = family(status(first)["pid"])
        processes[0].kill()
        await_gone(processes)
    assert (run_dir / "zygote.sock").exists()
    assert zygoteclient.find() is None
    assert zygoteclient.fork() is None
    with zygoteclient.start(pool=0) as second:
        assert status(second)["pid"] != processes[0].pid


def test_another_user_is_not_served(zygote: Zygote, run_dir: Path) -> None:
    """Should the directory's mode ever fail to keep him out."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    run_dir.chmod(0o711)
    (run_dir / "zygote.sock").chmod(0o666)
    code = (
        "import os, socket, sys\n"
        "os.setresuid(65534, 65534, 65534)\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "s.connect(sys.argv[1])\n"
        "s.settimeout(60)\n"
        'try: s.send(b\'{"do": "status"}\'); print(s.recv(1000))\n'
        "except (BrokenPipeError, ConnectionResetError): print(b'')\n"
    )
    command = [sys.executable, "-c", code, str(run_dir / "zygote.sock")]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "b''\n"
    assert status(zygote)["pid"]


def test_it_ends_when_it_is_out_of_use_and_leaves_nothing(run_dir: Path) -> None:
    with zygoteclient.start(idle=0.5, pool=1) as zygote:
        processes = family(status(zygote)["pid"])
        _, line = zygote.fork({"sidecars": {"serial": 1}})
        line.close()
        await_gone(processes)
    assert list(run_dir.iterdir()) == []


def test_sigterm_ends_it_in_good_order(zygote: Zygote, run_dir: Path) -> None:
    processes = family(status(zygote)["pid"])
    processes[0].terminate()
    await_gone(processes)
    assert list(run_dir.iterdir()) == []


def test_prepared_vms_end_with_the_zygote(run_dir: Path) -> None:
    for how in ("stop", "kill"):
        with zygoteclient.start(pool=2) as zygote:
            zygote.fork({"sidecars": {"serial": 2, "blk": 1}})[1].close()
            assert len(await_full(zygote, 2)["forked"]) == 2
            processes = family(status(zygote)["pid"])
            assert len(processes) == 1 + 2 * 5  # the zygote; each with a supervisor, core and three sidecars
            if how == "stop":
                zygote.stop()
            else:
                processes[0].kill()
            await_gone(processes)
    assert sorted(p.name for p in run_dir.iterdir()) == ["zygote.log", "zygote.sock"]  # of the one that was killed


def test_prepared_vms_that_die_are_replaced(run_dir: Path) -> None:
    with zygoteclient.start(pool=1) as zygote:
        zygote.fork({"sidecars": {"serial": 1}})[1].close()
        first = psutil.Process(await_full(zygote, 1)["forked"][0])
        first.kill()
        await_gone([first])
        while (shelf := await_full(zygote, 1))["forked"] == [first.pid]:
            pass
        assert shelf["ready"] == 1


def test_shapes_that_cannot_be_prepared_are_given_up(run_dir: Path) -> None:
    """Their RAM does not fit: the VM that asked will be told, and the zygote does not try for ever."""
    with zygoteclient.start(pool=1) as zygote:
        children = set()
        zygote.fork({"sidecars": {}, "memory": 1 << 60 >> 14})[1].close()
        for n in range(100):
            shelf = status(zygote)["pool"][0]
            children |= set(shelf["forked"])
            if n % 10 == 0:
                select.select([], [], [], 0.05)
        assert len(children) <= pool.MAX_DEATHS


def test_shapes_that_nobody_asks_for_any_more_are_dropped(run_dir: Path) -> None:
    with zygoteclient.start(pool=1) as zygote:
        for n in range(1, pool.SHAPES + 2):
            zygote.fork({"sidecars": {"serial": n}})[1].close()
            await_full(zygote, 1)
        kept = [shelf["sidecars"]["serial"] for shelf in status(zygote)["pool"]]
        assert kept == list(range(pool.SHAPES + 1, 1, -1))
