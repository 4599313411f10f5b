"""A template's state file: what is written is read again; anything else is refused with a reason."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motorcade.proto import template
from motorcade.proto.template import CHUNK, Component, Cpu, Parent, Template, TemplateError

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
HEADER = 64


def _load_make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_make", GOLDEN / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SAMPLE: Template = _load_make().sample()


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("state", os.MFD_CLOEXEC)
    yield made
    os.close(made)


def put(fd: int, data: bytes) -> int:
    os.ftruncate(fd, 0)
    os.pwrite(fd, data, 0)
    return fd


def sealed(body: bytes, version: int = 1, length: int | None = None) -> bytes:
    """A file whose checksums are right, whatever is in it."""
    size = len(body) if length is None else length
    header = struct.pack("<8sIIQ36x", template.MAGIC, version, zlib.crc32(body), size)
    return header + struct.pack("<I", zlib.crc32(header)) + body


def refused(fd: int, data: bytes) -> str:
    """Why the file is refused, in every way of reading it."""
    put(fd, data)
    said = []
    for read in (template.read, template.read_description, lambda _fd: template.decode(data)):
        with pytest.raises(TemplateError) as e:
            read(fd)
        said.append(str(e.value))
    assert said[0] == said[2]
    return said[0]


# Round trips.


def test_what_is_written_is_read_again(fd: int) -> None:
    data = template.encode(SAMPLE)
    assert template.read(put(fd, data)) == SAMPLE
    assert template.decode(data) == SAMPLE
    assert template.read_description(fd) == SAMPLE.description
    assert SAMPLE.component("vcpu.1") == SAMPLE.components[3]
    assert SAMPLE.component("vcpu.2") is None
    assert [c.kind for c in SAMPLE.components[2:5]] == ["vcpu", "vcpu", "uart"]
    assert os.lseek(fd, 0, os.SEEK_CUR) == 0


def test_equal_templates_have_equal_bytes_and_one_identity(fd: int) -> None:
    data = template.encode(SAMPLE)
    assert template.encode(dataclasses.replace(SAMPLE)) == data
    first = template.identity(put(fd, data))
    assert len(first) == template.IDENTITY_SIZE
    assert template.identity(fd) == first
    other = dataclasses.replace(SAMPLE, disks="[]")
    assert template.identity(put(fd, template.encode(other))) != first


_NAMES = st.from_regex(r"\A[a-z]{1,8}(\.[A-Za-z0-9][-_.A-Za-z0-9]{0,20})?\Z")
_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@st.composite
def templates(draw: st.DrawFn) -> Template:
    size = 4096 * draw(st.integers(1, 600))
    parents = draw(st.lists(st.builds(Parent, st.just("/a/b"), st.binary(min_size=32, max_size=32)), max_size=4))
    has_memory = draw(st.booleans())
    chunks = template.chunk_count(size) if has_memory else 0
    layers = bytes(draw(st.lists(st.integers(0, len(parents) + 1), min_size=chunks, max_size=chunks)))
    names = draw(st.lists(_NAMES, unique=True, max_size=8))
    numbers = st.integers(0, 2**32 - 1)
    return Template(
        description=draw(_TEXT),
        cpu=Cpu(bytes(40 * draw(st.integers(0, 9))), tuple(draw(st.lists(numbers, max_size=9))), draw(numbers)),
        memory_size=size,
        layers=layers,
        sums=draw(st.binary(min_size=4 * chunks, max_size=4 * chunks)),
        parents=tuple(parents) if has_memory else (),
        disks=draw(_TEXT),
        components=tuple(Component(n, draw(st.integers(1, 65535)), draw(st.binary(max_size=99))) for n in names),
    )


@given(templates())
@settings(deadline=None)
def test_every_template_survives_a_round_trip(one: Template) -> None:
    assert template.decode(template.encode(one)) == one


def test_a_state_without_memory_knows_its_size(fd: int) -> None:
    bare = dataclasses.replace(SAMPLE, layers=b"", sums=b"", parents=())
    assert not bare.has_memory
    again = template.read(put(fd, template.encode(bare)))
    assert again == bare
    assert again.memory_size == SAMPLE.memory_size


def test_the_largest_machine_s_state_is_read(fd: int) -> None:
    chunks = template.chunk_count(template.MAX_MEMORY)
    large = dataclasses.replace(SAMPLE, memory_size=template.MAX_MEMORY, layers=bytes(chunks), sums=bytes(4 * chunks))
    assert template.read(put(fd, template.encode(large))) == large


# Versions.


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("template-*.state")), ids=lambda p: p.name)
def test_templates_of_every_version_are_read(path: Path, fd: int) -> None:
    assert template.read(put(fd, path.read_bytes())) == SAMPLE


def test_the_present_version_writes_its_golden_bytes() -> None:
    golden = GOLDEN / f"template-{template.VERSION}.state"
    assert template.encode(SAMPLE) == golden.read_bytes(), "the format changed: raise VERSION (tests/golden/make.py)"


def test_a_newer_format_is_named_and_not_called_damaged(fd: int) -> None:
    said = refused(fd, sealed(b"what the future holds", version=7))
    assert said == "its format is version 7, newer than this program, which reads up to 1"
    assert "not one of format version" in refused(fd, sealed(b"", version=0))


# Damage.


def test_other_files_are_no_templates(fd: int) -> None:
    for data in (b"", b"x", b"\x7fELF" + bytes(100), template.encode(SAMPLE)[1:], bytes(4096)):
        assert refused(fd, data) == "not a template's state"
    text_mode = template.encode(SAMPLE).replace(b"\r\n", b"\n")
    assert refused(fd, text_mode) == "not a template's state"


def test_truncated_at_every_byte(fd: int) -> None:
    data = template.encode(SAMPLE)
    for length in range(1, len(data)):
        said = refused(fd, data[:length])
        assert said.startswith(f"the state is truncated at {length}")


def test_truncated_at_every_4_kib_of_a_large_one(fd: int) -> None:
    size = 2048 * CHUNK
    large = dataclasses.replace(
        SAMPLE,
        memory_size=size,
        layers=b"\1" * 2048,
        sums=os.urandom(4 * 2048),
        components=tuple(Component(f"vcpu.{n}", 1, os.urandom(9000)) for n in range(8)),
    )
    data = template.encode(large)
    assert len(data) > 80000
    for length in range(4096, len(data), 4096):
        assert refused(fd, data[:length]) == f"the state is truncated at {length} bytes of {len(data)}"


def test_one_flipped_bit_anywhere_is_found(fd: int) -> None:
    data = bytearray(template.encode(SAMPLE))
    for at in range(len(data)):
        bit = 1 << at % 8
        data[at] ^= bit
        said = refused(fd, bytes(data))
        if at < 8:
            assert said == "not a template's state"
        elif at < HEADER:
            assert said == "the state's header is damaged"
        else:
            assert said == "the state is damaged: its checksum is wrong"
        data[at] ^= bit


def test_bytes_behind_the_end_are_refused(fd: int) -> None:
    assert refused(fd, template.encode(SAMPLE) + b"abc") == "the state has 3 bytes behind its end"


def test_an_absurd_length_is_refused_before_anything_is_read(fd: int) -> None:
    assert "not one of format version 1" in refused(fd, sealed(b"", length=1 << 60))


def test_reserved_bytes_of_the_header_must_be_zero(fd: int) -> None:
    data = bytearray(template.encode(SAMPLE))
    data[40] = 1
    data[60:64] = struct.pack("<I", zlib.crc32(data[:60]))
    assert "not one of format version 1" in refused(fd, bytes(data))


# Bytes that somebody made on purpose: the checksums are right.


def test_flipped_bits_under_right_checksums_never_do_more_than_raise_templateerror() -> None:
    body = bytearray(template.encode(SAMPLE)[HEADER:])
    for at in range(len(body)):
        for bit in (1, 0x80):
            body[at] ^= bit
            try:
                one = template.decode(sealed(bytes(body)))
            except TemplateError:
                pass
            else:
                assert template.decode(template.encode(one)) == one
            body[at] ^= bit


def test_truncated_bodies_under_right_checksums_are_malformed(fd: int) -> None:
    body = template.encode(SAMPLE)[HEADER:]
    for length in range(0, len(body), 8):
        assert refused(fd, sealed(body[:length])).startswith("the state is malformed")


@given(st.binary(max_size=300))
@settings(deadline=None)
def test_any_body_is_malformed_or_a_template(body: bytes) -> None:
    try:
        template.decode(sealed(body))
    except TemplateError:
        return


def hostile(one: Template) -> bytes:
    """The bytes of a template that ``encode`` would not write."""
    body = template._schema.new_message()
    body.description, body.disks, body.memorySize = one.description, one.disks, one.memory_size
    body.layers, body.sums = one.layers, one.sums
    body.cpu.cpuid, body.cpu.msrs, body.cpu.xsaveSize = one.cpu.cpuid, list(one.cpu.msrs), one.cpu.xsave_size
    for to, parent in zip(body.init("parents", len(one.parents)), one.parents, strict=True):
        to.path, to.identity = parent.path, parent.identity
    for to, component in zip(body.init("components", len(one.components)), one.components, strict=True):
        to.name, to.version, to.data = component.name, component.version, component.data
    return sealed(body.to_bytes())


def test_what_the_hostile_ones_are_made_with_is_right() -> None:
    assert template.decode(hostile(SAMPLE)) == SAMPLE


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"memory_size": 0}, "the memory's size is 0"),
        ({"memory_size": 8 * CHUNK - 1}, "the memory's size is 524287"),
        ({"memory_size": 1 << 41}, "the memory's size is"),
        ({"memory_size": 9 * CHUNK}, "8 layers for 9 chunks"),
        ({"layers": bytes(7)}, "7 layers for 8 chunks"),
        ({"layers": bytes([0, 1, 2, 4, 0, 0, 0, 0])}, "a chunk of memory is in layer 4, but there are 2 parents"),
        ({"layers": b"\xff" * 8}, "in layer 255"),
        ({"sums": bytes(31)}, "31 bytes of checksums for 8 chunks"),
        ({"sums": b""}, "0 bytes of checksums for 8 chunks"),
        ({"layers": b""}, "it has parents, but no memory"),
        ({"layers": b"", "parents": ()}, "32 bytes of checksums for 0 chunks"),
        ({"parents": (Parent("base", bytes(32)),) * 2}, "path 'base' is not absolute"),
        ({"parents": (Parent("/a\0b", bytes(32)),) * 2}, "is not absolute"),
        ({"parents": (Parent("/a", bytes(31)),) * 2}, "the identity of parent /a has 31 bytes"),
        ({"parents": (Parent("/a", bytes(32)),) * 63}, "parents has 63 elements"),
        ({"components": (Component("pm", 1, b""),) * 2}, "component pm is there twice"),
        ({"components": (Component("", 1, b""),)}, "a component is called ''"),
        ({"components": (Component("../x", 1, b""),)}, "a component is called"),
        ({"components": (Component("pm", 0, b""),)}, "component pm has version 0"),
        ({"cpu": Cpu(bytes(41), (), 0)}, "41 bytes, no whole number of entries"),
    ],
)
def test_what_does_not_agree_is_refused(fd: int, fields: dict[str, Any], why: str) -> None:
    put(fd, hostile(dataclasses.replace(SAMPLE, **fields)))
    with pytest.raises(TemplateError) as e:
        template.read(fd)
    assert str(e.value).startswith("the state is malformed: ")
    assert why in str(e.value)
    with pytest.raises(ValueError):
        template.encode(dataclasses.replace(SAMPLE, **fields))
