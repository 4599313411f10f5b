"""Ethernet frames by hand, as a guest's network stack would build them."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

GUEST_MAC = bytes.fromhex("52540012fe01")
BROADCAST = b"\xff" * 6
TCP, UDP, ICMP = 6, 17, 1
FIN, SYN, RST, PSH, ACK, ECE, CWR = 1, 2, 4, 8, 16, 64, 128


def checksum(data: bytes, start: int = 0) -> int:
    """RFC 1071; 0 over data that contains its own valid checksum."""
    if len(data) % 2:
        data += b"\0"
    total: int = start + sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def pseudo(source: bytes, target: bytes, protocol: int, length: int) -> int:
    """The sum (not inverted) of the pseudo header, as a driver leaves it for NEEDS_CSUM."""
    return ~checksum(source + target + struct.pack("!II", length, protocol)) & 0xFFFF


def ethernet(target: bytes, source: bytes, ethertype: int, payload: bytes) -> bytes:
    """A frame."""
    return target + source + struct.pack("!H", ethertype) + payload


def arp_request(source_mac: bytes, source: str, target: str) -> bytes:
    """Who has ``target``?"""
    body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1)
    body += source_mac + IPv4Address(source).packed + bytes(6) + IPv4Address(target).packed
    return ethernet(BROADCAST, source_mac, 0x0806, body)


def ipv4(source: str, target: str, protocol: int, payload: bytes, ident: int = 0) -> bytes:
    """A packet with a valid header checksum."""
    addresses = IPv4Address(source).packed + IPv4Address(target).packed
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), ident, 0x4000, 64, protocol, 0)
    return head[:10] + struct.pack("!H", checksum(head + addresses)) + addresses + payload


def ipv6(source: str, target: str, protocol: int, payload: bytes) -> bytes:
    """A packet without extension headers."""
    head = struct.pack("!IHBB", 6 << 28, len(payload), protocol, 64)
    return head + IPv6Address(source).packed + IPv6Address(target).packed + payload


def udp(source: str, target: str, sport: int, dport: int, data: bytes, *, partial: bool = False) -> bytes:
    """IPv4 and UDP; ``partial``: the checksum field holds the pseudo header's sum (csum_start 34, csum_offset 6)."""
    length = 8 + len(data)
    part = pseudo(IPv4Address(source).packed, IPv4Address(target).packed, UDP, length)
    head = struct.pack("!HHH", sport, dport, length)
    value = part if partial else checksum(head + b"\0\0" + data, part)
    return ipv4(source, target, UDP, head + struct.pack("!H", value) + data)


def tcp_segment(
    source: bytes, target: bytes, sport: int, dport: int, seq: int, ack: int, flags: int, data: bytes, partial: bool
) -> bytes:
    """A TCP header without options, and data."""
    head = struct.pack("!HHIIBBH", sport, dport, seq & 0xFFFFFFFF, ack & 0xFFFFFFFF, 0x50, flags, 0xFFFF)
    part = pseudo(source, target, TCP, 20 + len(data))
    value = part if partial else checksum(head + bytes(4) + data, part)
    return head + struct.pack("!HH", value, 0) + data


def tcp4(
    source: str,
    target: str,
    sport: int,
    dport: int,
    seq: int,
    ack: int,
    flags: int,
    data: bytes = b"",
    *,
    partial: bool = False,
) -> bytes:
    """IPv4 and TCP; ``partial`` as in ``udp`` (csum_start 34, csum_offset 16)."""
    s, t = IPv4Address(source).packed, IPv4Address(target).packed
    return ipv4(source, target, TCP, tcp_segment(s, t, sport, dport, seq, ack, flags, data, partial), ident=7)


@dataclass
class Tcp4:
    """A received IPv4 TCP frame, taken apart. ``valid``: both checksums are complete and right."""

    sport: int
    dport: int
    seq: int
    ack: int
    flags: int
    data: bytes
    ident: int
    valid: bool

    @classmethod
    def parse(cls, frame: bytes) -> Tcp4 | None:
        """None: it is something else."""
        if frame[12:14] != b"\x08\x00" or frame[23] != TCP:
            return None
        ip = frame[14:]
        size = (ip[0] & 15) * 4
        total = int.from_bytes(ip[2:4], "big")
        segment = ip[size:total]
        sport, dport, seq, ack, offset, flags = struct.unpack("!HHIIBB", segment[:14])
        whole = checksum(segment, pseudo(ip[12:16], ip[16:20], TCP, len(segment))) == 0 and checksum(ip[:size]) == 0
        data = segment[(offset >> 4) * 4 :]
        return cls(sport, dport, seq, ack, flags, data, int.from_bytes(ip[4:6], "big"), whole)


def udp_payload(frame: bytes, dport: int) -> bytes | None:
    """What an IPv4 UDP frame for this port carries; None for other frames."""
    if frame[12:14] != b"\x08\x00" or frame[23] != UDP or int.from_bytes(frame[36:38], "big") != dport:
        return None
    return frame[42 : 34 + int.from_bytes(frame[38:40], "big")]
