"""ACPI Machine Language, as much of it as our DSDT needs (ACPI 6.5, chapter 20; resources: section 6.4).

Each function gives the encoded bytes of one term, so that a table is an expression which reads like its ASL.
"""

from __future__ import annotations

import re
import struct

ZERO = b"\x00"
ONE = b"\x01"
LOCAL0, LOCAL1, LOCAL2 = b"\x60", b"\x61", b"\x62"

_NAME_SEG = re.compile("[A-Z_][A-Z0-9_]{0,3}")
_SMALL = {0: b"\x00", 1: b"\x01"}


def name_string(path: str) -> bytes:
    """A NameString: ``path`` is a NameSeg of up to four characters, or ``\\`` and several joined by dots."""
    root = b""
    if path.startswith("\\"):
        root, path = b"\\", path[1:]
    segments = path.split(".") if path else []
    encoded = []
    for segment in segments:
        if not _NAME_SEG.fullmatch(segment):
            raise ValueError(f"{segment!r} is not an ACPI name")
        encoded.append(segment.ljust(4, "_").encode("ascii"))
    if len(encoded) == 2:
        return root + b"\x2e" + b"".join(encoded)
    if len(encoded) > 2:
        return root + b"\x2f" + bytes([len(encoded)]) + b"".join(encoded)
    return root + (encoded[0] if encoded else b"\x00")


def integer(value: int) -> bytes:
    """The shortest encoding of an integer of at most 64 bits."""
    if value in _SMALL:
        return _SMALL[value]
    for prefix, form, bits in ((0x0A, "<B", 8), (0x0B, "<H", 16), (0x0C, "<I", 32), (0x0E, "<Q", 64)):
        if 0 <= value < 1 << bits:
            return bytes([prefix]) + struct.pack(form, value)
    raise ValueError(f"{value} does not fit in 64 bits")


def string(value: str) -> bytes:
    """A string of ASCII characters, none of them NUL."""
    data = value.encode("ascii")
    if b"\0" in data:
        raise ValueError("an AML string cannot hold a NUL")
    return b"\x0d" + data + b"\x00"


def eisa_id(text: str) -> bytes:
    """The EISAID macro (section 19.3.4): three letters and four hex digits packed into 32 bits."""
    if len(text) != 7 or not text[:3].isalpha() or not text[:3].isupper():
        raise ValueError(f"{text!r} is not an EISA id")
    packed = 0
    for c in text[:3]:
        packed = packed << 5 | (ord(c) - 0x40)
    packed = packed << 16 | int(text[3:], 16)
    return b"\x0c" + packed.to_bytes(4, "big")


def package_length(body: int) -> bytes:
    """PkgLength (section 20.2.4) of a package of ``body`` bytes; it counts itself."""
    if body + 1 < 1 << 6:
        return bytes([body + 1])
    for extra in (1, 2, 3):
        total = body + 1 + extra
        if total < 1 << (4 + 8 * extra):
            return bytes([extra << 6 | total & 0xF]) + (total >> 4).to_bytes(extra, "little")
    raise ValueError(f"an AML package of {body} bytes")


def _sized(opcode: bytes, body: bytes) -> bytes:
    return opcode + package_length(len(body)) + body


def name(path: str, value: bytes) -> bytes:
    """Name (path, value)."""
    return b"\x08" + name_string(path) + value


def package(*elements: bytes) -> bytes:
    """Package () { elements }."""
    return _sized(b"\x12", bytes([len(elements)]) + b"".join(elements))


def scope(path: str, *terms: bytes) -> bytes:
    """Scope (path) { terms }."""
    return _sized(b"\x10", name_string(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    """Device (path) { terms }."""
    return _sized(b"\x5b\x82", name_string(path) + b"".join(terms))


def method(path: str, args: int, *terms: bytes, serialized: bool = False) -> bytes:
    """Method (path, args, Serialized or not) { terms }."""
    return _sized(b"\x14", name_string(path) + bytes([args | serialized << 3]) + b"".join(terms))


def operation_region_io(path: str, base: int, size: int) -> bytes:
    """OperationRegion (path, SystemIO, base, size)."""
    return b"\x5b\x80" + name_string(path) + b"\x01" + integer(base) + integer(size)


def operation_region_memory(path: str, base: int, size: int) -> bytes:
    """OperationRegion (path, SystemMemory, base, size)."""
    return b"\x5b\x80" + name_string(path) + b"\x00" + integer(base) + integer(size)


def field_dword(region: str, *units: tuple[str, int]) -> bytes:
    """Field (region, DWordAcc, NoLock, WriteAsZeros) { (name, bits), ... }."""
    body = name_string(region) + bytes([0x03 | 2 << 5])
    for unit, bits in units:
        body += name_string(unit) + package_length_of_field(bits)
    return _sized(b"\x5b\x81", body)


def package_length_of_field(bits: int) -> bytes:
    """A field's width, which is encoded as a PkgLength that does not count itself."""
    if bits < 1 << 6:
        return bytes([bits])
    return bytes([1 << 6 | bits & 0xF, bits >> 4])


def store(source: bytes, target: bytes) -> bytes:
    """Store (source, target)."""
    return b"\x70" + source + target


def bit_and(a: bytes, b: bytes) -> bytes:
    """And (a, b), the result used in place."""
    return b"\x7b" + a + b + ZERO


def bit_xor(a: bytes, b: bytes, target: bytes = ZERO) -> bytes:
    """XOr (a, b, target)."""
    return b"\x7f" + a + b + target


def return_(value: bytes) -> bytes:
    """Return (value)."""
    return b"\xa4" + value


def if_(predicate: bytes, *terms: bytes) -> bytes:
    """If (predicate) { terms }."""
    return _sized(b"\xa0", predicate + b"".join(terms))


def notify(path: str, value: int) -> bytes:
    """Notify (path, value)."""
    return b"\x86" + name_string(path) + integer(value)


def buffer(data: bytes) -> bytes:
    """Buffer () { data }."""
    return _sized(b"\x11", integer(len(data)) + data)


def resources(*descriptors: bytes) -> bytes:
    """ResourceTemplate () { descriptors } with its end tag; a checksum of 0 means that there is none."""
    return buffer(b"".join(descriptors) + b"\x79\x00")


def memory32_fixed(base: int, size: int) -> bytes:
    """Memory32Fixed (ReadWrite, base, size) (section 6.4.3.4)."""
    return struct.pack("<BHBII", 0x86, 9, 1, base, size)


def io_ports(base: int, size: int) -> bytes:
    """IO (Decode16, base, base, 1, size) (section 6.4.2.5)."""
    return struct.pack("<BBHHBB", 0x47, 1, base, base, 1, size)


def interrupt(gsi: int, *, shared: bool = False) -> bytes:
    """Interrupt (ResourceConsumer, Edge, ActiveHigh, Shared or Exclusive) { gsi } (section 6.4.3.6)."""
    consumer, edge = 1, 1 << 1
    return struct.pack("<BHBBI", 0x89, 6, consumer | edge | shared << 3, 1, gsi)
