"""The splitter: objects come out whole however their bytes fall, and bounds hold."""

from __future__ import annotations

import itertools
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motorcade.core.qmp.parser import Bad, Splitter

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
OBJECTS = st.lists(st.dictionaries(st.text(), JSON, max_size=4), max_size=6)


def feed(splitter: Splitter, data: bytes, cuts: list[int]) -> list[bytes | Bad]:
    """Feeds ``data`` in the pieces that ``cuts`` make of it."""
    edges = [0, *sorted(c % (len(data) + 1) for c in cuts), len(data)]
    return [item for a, b in itertools.pairwise(edges) for item in splitter.feed(data[a:b])]


@given(OBJECTS, st.sampled_from([b"", b"\n", b"\r\n", b"  \t"]), st.lists(st.integers(0, 1 << 20), max_size=20))
@settings(deadline=None)
def test_objects_come_out_as_they_went_in(objects: list[object], between: bytes, cuts: list[int]) -> None:
    encoded = [json.dumps(o, ensure_ascii=False).encode() for o in objects]
    splitter = Splitter()
    assert feed(splitter, between.join(encoded), cuts) == encoded
    assert splitter.pending == 0


@given(st.binary(max_size=400), st.lists(st.integers(0, 1 << 20), max_size=20))
@settings(deadline=None)
def test_pieces_make_no_difference(data: bytes, cuts: list[int]) -> None:
    limits = {"max_object": 60, "max_depth": 5}
    assert feed(Splitter(**limits), data, cuts) == feed(Splitter(**limits), data, [])


@given(st.lists(st.sampled_from([b'"', b"\\", b"{", b"}", b"[", b"]", b"a", b" ", b"\n", b"\xff"]), max_size=80))
@settings(deadline=None)
def test_structure_alone_breaks_nothing_and_a_reset_mends_it(parts: list[bytes]) -> None:
    splitter = Splitter(max_object=40, max_depth=4)
    list(splitter.feed(b"".join(parts)))
    assert splitter.pending <= 40
    assert list(splitter.feed(b'\xff{"a": 1}'))[-1] == b'{"a": 1}'


@pytest.mark.parametrize("piece", [1, 7, 4096, 1 << 30])
def test_a_string_of_ten_megabytes_is_refused_once_and_kept_nowhere(piece: int) -> None:
    if piece < 1000:
        size = 200_000
        splitter = Splitter(max_object=20_000)
    else:
        size = 10 << 20
        splitter = Splitter()
    data = b'{"execute": "' + b"x" * size + b'"}{"next": 1}'
    out: list[bytes | Bad] = []
    most = 0
    for at in range(0, len(data), piece):
        out.extend(splitter.feed(data[at : at + piece]))
        most = max(most, splitter.pending)
    assert [type(item) for item in out] == [Bad, bytes]
    assert out[1] == b'{"next": 1}'
    assert most <= 1 << 20


@pytest.mark.parametrize("opening", [b"[", b"{", b'{"a":', b'[{"a":['])
def test_deep_nesting_is_refused_once_and_the_next_object_is_read(opening: bytes) -> None:
    closing = b"".join({ord("["): b"]", ord("{"): b"}"}.get(c, b"") for c in reversed(opening))
    data = opening * 100_000 + closing * 100_000 + b'{"next": 1}'
    started = time.process_time()
    out = list(Splitter().feed(data))
    assert time.process_time() - started < 10  # linear: it takes a fraction of a second
    assert [type(item) for item in out] == [Bad, bytes]
    assert out[1] == b'{"next": 1}'


def test_depth_up_to_the_bound_is_fine() -> None:
    data = b"[" * 64 + b"]" * 64
    assert list(Splitter().feed(data)) == [data]
    out = list(Splitter().feed(b"[" + data + b"]"))
    assert isinstance(out[0], Bad)
    assert "64" in out[0].reason


def test_brackets_and_quotes_in_strings_are_text() -> None:
    data = rb'{"a": "}\"{[\\", "b": "\\\""}'
    assert feed(Splitter(), data * 2, list(range(len(data) * 2))) == [data] * 2


@pytest.mark.parametrize("junk", [b"hello\n", b"42 ", b"null\n", b"}}}\n", b"}\n", b'"text" '])
def test_what_is_no_object_is_reported_once(junk: bytes) -> None:
    out = list(Splitter().feed(junk + b'{"a": 1}'))
    assert [type(item) for item in out] == [Bad, bytes]


def test_a_refused_object_is_let_go_of_at_once() -> None:
    splitter = Splitter(max_object=100)
    assert list(splitter.feed(b'{"a": "' + b"x" * 80)) == []
    assert splitter.pending == 87
    assert [type(item) for item in splitter.feed(b"x" * 80)] == [Bad]
    assert splitter.pending == 0


def test_a_size_bound_holds_within_one_piece() -> None:
    splitter = Splitter(max_object=10)
    assert list(splitter.feed(b'{"a": 123}')) == [b'{"a": 123}']
    assert [type(i) for i in splitter.feed(b'{"a": 1234}{"b": 1}')] == [Bad, bytes]
