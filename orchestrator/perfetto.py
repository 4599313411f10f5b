"""A trace in the Chrome JSON format, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

Chosen over Perfetto's own protobuf: anybody can read it back, in any language, without a schema; a file that was cut
off is still opened; and what we record needs no more than slices and instants ("Trace Event Format", Google).

A sidecar is a process, each of its queues a thread. A request is an asynchronous slice from its being taken to its
being answered, and what the host did for it are slices in that one; control messages are slices of the process, from
the question to the answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import IO, Any

from motorcade.orchestrator.traceclient import Happened, Item, Lost, Note
from motorcade.proto import tap, watch
from motorcade.proto.watch import Kind

CONTROL_THREAD = 1000  # of each process; queues are 1 and up
HOST_THREAD = 1001  # what is done for no queue's sake


class Writer:
    """Writes while events come; ``close`` completes the file."""

    def __init__(self, file: IO[str], vm: str, start: int, processes: Mapping[str, tuple[str, int]]) -> None:
        """``file`` stays the caller's. ``start``: CLOCK_MONOTONIC in ns, the trace's zero. ``processes``: role and pid
        by device, "core" among them."""
        self._file, self._start = file, start
        self._pids = {device: pid for device, (_, pid) in processes.items()}
        self._threads: set[tuple[int, int]] = set()
        self._open: dict[tuple[str, str, object], tuple[str, int, int, str]] = {}  # slices that have begun
        self._requests: dict[tuple[str, int, int], int] = {}  # the number of the request that a head stands for
        self._serial = 0
        self._latest = start
        self._lost: dict[str, int] = {}
        self._first = True
        file.write('{"displayTimeUnit":"ns","traceEvents":[\n')
        for role, pid in processes.values():
            self._write({"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": f"{role} ({vm})"}})

    def _write(self, event: dict[str, Any]) -> None:
        if not self._first:
            self._file.write(",\n")
        self._first = False
        self._file.write(json.dumps(event, separators=(",", ":")))

    def _us(self, ns: int) -> float:
        """The format counts in microseconds; a double holds nanoseconds of a trace of some weeks."""
        return (ns - self._start) / 1000

    def _thread(self, pid: int, tid: int) -> int:
        if (pid, tid) not in self._threads:
            self._threads.add((pid, tid))
            name = {CONTROL_THREAD: "control", HOST_THREAD: "host"}.get(tid, f"queue {tid - 1}")
            self._write({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}})
        return tid

    def add(self, item: Item) -> None:
        """One thing that happened."""
        if isinstance(item, Happened):
            self._event(item.device, item.event)
        elif isinstance(item, tap.Said):
            self._said(item)
        elif isinstance(item, Note):
            self._latest = max(self._latest, item.ns)
            self._instant(item.device, CONTROL_THREAD, item.ns, item.text, {}, scope="p")
        elif isinstance(item, Lost):
            self._lost[item.device] = self._lost.get(item.device, 0) + item.count
            self._instant(item.device, CONTROL_THREAD, self._latest, f"{item.count} events lost", {}, scope="p")

    def _pid(self, device: str) -> int:
        return self._pids.get(device, 0)

    def _instant(
        self, device: str, tid: int, ns: int, name: str, args: dict[str, Any], *, scope: str = "t"
    ) -> None:
        pid = self._pid(device)
        self._write({"ph": "i", "s": scope, "name": name, "cat": "event", "ts": self._us(ns), "pid": pid,
                     "tid": self._thread(pid, tid), "args": args})  # fmt: skip

    def _begin(self, device: str, tid: int, ns: int, name: str, slice_id: str, key: object, args: Any) -> None:
        pid, cat = self._pid(device), "control" if tid == CONTROL_THREAD else "request"
        self._open[device, name, key] = (slice_id, pid, self._thread(pid, tid), cat)
        self._write({"ph": "b", "name": name, "cat": cat, "id": slice_id, "ts": self._us(ns), "pid": pid, "tid": tid,
                     "args": args})  # fmt: skip

    def _end(self, device: str, name: str, key: object, ns: int, args: Any) -> bool:
        """False where nothing of the kind had begun: it was taken before the trace began, or that event was lost."""
        found = self._open.pop((device, name, key), None)
        if found is None:
            return False
        slice_id, pid, tid, cat = found
        self._write({"ph": "e", "name": name, "cat": cat, "id": slice_id, "ts": self._us(ns), "pid": pid, "tid": tid,
                     "args": args})  # fmt: skip
        return True

    def _event(self, device: str, e: watch.Event) -> None:
        self._latest = max(self._latest, e.ns)
        tid = HOST_THREAD if e.queue == watch.NO_QUEUE else e.queue + 1
        place = (device, e.queue, e.head)
        if e.kind == Kind.TAKE:
            self._serial += 1
            self._end(device, "request", place, e.ns, {"unfinished": True})  # its end was lost
            self._requests[place] = self._serial
            args = {"head": e.head, "from guest": e.length, "room for guest": e.arg}
            self._begin(device, tid, e.ns, "request", self._id(place), place, args)
        elif e.kind == Kind.PUSH:
            self._end(device, "request", place, e.ns, {"to guest": e.length, "took ns": e.arg})
        elif e.kind == Kind.SUBMIT:
            key = (*place, e.length)
            self._begin(device, tid, e.ns, "host I/O", self._id(place), key, {"offset": e.arg, "bytes": e.length})
        elif e.kind == Kind.COMPLETE:
            self._end(device, "host I/O", (*place, e.length), e.ns, {"result": e.arg})
        else:
            name = Kind(e.kind).name.lower() if e.kind < len(Kind) else f"event {e.kind}"
            self._instant(device, tid, e.ns, name, {"head": e.head, "length": e.length, "arg": e.arg})

    def _id(self, place: tuple[str, int, int]) -> str:
        device, queue, head = place
        return f"{device}/{queue}/{head}/{self._requests.get(place, 0)}"

    def _said(self, said: tap.Said) -> None:
        self._latest = max(self._latest, said.ns)
        if not said.id:  # a notice, which nobody answers
            self._instant(said.device, CONTROL_THREAD, said.ns, said.type, said.body)
            return
        question = ("control", said.id)
        if said.type in ANSWERS:
            for name in [n for d, n, key in self._open if d == said.device and key == question]:
                self._end(said.device, name, question, said.ns, {"answer": said.type, **said.body})
        else:
            slice_id = f"{said.device}/control/{said.id}"
            self._begin(said.device, CONTROL_THREAD, said.ns, said.type, slice_id, question, said.body)

    def close(self) -> None:
        """What has begun ends here; the file is whole."""
        for device, name, key in list(self._open):
            self._end(device, name, key, self._latest, {"unfinished": True})
        self._file.write(f'\n],"otherData":{json.dumps({"lost events": self._lost})}}}\n')


ANSWERS = frozenset({"Ok", "Error", "Welcome", "StatsReport", "Saved"})
