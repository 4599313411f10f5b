"""What the queries do where a part of the machine does not answer, and arguments that are none."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from harness.qmp import FakeMachine, QmpClient, QmpHost, qmp_host
from motorcade.core.qmp import guid
from motorcade.core.qmp.errors import DeviceNotFound
from motorcade.core.qmp.machine import BlockDevice
from motorcade.proto.messages import Counter, QueueStats, StatsReport

COUNTED = {"reads": 3, "writes": 4, "flushes": 5, "discards": 6, "write-zeroes": 7}
REPORT = StatsReport(
    (QueueStats(0, bytes_in=1024, bytes_out=512), QueueStats(1, bytes_in=2, bytes_out=1)),
    tuple(Counter(name, value) for name, value in COUNTED.items()),
)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[QmpHost]:
    with qmp_host(tmp_path / "q") as host:
        yield host


@pytest.fixture
def client(host: QmpHost) -> Iterator[QmpClient]:
    with host.connect() as client:
        yield client


def disks(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def block_devices(_self: FakeMachine) -> Sequence[BlockDevice]:
        return [BlockDevice(name, f"/{name}", "raw", 512) for name in names]

    monkeypatch.setattr(FakeMachine, "block_devices", block_devices)


def test_block_statistics_are_the_sidecars_counts(
    host: QmpHost, client: QmpClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    disks(monkeypatch, "slow")
    client.send(b'{"execute":"query-blockstats"}')
    with host.connect() as other:
        while not host.machine.waiting:
            other.ask("query-name")  # nobody else waits for the sidecar
    host.call(lambda: host.machine.waiting.pop()(REPORT))
    (answer,) = client.read()["return"]
    assert answer == {
        "device": "slow",
        "qdev": "slow",
        "node-name": "slow",
        "stats": {
            "rd_bytes": 513, "wr_bytes": 1026, "rd_operations": 3, "wr_operations": 11, "flush_operations": 5,
            "unmap_operations": 6, "rd_merged": 0, "wr_merged": 0, "account_invalid": False, "account_failed": True,
        },
    }  # fmt: skip


def test_a_sidecar_that_does_not_answer_has_what_it_said_last(
    host: QmpHost, client: QmpClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    disks(monkeypatch, "mute")
    assert client.ask("query-blockstats")["error"] == {
        "class": "GenericError",
        "desc": "The sidecar of 'mute' gave no counters, now or before; see its log",
    }
    host.machine.known["mute"] = REPORT
    assert client.ask("query-blockstats")["return"][0]["stats"]["rd_bytes"] == 513


def test_a_disk_that_goes_while_it_is_asked(host: QmpHost, client: QmpClient, monkeypatch: pytest.MonkeyPatch) -> None:
    disks(monkeypatch, "slow")

    def gone(_self: FakeMachine, device_id: str) -> StatsReport | None:
        raise DeviceNotFound(device_id)

    monkeypatch.setattr(FakeMachine, "last_stats", gone)
    client.send(b'{"execute":"query-blockstats"}')
    with host.connect() as other:
        while not host.machine.waiting:
            other.ask("query-name")
    host.call(lambda: host.machine.waiting.pop()(None))
    assert "gave no counters" in client.read()["error"]["desc"]


def test_no_disks(client: QmpClient, monkeypatch: pytest.MonkeyPatch) -> None:
    disks(monkeypatch)
    for command in ("query-block", "query-blockstats"):
        assert client.ask(command) == {"return": []}


def test_an_image_that_no_disk_uses(client: QmpClient) -> None:
    nodes = client.ask("query-named-block-nodes")["return"]
    assert [node["node-name"] for node in nodes] == ["disk0", "disk1", "spare"]
    assert ["image" in node for node in nodes] == [True, True, False]  # nobody knows its size yet


def test_the_generation_id_in_its_usual_form(host: QmpHost, client: QmpClient) -> None:
    first = "03020100-0504-0706-0809-0a0b0c0d0e0f"
    assert client.ask("query-vm-generation-id") == {"return": {"guid": first}}
    assert guid.parse(first) == host.machine.generation_id
    assert uuid.UUID(bytes_le=host.machine.generation_id) == uuid.UUID(first)
    new = client.ask("x-motorcade-set-generation-id")["return"]["guid"]
    assert new != first
    assert client.ask("query-vm-generation-id")["return"]["guid"] == new
    assert client.ask("x-motorcade-set-generation-id", guid=first.upper())["return"]["guid"] == first
    for bad in ("", "auto ", first[:-1], first.replace("-", ""), "{" + first + "}", first + "\n"):
        assert "expects auto or a UUID" in client.ask("x-motorcade-set-generation-id", guid=bad)["error"]["desc"]


def test_memory_and_registers(client: QmpClient) -> None:
    assert client.ask("query-memory-size-summary")["return"] == {"base-memory": 512 << 20, "plugged-memory": 0}
    assert client.ask("query-mem-gpa", gpa="10")["return"] == "13121110"
    assert client.ask("query-mem-gpa", gpa="0x0")["return"] == "3020100"
    assert client.ask("query-vcpu-reg", addr="rip", vcpu=0)["return"] == "FFF0"
    assert client.ask("query-vcpu-reg", addr="rip", vcpu=1)["error"]["class"] == "DeviceNotFound"
    for gpa in ("", "-1", "vda", "1" * 400):
        assert "gpa" in client.ask("query-mem-gpa", gpa=gpa)["error"]["desc"] or len(gpa) > 9
    assert client.ask("query-mem-gpa", gpa=10)["error"]["desc"] == "Invalid parameter 'gpa': Expected str, got int"


@pytest.mark.parametrize(
    ("request_text", "key"),
    [
        ('{"execute": "stop", "execute": "cont"}', "execute"),
        ('{"execute": "query-mem-gpa", "arguments": {"gpa": "0", "gpa": "1"}}', "gpa"),
        ('{"execute": "stop", "id": {"a": 1, "a": 2}}', "a"),
        ('{"execute": "stop", "\\u0065xecute": "cont"}', "execute"),
    ],
)
def test_a_key_that_comes_twice_is_refused(host: QmpHost, client: QmpClient, request_text: str, key: str) -> None:
    client.send(request_text.encode())
    assert client.read()["error"] == {"class": "GenericError", "desc": f"JSON parse error, duplicate key '{key}'"}
    assert host.machine.done == []


def test_a_number_of_many_digits_is_no_reason_to_stumble(client: QmpClient) -> None:
    client.send(b'{"execute": "query-name", "id": %s}' % (b"9" * 300))
    assert client.read()["id"] == int("9" * 300)
    client.send(b'{"execute": "query-name", "id": %s}' % (b"9" * 5000))
    assert client.line()  # whatever it is; and then
    assert client.ask("query-name") == {"return": {"name": "fake"}}
