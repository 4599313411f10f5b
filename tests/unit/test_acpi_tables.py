"""The ACPI tables: read back by hand where it matters, and by iasl, which is not ours."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from motorcade.core import acpi
from motorcade.core.acpi import aml

BASE = 0xE0000
SLOTS = [(0, 5), (1, 6), (16, 13), (32, 5)]


def build(cpus: int = 2, slots: list[tuple[int, int]] = SLOTS, uart: bool = True) -> bytearray:
    """The firmware area, from BASE to 1 MiB, with the tables in it."""
    area = bytearray(0x20000)
    written: list[range] = []

    def write(gpa: int, data: bytes) -> None:
        where = range(gpa, gpa + len(data))
        assert all(where.stop <= w.start or w.stop <= where.start for w in written)
        assert gpa >= BASE and where.stop <= 1 << 20
        written.append(where)
        area[gpa - BASE : where.stop - BASE] = data

    assert acpi.build(write, BASE, cpus, slots, uart) == BASE
    return area


def tables(area: bytearray) -> dict[bytes, bytes]:
    """Every table that is reached from the RSDP, its checksum proved."""

    def table(gpa: int) -> bytes:
        at = gpa - BASE
        (length,) = struct.unpack_from("<I", area, at + 4)
        data = bytes(area[at : at + length])
        assert sum(data) % 256 == 0
        return data

    assert area[:8] == b"RSD PTR "
    assert sum(area[:20]) % 256 == 0
    assert sum(area[:36]) % 256 == 0
    xsdt = table(struct.unpack_from("<Q", area, 24)[0])
    found = {xsdt[:4]: xsdt}
    for (gpa,) in struct.iter_unpack("<Q", xsdt[36:]):
        data = table(gpa)
        found[data[:4]] = data
    (dsdt_at,) = struct.unpack_from("<Q", found[b"FACP"], 140)
    assert struct.unpack_from("<I", found[b"FACP"], 40) == (dsdt_at,)
    found[b"DSDT"] = table(dsdt_at)
    return found


def test_every_table_is_reachable_and_adds_up() -> None:
    found = tables(build())
    assert set(found) == {b"XSDT", b"FACP", b"APIC", b"DSDT"}
    assert len(found[b"FACP"]) == 276


def madt_entries(madt: bytes) -> list[bytes]:
    entries, at = [], 44
    while at < len(madt):
        entries.append(madt[at : at + madt[at + 1]])
        at += madt[at + 1]
    assert at == len(madt)
    return entries


@pytest.mark.parametrize("cpus", [1, 4, 255, 256, 1000])
def test_madt_lists_each_cpu_once(cpus: int) -> None:
    entries = madt_entries(tables(build(cpus=cpus))[b"APIC"])
    ids = [struct.unpack_from("<BBI", e, 2) for e in entries if e[0] == 0]
    ids += [
        (uid, x2apic, flags) for x2apic, flags, uid in (struct.unpack_from("<III", e, 4) for e in entries if e[0] == 9)
    ]
    assert ids == [(n, n, 1) for n in range(cpus)]
    assert [struct.unpack_from("<II", e, 4) for e in entries if e[0] == 1] == [(0xFEC00000, 0)]


def test_more_cpus_than_fit_are_an_error() -> None:
    with pytest.raises(ValueError, match="above 1 MiB"):
        build(cpus=4000)
    with pytest.raises(ValueError, match="multiple of 16"):
        acpi.build(lambda _gpa, _data: None, BASE + 8, 1, [], False)


@pytest.fixture(scope="module")
def iasl() -> str:
    path = shutil.which("iasl")
    if path is None:
        pytest.skip("iasl is not installed (package acpica-tools)")
    return path


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return output


def disassemble(iasl: str, where: Path, name: str, data: bytes) -> str:
    (where / f"{name}.dat").write_bytes(data)
    output = run(iasl, "-d", f"{name}.dat", cwd=where)
    text = (where / f"{name}.dsl").read_text()
    assert not re.search(r"error|warning|invalid|unknown", output + text, re.IGNORECASE), output + text
    return text


def test_iasl_reads_the_data_tables(iasl: str, tmp_path: Path) -> None:
    found = tables(build(cpus=300))
    fadt = disassemble(iasl, tmp_path, "facp", found[b"FACP"])
    assert re.search(r"Hardware Reduced \(V5\) : 1", fadt)
    assert re.search(r"Reset Register Supported \(V2\) : 1", fadt)
    assert "Address : 0000000000000606" in fadt
    assert re.search(r"Value to cause reset : 42", fadt)
    assert re.search(r"Sleep Control Register.*?Address : 0000000000000604", fadt, re.DOTALL)
    assert re.search(r"Sleep Status Register.*?Address : 0000000000000605", fadt, re.DOTALL)
    madt = disassemble(iasl, tmp_path, "apic", found[b"APIC"])
    assert madt.count("[Processor Local APIC]") == 255
    assert madt.count("[Processor Local x2APIC]") == 45
    disassemble(iasl, tmp_path, "xsdt", found[b"XSDT"])


@pytest.mark.parametrize(
    ("cpus", "slots", "uart"),
    [(1, [], False), (2, SLOTS, True), (255, [(i, 5 + i % 7) for i in range(48)], True)],
)
def test_iasl_compiles_the_dsdt_back_to_the_same(
    iasl: str, tmp_path: Path, cpus: int, slots: list[tuple[int, int]], uart: bool
) -> None:
    dsdt = tables(build(cpus, slots, uart))[b"DSDT"]
    text = disassemble(iasl, tmp_path, "dsdt", dsdt)
    assert text.count('"ACPI0007"') == cpus
    hotplug = set(range(32))
    assert text.count('"LNRO0005"') == len(hotplug | {slot for slot, _ in slots})
    assert text.count("SLTS & ") == text.count("Notify (\\_SB.VR") == len(hotplug)
    assert text.count('"PNP0501"') == uart
    output = run(iasl, "-oa", "-p", "again", "dsdt.dsl", cwd=tmp_path)  # -oa: as written, nothing optimized
    assert "0 Errors, 0 Warnings, 0 Remarks" in output
    again = (tmp_path / "again.aml").read_bytes()
    assert again[36:] == dsdt[36:]


def test_interrupts_are_shared_where_two_slots_have_one(iasl: str, tmp_path: Path) -> None:
    text = disassemble(iasl, tmp_path, "dsdt", tables(build())[b"DSDT"])
    sharing = {}
    for device in re.findall(r"Device \((VR..)\)(.*?)\n        }", text, re.DOTALL):
        base = re.search(r"(0x[0-9A-F]+), +// Address Base", device[1])
        found = re.search(
            r"Interrupt \(ResourceConsumer, Edge, ActiveHigh, (\w+).*?(0x[0-9A-F]+)", device[1], re.DOTALL
        )
        assert base and found
        sharing[device[0]] = (int(base[1], 16), found[1], int(found[2], 16))
    assert len(sharing) == 33
    assert sharing["VR00"] == (0xD0000000, "Shared", 5)
    assert sharing["VR01"] == (0xD0001000, "Shared", 6)
    assert sharing["VR10"] == (0xD0010000, "Shared", 13)
    assert sharing["VR20"] == (0xD0020000, "Shared", 5)
    assert sharing["VR05"] == (0xD0005000, "Shared", 12)  # nothing is in it; something may come


def test_slots_of_disks_and_nics_say_whether_something_is_in_them(iasl: str, tmp_path: Path) -> None:
    area = build()
    assert struct.unpack_from("<I", area, 0x50) == (1 << 0 | 1 << 1 | 1 << 16,)
    text = disassemble(iasl, tmp_path, "dsdt", tables(area)[b"DSDT"])
    assert re.search(r"OperationRegion \(SREG, SystemMemory, 0x000E0050, 0x04\)", text)
    assert re.search(r"Name \(SLTK, 0x00010003\)", text)
    slot = text[text.index("Device (VR05)") : text.index("Device (VR06)")]
    assert re.search(r"If \(\(.*SLTS & 0x20\)\)\s*{\s*Return \(0x0F\)", slot)
    assert '"compatible"' in slot and '"virtio,mmio"' in slot and '"PRP0001"' in slot
    console = text[text.index("Device (VR20)") :]
    assert "_STA" not in console[: console.index("_CRS")]


@pytest.mark.parametrize(
    ("body", "encoded"),
    [
        (0, b"\x01"),
        (62, b"\x3f"),
        (63, b"\x41\x04"),
        (0xFFD, b"\x4f\xff"),
        (0xFFE, b"\x81\x00\x01"),
        (0x20000, b"\x83\x00\x20"),
    ],
)
def test_package_length(body: int, encoded: bytes) -> None:
    assert aml.package_length(body) == encoded


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, b"\0"),
        (1, b"\1"),
        (2, b"\x0a\2"),
        (256, b"\x0b\0\1"),
        (1 << 16, b"\x0c\0\0\1\0"),
        (1 << 32, b"\x0e\0\0\0\0\1\0\0\0"),
    ],
)
def test_integer(value: int, encoded: bytes) -> None:
    assert aml.integer(value) == encoded


@pytest.mark.parametrize("bad", ["ABCDE", "1ABC", "AB C", "abcd", "A.", "\\_SB..X", "Ä"])
def test_bad_names(bad: str) -> None:
    with pytest.raises(ValueError, match="not an ACPI name"):
        aml.name_string(bad)


def test_names() -> None:
    assert aml.name_string("\\") == b"\\\0"
    assert aml.name_string("\\_SB") == b"\\_SB_"
    assert aml.name_string("\\_SB.GED") == b"\\\x2e_SB_GED_"
    assert aml.name_string("A.B.C") == b"\x2f\x03A___B___C___"


def test_out_of_range_values() -> None:
    for value in (-1, 1 << 64):
        with pytest.raises(ValueError, match="64 bits"):
            aml.integer(value)
    with pytest.raises(ValueError, match="NUL"):
        aml.string("a\0")
    with pytest.raises(ValueError, match="EISA"):
        aml.eisa_id("pnp0501")
    with pytest.raises(ValueError, match="package of"):
        aml.package_length(1 << 28)


def test_the_generation_id_is_where_the_guest_is_told(iasl: str, tmp_path: Path) -> None:
    area = build()
    assert area[0x40:0x50] == bytes(16), "it is the machine's to write"
    assert area[0x80:0x84] == b"DSDT"
    text = disassemble(iasl, tmp_path, "dsdt", tables(area)[b"DSDT"])
    vgen = text[text.index("Device (VGEN)") :]
    assert re.search(r'Name \(_HID, "MTRC0001"\)', vgen)
    assert re.search(r'Name \(_CID, "VM_Gen_Counter"\)', vgen)
    assert re.search(r'Name \(_DDN, "VM_Gen_Counter"\)', vgen)
    assert re.search(r"Name \(ADDR, Package \(0x02\)\s*{\s*0x000E0040,\s*Zero\s*}\)", vgen)
    assert re.search(r"If \(\(Local0 & 0x02\)\)\s*{\s*Notify \(\\_SB.VGEN, 0x80\)", text)
