"""Old components become new ones step by step; what cannot be is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from motorcade.core.snapshot import cpu, upgrade
from motorcade.core.snapshot.components import unpack_records, unpack_sidecar
from motorcade.core.vcpustate import msr_values
from motorcade.proto import template
from motorcade.proto.template import Component, TemplateError

MACHINES = sorted((Path(__file__).resolve().parents[1] / "golden").glob("machine-*.state"))


def test_an_old_component_goes_through_every_step() -> None:
    steps = {("pm", v): lambda data, v=v: data + str(v).encode() for v in (1, 2, 3)}
    assert upgrade.upgrade(Component("pm", 2, b"x"), {"pm": 4}, steps) == Component("pm", 4, b"x23")
    assert upgrade.upgrade(Component("pm", 4, b"x"), {"pm": 4}, steps) == Component("pm", 4, b"x")


def test_a_newer_version_is_refused_by_name() -> None:
    with pytest.raises(TemplateError, match=r"vcpu\.3 has version 9, newer than this program, which knows up to 1"):
        upgrade.upgrade(Component("vcpu.3", 9, b""), {"vcpu": 1}, {})


def test_an_unknown_kind_is_refused_by_name() -> None:
    with pytest.raises(TemplateError, match=r"component flux\.a is of no kind"):
        upgrade.upgrade(Component("flux.a", 1, b""))


def test_data_that_is_not_what_its_version_says_is_refused_by_name() -> None:
    def step(data: bytes) -> bytes:
        raise ValueError("too short")

    with pytest.raises(TemplateError, match="component rtc, from version 1 to 2: too short"):
        upgrade.upgrade(Component("rtc", 1, b""), {"rtc": 2}, {("rtc", 1): step})


def test_every_version_that_was_ever_written_has_its_steps() -> None:
    for kind, newest in upgrade.current.items():
        for version in range(1, newest):
            assert (kind, version) in upgrade._STEPS
    assert all(version < upgrade.current[kind] for kind, version in upgrade._STEPS)


@pytest.mark.parametrize("path", MACHINES, ids=lambda p: p.name)
def test_machines_of_every_version_are_understood(path: Path) -> None:
    """As far as that goes without the processor that they were made on: tests/golden/make.py."""
    whole = template.decode(path.read_bytes())
    parts = {c.name: upgrade.upgrade(c) for c in whole.components}
    assert {c.kind for c in parts.values()} == upgrade.current.keys()
    assert all(c.version == upgrade.current[c.kind] for c in parts.values())
    for name, part in parts.items():
        if part.kind == "vcpu":
            records = dict(unpack_records(part.data))
            assert {"sregs", "regs", "lapic", "events", "mp_state", "xsave", "msrs"} <= records.keys(), name
            assert set(msr_values(records["msrs"])) == set(whole.cpu.msrs)
            assert len(records["xsave"]) == whole.cpu.xsave_size
        elif part.kind == "vm":
            assert {"pic0", "pic1", "ioapic"} <= dict(unpack_records(part.data)).keys()
        elif part.kind == "sidecar":
            assert unpack_sidecar(part.data).version, name
    assert cpu.model(whole.cpu).startswith("AuthenticAMD family 25 model 1")  # of two hosts
    assert "sse2" in cpu.features(whole.cpu)


def test_there_is_a_machine_of_the_present_versions() -> None:
    """Else: python tests/golden/make.py --machine."""
    assert MACHINES
    assert any(
        {c.kind: c.version for c in template.decode(path.read_bytes()).components} == upgrade.current
        for path in MACHINES
    )
