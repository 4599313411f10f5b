"""The codec: everything legal survives a round trip, nothing illegal gets through or raises anything but Malformed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.messages import BOOTS, LIVES, MESSAGES
from motorcade.proto import schema, versions
from motorcade.proto.schema import Error, ErrorCode, Hello, Malformed, Message, Ok

HELLO = Hello(1, "disk0", 42, 2, 1 << 40, (256, 128), b"\x01\x02")
SOME = [
    schema.encode(Message(1, 5000, HELLO)),
    schema.encode(Message(2, 0, Error(ErrorCode.STATE, "not now"))),
    schema.encode(Message(3, 100, schema.Activate(1 << 32, (schema.Queue(0, 256, 4096, 8192, 12288),)))),
    schema.encode(
        Message(4, 0, schema.StatsReport((schema.QueueStats(0, 1, 2, 3, 4, 5, 6, 7),), (schema.Counter("a", 1),)))
    ),
]


@given(MESSAGES)
@settings(deadline=None)
def test_control_messages_survive_a_round_trip(message: Message) -> None:
    assert schema.decode(schema.encode(message)) == message


@given(BOOTS)
@settings(max_examples=50, deadline=None)
def test_boots_survive_a_round_trip(boot: schema.Boot) -> None:
    assert schema.decode_boot(schema.encode_boot(boot)) == boot


@given(LIVES)
@settings(deadline=None)
def test_life_survives_a_round_trip(life: schema.Life) -> None:
    assert schema.decode_life(schema.encode_life(life)) == life


@given(st.binary(max_size=512))
@settings(deadline=None)
def test_arbitrary_bytes_are_malformed_or_a_message(data: bytes) -> None:
    for decode in (schema.decode, schema.decode_boot, schema.decode_life):
        try:
            decode(data)
        except Malformed:
            continue


@given(st.sampled_from(SOME), st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=12))
@settings(deadline=None)
def test_mutated_messages_are_malformed_or_a_message(data: bytes, changes: list[tuple[int, int]]) -> None:
    buffer = bytearray(data)
    for where, value in changes:
        buffer[where % len(buffer)] = value
    try:
        result = schema.decode(bytes(buffer))
    except Malformed:
        return
    assert schema.decode(schema.encode(result)) == result


@pytest.mark.parametrize("data", SOME)
def test_truncated_messages_are_refused(data: bytes) -> None:
    for length in range(len(data)):
        with pytest.raises(Malformed):
            schema.decode(data[:length])


def test_too_long_a_frame_is_refused_before_it_is_read() -> None:
    with pytest.raises(Malformed, match="at most"):
        schema.decode(bytes(schema.MAX_CONTROL_BYTES + 8))


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (dataclasses.replace(HELLO, device_id="x" * 65), "deviceId"),
        (dataclasses.replace(HELLO, device_id="é" * 33), "deviceId"),  # 66 bytes in 33 characters
        (dataclasses.replace(HELLO, config=bytes(schema.MAX_CONFIG + 1)), "config"),
        (dataclasses.replace(HELLO, queue_sizes=(1,) * (schema.MAX_QUEUES + 1)), "queueSizes"),
        (dataclasses.replace(HELLO, config_kinds=b"\1\3"), "kinds"),
        (dataclasses.replace(HELLO, config_kinds=b"\1\2\0"), "kinds"),
        (dataclasses.replace(HELLO, queue_sizes=(3,)), "power of two"),
        (dataclasses.replace(HELLO, queue_sizes=(0,)), "power of two"),
        (dataclasses.replace(HELLO, pid=1 << 32), "out-of-range"),
        (schema.ConfigWrite(0, bytes(schema.MAX_CONFIG + 1)), "data"),
        (schema.NeedsReset(0, "x" * 5000), "reason"),
    ],
)
def test_bounds_hold_when_sending(body: schema.Body, what: str) -> None:
    with pytest.raises(ValueError, match=f"(?i){what}"):
        schema.encode(Message(1, 0, body))


@pytest.mark.parametrize(
    ("fill", "what"),
    [
        (lambda m: m.init("hello").init("queueSizes", 65), "queueSizes has 65"),
        (lambda m: setattr(m.init("hello"), "deviceId", "x" * 100), "deviceId has 100"),
        (lambda m: setattr(m.init("hello"), "config", bytes(300)), "config has 300"),
        (lambda m: m.init("activate").init("queues", 100), "queues has 100"),
        (lambda m: m.init("activate").init("queues", 1), "not a power of two"),
        (lambda m: m.init("statsReport").init("detail", 1000), "detail has 1000"),
        (lambda m: setattr(m.init("configChanged"), "data", bytes(400)), "data has 400"),
    ],
)
def test_bounds_hold_when_receiving(fill: Any, what: str) -> None:
    """From a peer that has no such bounds: built with the schema itself."""
    builder = schema._control.Message.new_message()
    fill(builder)
    with pytest.raises(Malformed, match=what):
        schema.decode(builder.to_bytes())


def test_enumerant_and_member_of_a_newer_peer_are_refused() -> None:
    data = bytearray(SOME[1])
    code = data.index(schema._CODES.index(ErrorCode.STATE), 40)
    data[code] = 200
    with pytest.raises(Malformed, match="error code 200"):
        schema.decode(bytes(data))
    tags = bytearray(schema.encode(Message(1, 0, Ok())))
    refused = 0
    for offset in range(8, len(tags)):
        changed = bytearray(tags)
        changed[offset] = 77
        try:
            schema.decode(bytes(changed))
        except Malformed:
            refused += 1
    assert refused


def test_amplification_is_cut_off() -> None:
    """A list whose elements have no size claims half a billion of them in 8 bytes."""
    builder = schema._control.Message.new_message()
    builder.init("activate").init("queues", 1)
    data = bytearray(builder.to_bytes())
    # The list pointer of `queues`: element size 0 (void) and the largest count.
    for at in range(8, len(data), 8):
        changed = bytearray(data)
        changed[at : at + 8] = ((0x1FFFFFFF << 35) | 1).to_bytes(8, "little")
        with pytest.raises(Malformed):
            schema.decode(bytes(changed))


def test_an_answer_of_any_length_fits_its_bound() -> None:
    """The largest report that the bounds allow can be sent."""
    report = schema.StatsReport(
        tuple(schema.QueueStats(i, latency=((1 << 64) - 1,) * 64) for i in range(schema.MAX_QUEUES)),
        tuple(schema.Counter("n" * 64, (1 << 64) - 1) for _ in range(128)),
    )
    assert schema.decode(schema.encode(Message(1, 0, report))).body == report


@pytest.mark.parametrize("offered", [versions.PROTOCOL_VERSION, versions.PROTOCOL_VERSION + 5])
def test_newer_peers_get_our_version(offered: int) -> None:
    assert versions.negotiate(offered) == versions.PROTOCOL_VERSION


def test_too_old_a_peer_is_refused() -> None:
    with pytest.raises(versions.VersionMismatch, match="version 0"):
        versions.negotiate(0)
