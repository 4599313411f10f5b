"""human-monitor-command: lines as at QEMU's monitor, and what becomes of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.qmp import QmpClient, QmpHost, qmp_host
from motorcade.core.qmp.machine import RunState
from motorcade.core.qmp.monitor import COMMANDS
from motorcade.core.qmp.monitorinfo import INFO
from motorcade.core.snapshot.plan import Report, Status
from motorcade.proto.messages import Counter, QueueStats, StatsReport


@pytest.fixture
def host(tmp_path: Path) -> Iterator[QmpHost]:
    with qmp_host(tmp_path / "q") as host:
        yield host


@pytest.fixture
def client(host: QmpHost) -> Iterator[QmpClient]:
    with host.connect() as client:
        yield client


def say(client: QmpClient, line: str, **more: object) -> str:
    answer = client.ask("human-monitor-command", **{"command-line": line}, **more)
    while "event" in answer:
        answer = client.read()
    text = answer["return"]
    assert isinstance(text, str)
    assert "\n" not in text.replace("\r\n", "")
    return text.replace("\r\n", "\n")


def test_what_is_typed_is_done(host: QmpHost, client: QmpClient) -> None:
    for line in ("stop", "s", "cont", "c", "system_reset", "system_powerdown", "migrate_cancel"):
        assert say(client, line) == ""
    assert host.machine.done == ["pause", "pause", "resume", "resume", "reset", "powerdown", "cancel"]
    assert say(client, "migrate -d file:/tmp/t") == ""
    assert say(client, "migrate file:/tmp/t").startswith("terminal does not allow synchronous migration")
    assert [plan.uri for plan in host.machine.plans] == ["file:/tmp/t"] * 2
    assert say(client, "migrate_set_capability x-ignore-shared on") == ""
    assert "x-ignore-shared: on\n" in say(client, "info migrate_capabilities")


def test_quit_answers_first(client: QmpClient) -> None:
    client.send(b'{"execute":"human-monitor-command","arguments":{"command-line":"q"}}')
    assert client.read() == {"return": ""}
    assert client.read()["event"] == "SHUTDOWN"


def test_an_answer_that_comes_later(host: QmpHost, client: QmpClient) -> None:
    client.send(b'{"execute":"human-monitor-command","arguments":{"command-line":"dump-guest-memory /tmp/core"}}')
    with host.connect() as other:
        while not host.machine.plans:
            other.ask("query-name")
    assert host.machine.plans[0].uri == "file:/tmp/core"
    then = host.machine.thens[0]
    assert then is not None
    host.call(lambda: then(Report(Status.FAILED, error="no room")))
    assert client.read() == {"return": "Error: no room\r\n"}


def test_an_error_is_text(host: QmpHost, client: QmpClient) -> None:
    host.machine.run_state = RunState.INTERNAL_ERROR
    assert say(client, "stop").startswith("Error: The command stop is not permitted")


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("", ""),
        ("frobnicate now", "unknown command: 'frobnicate'\n"),
        ("info nonsense", "unknown command: 'info nonsense'\n"),
        ("stop now", 'stop: extraneous characters at the end of line\nTry "help stop" for more information\n'),
        ("info uuid x", 'info uuid: extraneous characters at the end of line\nTry "help info" for more information\n'),
        ("info registers all", "Error: 'all' is not expected there\n"),
        ("migrate", 'migrate: too few words\nTry "help migrate" for more information\n'),
        ("migrate_set_capability events maybe", "Error: maybe is neither on nor off\n"),
        ("balloon much", "Error: much is no number of MiB\n"),
        ("xp /8q 0x0", "Error: '/8q' is no format such as /8xw: a count, x, and a size of b, h, w or g\n"),
        ("xp somewhere", "Error: 'somewhere' is no address such as 0x1000\n"),
        ("xp 0x1000", "Error: guest physical 0x1000+0x4 is not RAM\n"),
        ("xp -1", "Error: '-1' is no address such as 0x1000\n"),
        ("closefd none", "Error: File descriptor named 'none' not found\n"),
    ],
)
def test_what_is_wrong_is_said_as_qemu_says_it(client: QmpClient, line: str, answer: str) -> None:
    assert say(client, line) == answer


def test_a_cpu_that_is_not_there(client: QmpClient) -> None:
    answer = client.ask("human-monitor-command", **{"command-line": "info cpus", "cpu-index": 2})
    assert answer["error"]["desc"] == "Parameter 'cpu-index' expects a CPU number"


def test_what_info_says(host: QmpHost, client: QmpClient) -> None:
    assert say(client, "info status") == "VM status: running\n"
    host.machine.run_state = RunState.PRELAUNCH
    assert say(client, "info status") == "VM status: paused (prelaunch)\n"
    assert say(client, "info cpus", **{"cpu-index": 1}) == "  CPU #0: thread_id=1001\n* CPU #1: thread_id=1002\n"
    assert say(client, "info registers") == "\nCPU#0\nrip=000000000000fff0\n"
    assert say(client, "info network").startswith("lan: index=0,type=nic,model=virtio-net-device,macaddr=52:54:00:")
    assert say(client, "info chardev") == "com1: filename=pty:/dev/pts/3\n"
    assert "disk1 (disk1): /img/b.ovl (motorcade-overlay)\n" in say(client, "info block")
    assert "    Backing file:     /img/base.raw (chain depth: 1)\n" in say(client, "info block")
    assert 'bus: virtio-mmio-bus.0\n      type virtio-mmio-bus\n      dev: virtio-blk-device, id "disk0"\n' in say(
        client, "info qtree"
    )
    host.machine.known["disk1"] = StatsReport((QueueStats(0, bytes_out=512),), (Counter("reads", 1),))
    assert say(client, "info blockstats").endswith(
        "disk1: rd_bytes=512 wr_bytes=0 rd_operations=1 wr_operations=0 flush_operations=0\n"
    )
    assert say(client, "info balloon") == "Error: No balloon device has been activated\n"
    assert say(client, "xp /5xh 0x10") == (
        "0000000000000010: 0x1110 0x1312 0x1514 0x1716 0x1918\n"
    )  # fmt: skip
    assert say(client, "xp /2xg 0").endswith("0x0706050403020100 0x0f0e0d0c0b0a0908\n")


def test_every_subject_has_an_answer(client: QmpClient) -> None:
    for name in INFO:
        assert "unknown command" not in say(client, f"info {name}")


def test_help_lists_them_all(client: QmpClient) -> None:
    everything = say(client, "help")
    assert all(c.usage in everything for c in COMMANDS.values())
    assert say(client, "help cont") == "cont|c  -- let the vCPUs run\n"
    assert say(client, "help info") == say(client, "info")
    assert all(f"info {name}  -- " in say(client, "info") for name in INFO)
