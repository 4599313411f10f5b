"""The machine's ACPI tables (ACPI 6.5): RSDP, XSDT, FADT, MADT and DSDT, for a hardware-reduced platform.

Hardware-reduced (section 4.1): no PM timer, no SCI, no legacy event registers. Events arrive through a Generic
Event Device, sleep and reset through registers that the FADT names; core/pm.py answers both.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from motorcade.core import pm, rtc
from motorcade.core.acpi import aml
from motorcade.core.layout import (
    GED_GSI,
    HOTPLUG_SLOTS,
    RTC_PORT,
    UART_GSI,
    UART_PORT,
    VIRTIO_MMIO_SIZE,
    slot_address,
    slot_gsi,
)

IOAPIC_BASE = 0xFEC00000
LAPIC_BASE = 0xFEE00000

GENERATION_ID = 0x40
"""Where the 16 bytes of the VM generation ID are, from the RSDP on; DSDT's VGEN says it to the guest."""

PRESENT_SLOTS = 0x50
"""Where 32 bits say which of HOTPLUG_SLOTS have a device, from the RSDP on. In memory, and not in a register: each _STA
of a slot reads it, several times at a start, and no read costs an exit."""

_TABLES = 0x80  # from the RSDP on
_OEM = b"MOTORC"
_OEM_TABLE = b"MOTORCAD"
_CREATOR = b"MTRC"
_END = 0xFFFF0  # of the firmware area; the reset vector follows

MemoryWrite = Callable[[int, bytes], None]


def build(memory_write: MemoryWrite, base_gpa: int, cpus: int, slots: Sequence[tuple[int, int]], uart: bool) -> int:
    """Writes the tables from ``base_gpa`` on and gives the address of the RSDP, which is ``base_gpa`` itself.

    The VM generation ID at ``base_gpa + GENERATION_ID`` is the caller's to write, and the bitmap at PRESENT_SLOTS to
    keep up to date; here it gets what ``slots`` says.
    ``base_gpa`` is a multiple of 16 in the firmware area (0xe0000 to 1 MiB). ``slots`` are the virtio-mmio slots
    with the GSI of each. vCPU n has APIC id n. ``uart``: whether there is a 16550. ValueError where the tables do
    not fit.
    """
    if base_gpa % 16:
        raise ValueError(f"the RSDP cannot be at {base_gpa:#x}: not a multiple of 16")
    at = base_gpa + _TABLES  # the RSDP comes first, where a search from 0xe0000 finds it at once
    tables: list[tuple[int, bytes]] = []

    def place(data: bytes) -> int:
        nonlocal at
        address = at
        tables.append((address, data))
        at = (at + len(data) + 63) & ~63
        return address

    dsdt_at = place(_table(b"DSDT", 2, dsdt(cpus, slots, uart, base_gpa)))
    fadt_at = place(_table(b"FACP", 6, _fadt(dsdt_at)))
    madt_at = place(_table(b"APIC", 5, _madt(cpus)))
    xsdt_at = place(_table(b"XSDT", 1, struct.pack("<QQ", fadt_at, madt_at)))
    if at > _END:
        raise ValueError(f"the ACPI tables of {cpus} CPUs end at {at:#x}, above 1 MiB")
    for address, data in tables:
        memory_write(address, data)
    memory_write(base_gpa, _rsdp(xsdt_at))
    memory_write(base_gpa + PRESENT_SLOTS, present_slots(index for index, _ in slots))
    return base_gpa


def present_slots(slots: Iterable[int]) -> bytes:
    """The bitmap at PRESENT_SLOTS: those of ``slots`` that are hot-pluggable."""
    return struct.pack("<I", sum(1 << slot for slot in slots if slot in HOTPLUG_SLOTS))


def _checksum(data: bytes | bytearray) -> int:
    return -sum(data) & 0xFF


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    """``body`` behind a System Description Table Header (section 5.2.6)."""
    head = struct.pack("<4sIBB6s8sI4sI", signature, 36 + len(body), revision, 0, _OEM, _OEM_TABLE, 1, _CREATOR, 1)
    data = bytearray(head + body)
    data[9] = _checksum(data)
    return bytes(data)


def _rsdp(xsdt: int) -> bytes:
    """Section 5.2.5.3, revision 2: no RSDT, which no 64-bit system reads."""
    first = bytearray(struct.pack("<8sB6sBI", b"RSD PTR ", 0, _OEM, 2, 0))
    first[8] = _checksum(first)
    whole = bytearray(bytes(first) + struct.pack("<IQB3x", 36, xsdt, 0))
    whole[32] = _checksum(whole)
    return bytes(whole)


def _io_register(port: int) -> bytes:
    """A Generic Address Structure (section 5.2.3.2): one byte at an I/O port."""
    return struct.pack("<BBBBQ", 1, 8, 0, 1, port)


def _fadt(dsdt_at: int) -> bytes:
    """Section 5.2.9, version 6.5, without its header. All that is not set here is not there: zero."""
    body = bytearray(276 - 36)

    def put(form: str, offset: int, *values: int | bytes) -> None:
        struct.pack_into("<" + form, body, offset - 36, *values)

    wbinvd, proc_c1, power_button, sleep_button = 1 << 0, 1 << 2, 1 << 4, 1 << 5  # buttons: none of the fixed kind
    reset_register, hardware_reduced = 1 << 10, 1 << 20
    vga_not_present = 1 << 2  # of IAPC_BOOT_ARCH; its 8042 flag stays clear: there is none
    put("I", 40, dsdt_at)
    put("B", 108, rtc.CENTURY)
    put("H", 109, vga_not_present)
    put("I", 112, wbinvd | proc_c1 | power_button | sleep_button | reset_register | hardware_reduced)
    put("12s", 116, _io_register(pm.BASE + pm.RESET))
    put("B", 128, pm.RESET_VALUE)
    put("B", 131, 5)  # minor version
    put("Q", 140, dsdt_at)
    put("12s", 244, _io_register(pm.BASE + pm.SLEEP_CONTROL))
    put("12s", 256, _io_register(pm.BASE + pm.SLEEP_STATUS))
    put("8s", 268, _OEM_TABLE)  # hypervisor vendor identity
    return bytes(body)


def _madt(cpus: int) -> bytes:
    """Section 5.2.12 without its header.

    PCAT_COMPAT is clear: there is no 8259 to be seen. No interrupt source overrides: hardware-reduced systems have
    no ISA interrupts, and each device's own resources say edge, active high.
    """
    body = struct.pack("<II", LAPIC_BASE, 0)
    enabled = 1
    for cpu in range(min(cpus, 255)):
        body += struct.pack("<BBBBI", 0, 8, cpu, cpu, enabled)  # processor local APIC
    for cpu in range(255, cpus):
        body += struct.pack("<BBHIII", 9, 16, 0, cpu, enabled, cpu)  # processor local x2APIC
    body += struct.pack("<BBBBII", 1, 12, 0, 0, IOAPIC_BASE, 0)
    body += struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1)  # every local APIC's LINT1 is NMI
    if cpus > 255:
        body += struct.pack("<BBHIB3x", 0x0A, 12, 0, 0xFFFFFFFF, 1)
    return body


def dsdt(cpus: int, slots: Sequence[tuple[int, int]], uart: bool, base_gpa: int) -> bytes:
    """The definition block of the DSDT, without its header."""
    present = {slot for slot, _ in slots}
    described = sorted({*slots, *((slot, slot_gsi(slot)) for slot in HOTPLUG_SLOTS if slot not in present)})
    users = Counter(gsi for _, gsi in described)
    devices = [_cpu(n) for n in range(cpus)]
    devices += _present_slots(base_gpa + PRESENT_SLOTS, present)
    devices += [_virtio_mmio(slot, gsi, shared=users[gsi] > 1) for slot, gsi in described]
    if uart:
        devices.append(_uart())
    devices += [_rtc(), _power_button(), _motherboard(), _generation(base_gpa + GENERATION_ID), _event_device()]
    # \_S5: soft-off is entered by writing this value to SLP_TYP of the sleep control register (section 7.4.2).
    return aml.scope("\\_SB", *devices) + aml.name(
        "\\_S5", aml.package(aml.integer(pm.SLEEP_TYPE_S5), aml.ZERO, aml.ZERO, aml.ZERO)
    )


def _cpu(n: int) -> bytes:
    return aml.device(f"C{n:03X}", aml.name("_HID", aml.string("ACPI0007")), aml.name("_UID", aml.integer(n)))


def _virtio_mmio(slot: int, gsi: int, *, shared: bool) -> bytes:
    """LNRO0005 is the id under which Linux, and every other driver, finds virtio-mmio."""
    return aml.device(
        f"VR{slot:02X}",
        aml.name("_HID", aml.string("LNRO0005")),
        aml.name("_UID", aml.integer(slot)),
        *(_hotplug(slot) if slot in HOTPLUG_SLOTS else ()),
        aml.name("_CCA", aml.ONE),
        aml.name(
            "_CRS",
            aml.resources(
                aml.memory32_fixed(slot_address(slot), VIRTIO_MMIO_SIZE),
                aml.interrupt(gsi, shared=shared),
            ),
        ),
    )


def _present_slots(address: int, slots: Iterable[int]) -> list[bytes]:
    """SLTS, the slots that have a device, and SLTK, those of which Linux has been told."""
    known = struct.unpack("<I", present_slots(slots))[0]
    return [
        aml.operation_region_memory("SREG", address, 4),
        aml.field_dword("SREG", ("SLTS", 32)),
        aml.name("SLTK", aml.integer(known)),
    ]


def _hotplug(slot: int) -> tuple[bytes, ...]:
    """Whether there is a device, and what has Linux look again when it is told so.

    Linux acts on Notify for devices of its "scan handlers" alone, and virtio-mmio has none. The one of PRP0001 ("see
    _DSD") takes it: it makes a platform device where there is a ``compatible``, which _HID finds the driver for.
    """
    return (
        aml.name("_CID", aml.string("PRP0001")),
        aml.name("_DSD", aml.package(aml.buffer(_DEVICE_PROPERTIES), aml.package(_COMPATIBLE))),
        aml.method(
            "_STA",
            0,
            aml.if_(aml.bit_and(aml.name_string("\\_SB.SLTS"), aml.integer(1 << slot)), aml.return_(aml.integer(0xF))),
            aml.return_(aml.ZERO),
        ),
    )


# The UUID daffd814-6eba-4d8c-8a91-bc9bbf4aa301: device properties follow (section 6.2.5).
_DEVICE_PROPERTIES = bytes.fromhex("14d8ffdaba6e8c4d8a91bc9bbf4aa301")
_COMPATIBLE = aml.package(aml.string("compatible"), aml.string("virtio,mmio"))


def _uart() -> bytes:
    return aml.device(
        "COM1",
        aml.name("_HID", aml.eisa_id("PNP0501")),
        aml.name("_UID", aml.ZERO),
        aml.name("_CRS", aml.resources(aml.io_ports(UART_PORT, 8), aml.interrupt(UART_GSI))),
    )


def _rtc() -> bytes:
    """Without an interrupt, since core/rtc.py raises none: drivers then poll, instead of waiting in vain."""
    return aml.device(
        "RTC",
        aml.name("_HID", aml.eisa_id("PNP0B00")),
        aml.name("_CRS", aml.resources(aml.io_ports(RTC_PORT, rtc.SIZE))),
    )


def _power_button() -> bytes:
    return aml.device("PWRB", aml.name("_HID", aml.eisa_id("PNP0C0C")))


def _motherboard() -> bytes:
    """Keeps the registers of core/pm.py out of what the system hands to others."""
    return aml.device(
        "MBRD",
        aml.name("_HID", aml.eisa_id("PNP0C02")),
        aml.name("_CRS", aml.resources(aml.io_ports(pm.BASE, pm.SIZE))),
    )


def _generation(address: int) -> bytes:
    """The VM generation ID (Microsoft, "Virtual Machine Generation ID"): drivers match the compatible id."""
    low, high = address & 0xFFFF_FFFF, address >> 32
    return aml.device(
        "VGEN",
        aml.name("_HID", aml.string("MTRC0001")),
        aml.name("_CID", aml.string("VM_Gen_Counter")),
        aml.name("_DDN", aml.string("VM_Gen_Counter")),
        aml.name("ADDR", aml.package(aml.integer(low), aml.integer(high))),
    )


def _event_device() -> bytes:
    """The Generic Event Device (section 5.6.9): one interrupt, and a register that says what it was about."""
    return aml.device(
        "GED",
        aml.name("_HID", aml.string("ACPI0013")),
        aml.name("_UID", aml.ZERO),
        aml.name("_CRS", aml.resources(aml.interrupt(GED_GSI))),
        aml.operation_region_io("EREG", pm.BASE + pm.EVENT_STATUS, 4),
        aml.field_dword("EREG", ("ESTS", 32)),
        aml.method(
            "_EVT",
            1,
            aml.store(aml.name_string("ESTS"), aml.LOCAL0),  # reading clears it: read once
            aml.if_(aml.bit_and(aml.LOCAL0, aml.integer(pm.EVENT_POWER_BUTTON)), aml.notify("\\_SB.PWRB", 0x80)),
            aml.if_(aml.bit_and(aml.LOCAL0, aml.integer(pm.EVENT_GENERATION)), aml.notify("\\_SB.VGEN", 0x80)),
            aml.if_(aml.bit_and(aml.LOCAL0, aml.integer(pm.EVENT_SLOTS)), *_tell_slots()),
            serialized=True,
        ),
    )


def _tell_slots() -> list[bytes]:
    """A Device Check (section 5.6.6) for each slot that differs from what was told last. What is told is remembered in
    the guest, so nothing gets lost where an event stands for several changes."""
    present, known = aml.name_string("\\_SB.SLTS"), aml.name_string("\\_SB.SLTK")
    terms = [
        aml.store(present, aml.LOCAL1),
        aml.bit_xor(aml.LOCAL1, known, aml.LOCAL2),
        aml.store(aml.LOCAL1, known),
    ]
    for slot in HOTPLUG_SLOTS:
        changed = aml.bit_and(aml.LOCAL2, aml.integer(1 << slot))
        terms.append(aml.if_(changed, aml.notify(f"\\_SB.VR{slot:02X}", 1)))
    return terms
