"""vmmctl doctor: what it sees here, and that it says what each lack costs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.vmmctl import Host
from motorcade.orchestrator import accel, doctor, kvmprobe


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as h:
        yield h


def test_report(host: Host) -> None:
    start = time.monotonic()
    report = json.loads(host.vmmctl("doctor", "--json").stdout)
    assert time.monotonic() - start < 10  # a second, on an idle machine
    names = [f["name"] for f in report["findings"]]
    assert names[0] == "kvm"
    assert {"userfaultfd", "io_uring", "tun", "namespaces", "landlock", "huge pages", "cgroup v2"} <= set(names)
    assert all(bool(f["cost"]) == (f["level"] != "ok") for f in report["findings"])
    assert report["accel"] in {"kvm", "box"}
    text = host.vmmctl("doctor").stdout
    assert all(f" {name} " in text for name in names)
    assert "accel: auto" in text.splitlines()[-1]


@pytest.mark.kvm
@pytest.mark.skipif(not Path("/dev/kvm").exists(), reason="no /dev/kvm")
def test_the_probe_guest_runs() -> None:
    probe = kvmprobe.probe()
    assert probe.runs_guests, probe.summary
    assert probe.ns is not None
    assert 0 < probe.ns < 100_000


@pytest.mark.parametrize(
    ("probe", "name"),
    [
        (kvmprobe.Probe(True, True, 0.3, "hardware"), "kvm"),
        (kvmprobe.Probe(True, True, 420.0, "emulated"), "box"),
        (kvmprobe.Probe(False, False, None, "there is no /dev/kvm"), "box"),
    ],
)
def test_auto(monkeypatch: pytest.MonkeyPatch, probe: kvmprobe.Probe, name: str) -> None:
    monkeypatch.setattr(kvmprobe, "probe", lambda: probe)
    choice = accel.choose("auto")
    assert choice.name == name
    assert choice.reason == ("" if name == "kvm" else probe.summary)
    assert accel.choose("kvm").name == "kvm"
    assert accel.choose("box").name == "box"


def test_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with nothing: every finding has its price, and none is an exception."""
    monkeypatch.setattr(doctor, "_syscall", lambda *_: -38)
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.setattr(doctor, "_can_unshare", lambda _: False)
    monkeypatch.setattr(kvmprobe, "probe", lambda: kvmprobe.Probe(False, False, None, "there is no /dev/kvm"))
    findings = {f.name: f for f in doctor.examine()}
    for name in ("kvm", "io_uring", "namespaces", "landlock", "passt", "qemu"):
        assert findings[name].level != "ok"
        assert findings[name].cost
    assert findings["io_uring"].found == "Function not implemented"
    assert "user, mnt, net, ipc, uts" in findings["namespaces"].found
