"""The trace file, read back: whole JSON, every slice closed, names and times as they were."""

from __future__ import annotations

import io
import json
from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from motorcade.orchestrator.perfetto import Writer
from motorcade.orchestrator.traceclient import Happened, Item, Lost, Note
from motorcade.proto.tap import Said
from motorcade.proto.watch import NO_QUEUE, Event, Kind

PROCESSES = {"core": ("core", 100), "root": ("blk-root", 101)}


def written(*items: Item) -> dict[str, Any]:
    """The file's JSON."""
    file = io.StringIO()
    writer = Writer(file, "web", 1_000_000, PROCESSES)
    for item in items:
        writer.add(item)
    writer.close()
    result: dict[str, Any] = json.loads(file.getvalue())
    return result


def event(kind: int, ns: int, head: int = 3, length: int = 512, arg: int = 0, queue: int = 0) -> Happened:
    return Happened("root", Event(0, ns, kind, queue, head, length, arg))


def balanced(trace: dict[str, Any]) -> bool:
    """As many ends as beginnings, of each slice."""
    phases = Counter((e["ph"], e["cat"], e["id"], e["name"], e["pid"]) for e in trace["traceEvents"] if e["ph"] in "be")
    return all(phases["b", *key[1:]] == phases["e", *key[1:]] for key in phases)


def test_a_request_and_what_the_host_did_for_it() -> None:
    trace = written(
        event(Kind.KICK, 1_000_500, head=0),
        event(Kind.TAKE, 1_001_000, length=16, arg=513),
        event(Kind.SUBMIT, 1_002_000, arg=4096),
        event(Kind.COMPLETE, 1_052_000, arg=512),
        event(Kind.PUSH, 1_053_000, length=513, arg=52_000),
        event(Kind.TAKE, 1_060_000),
        event(Kind.SUBMIT, 1_061_000, head=0xFFFF, length=0, queue=NO_QUEUE),
    )
    events = trace["traceEvents"]
    names = {(e["pid"], e["args"]["name"]) for e in events if e["ph"] == "M"}
    assert names >= {(101, "blk-root (web)"), (100, "core (web)"), (101, "queue 0"), (101, "host")}
    first, io_begin, io_end, end = [e for e in events if e["ph"] in "be"][:4]
    assert (first["name"], first["ts"], first["pid"], first["tid"]) == ("request", 1.0, 101, 1)
    assert (io_begin["name"], io_begin["id"]) == ("host I/O", first["id"])
    assert io_begin["args"] == {"offset": 4096, "bytes": 512}
    assert (io_end["ts"], io_end["args"]) == (52.0, {"result": 512})
    assert (end["ts"], end["args"]) == (53.0, {"to guest": 513, "took ns": 52_000})
    assert [e["name"] for e in events if e["ph"] == "i"] == ["kick"]
    assert balanced(trace)
    assert [e["args"] for e in events if e["ph"] == "e"][-2:] == [{"unfinished": True}] * 2


def test_control_messages_are_slices_from_question_to_answer() -> None:
    trace = written(
        Said(1_001_000, "root", True, 5, "Quiesce", {}),
        Said(1_001_500, "root", False, 0, "NeedsReset", {"queue": 1}),
        Said(1_009_000, "root", False, 5, "Ok", {}),
        Said(1_010_000, "root", False, 6, "Ok", {}),
    )
    begin, end = [e for e in trace["traceEvents"] if e["ph"] in "be"]
    assert (begin["name"], end["name"], end["ts"], end["args"]) == ("Quiesce", "Quiesce", 9.0, {"answer": "Ok"})
    assert [(e["name"], e["args"]) for e in trace["traceEvents"] if e["ph"] == "i"] == [("NeedsReset", {"queue": 1})]


def test_what_was_lost_is_in_the_file() -> None:
    trace = written(event(Kind.PUSH, 2_000_000), Lost("root", 7), Note("root", 2_000_001, "killed by SIGKILL"))
    assert trace["otherData"] == {"lost events": {"root": 7}}
    assert [e["name"] for e in trace["traceEvents"] if e["ph"] == "i"] == ["7 events lost", "killed by SIGKILL"]
    assert balanced(trace)


NUMBERS = st.integers(0, (1 << 64) - 1)
HOSTILE = st.builds(
    lambda kind, ns, head, length, arg, queue: event(kind, ns, head, length, arg, queue),
    st.integers(0, 255),
    NUMBERS,
    st.integers(0, 0xFFFF),
    st.integers(0, 0xFFFFFFFF),
    st.integers(-(1 << 63), (1 << 63) - 1),
    st.integers(0, 255),
)


@given(st.lists(HOSTILE, max_size=30))
def test_whatever_a_sidecar_writes_the_file_is_whole(items: list[Happened]) -> None:
    assert balanced(written(*items))
