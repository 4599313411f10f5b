"""What the supervisor shows of its VM to whoever may connect: ``watch.sock`` in the run directory.

A client says in one line of JSON what it wants: {"do": "trace", "devices": [ID, ...], "kinds": BITS, "control": true}
gets frames (traceclient.py takes them apart) until it hangs up or the VM is over; {"do": "status"} one line of JSON.

The supervisor has one thread and must never wait for a client: each has a bounded buffer, and one that does not read
loses events, which is counted, and holds up nobody. The events lie in rings that the sidecars write and this process
copies, as they are, every 20 ms while there is a client: a sidecar that had to wake somebody up for each event would be
slower for being watched.
"""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
import selectors
import socket
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from motorcade.orchestrator.errors import UserError
from motorcade.proto import tap, watch

log = logging.getLogger("motorcade.supervisor")

MAX_CLIENTS = 16
REQUEST_MAX, REQUEST_SECONDS = 8192, 5.0
PERIOD = 0.02  # seconds: a ring of 32768 events is full in that time at 1.6 million a second
BUFFER_MAX = 4 << 20  # bytes that wait for a client
_CHUNK = 8192  # events of one ring at a time
FRAME = struct.Struct("<IHHQ")  # bytes that follow, what, index of the device, number of the first slot
HEADER, EVENTS, CONTROL, LOST, NOTE = range(5)
CORE = 0xFFFF  # index of the core's ring


@dataclass
class Client:
    """A connection: first it has to say what it wants."""

    sock: socket.socket
    deadline: float | None
    received: bytes = b""
    unsent: bytearray = field(default_factory=bytearray)
    last_words: bool = False  # closed when all is sent
    kinds: int = 0
    rings: dict[int, watch.Ring] = field(default_factory=dict)
    told_lost: dict[int, int] = field(default_factory=dict)
    devices: list[str] = field(default_factory=list)
    writing: bool = False


class WatchServer:
    """Owns its sockets and its mappings until ``close``. Nothing that a client does raises out of a method."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        rings: Callable[[], Mapping[str, int]],
        status: Callable[[], dict[str, Any]],
    ) -> None:
        """``rings()``: descriptors by device id, "core" among them; ``status()``: what "status" is answered with."""
        self._selector, self._rings, self._status = selector, rings, status
        self._listener: socket.socket | None = None
        self._clients: list[Client] = []
        self._mappings: dict[str, mmap.mmap] = {}
        self._next_look: float | None = None

    def open(self, path: Path) -> None:
        """Listens there. Errors: OSError."""
        self._listener = listen(path)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    @property
    def due(self) -> float | None:
        """When ``work`` has something to do, in time.monotonic() seconds."""
        times = [c.deadline for c in self._clients if c.deadline is not None]
        if self._next_look is not None:
            times.append(self._next_look)
        return min(times, default=None)

    def work(self) -> None:
        """What is due by now."""
        now = time.monotonic()
        for client in [c for c in self._clients if c.deadline is not None and c.deadline <= now]:
            self._drop(client)
        if self._next_look is not None and self._next_look <= now:
            self._next_look = now + PERIOD
            for client in list(self._clients):
                if client.rings:
                    self._guarded(client, partial(self._look, client))

    def note(self, device: str, text: str) -> None:
        """Something happened to a process: whoever traces it is told."""
        for client in list(self._clients):
            if client.rings and (device in client.devices or device == "core"):
                said = json.dumps({"device": device, "text": text, "ns": time.monotonic_ns()}).encode()
                self._guarded(client, partial(self._say, client, NOTE, 0, 0, said))

    def close(self) -> None:
        """Gives clients what there is still, as far as it can be sent at once, and lets go of everything."""
        for client in list(self._clients):
            if client.rings:
                self._guarded(client, partial(self._look, client))
            self._drop(client)
        if self._listener is not None:
            with contextlib.suppress(KeyError):
                self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None
        for mapping in self._mappings.values():
            mapping.close()
        self._mappings.clear()

    # Connections.

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError as e:  # nobody there any more, or no descriptors left
            log.debug("watch.sock: %s", e)
            return
        sock.setblocking(False)
        if len(self._clients) >= MAX_CLIENTS:
            with contextlib.suppress(OSError):
                sock.send(b'{"error": "too many clients watch this VM already"}\n')
            sock.close()
            return
        client = Client(sock, time.monotonic() + REQUEST_SECONDS)
        self._clients.append(client)
        self._selector.register(sock, selectors.EVENT_READ, lambda: self._guarded(client, lambda: self._ready(client)))

    def _guarded(self, client: Client, work: Callable[[], None]) -> None:
        """One client's trouble, ours with it included, is its own."""
        if client not in self._clients:
            return  # an event of a round in which it was dropped
        try:
            work()
        except (OSError, ValueError) as e:
            log.debug("a client of watch.sock: %s", e)
            self._drop(client)
        except Exception:
            log.exception("a client of watch.sock")
            self._drop(client)

    def _ready(self, client: Client) -> None:
        with contextlib.suppress(BlockingIOError):
            data = client.sock.recv(REQUEST_MAX)
            if not data:
                self._drop(client)
                return
            if client.deadline is not None:
                client.received += data
                line, newline, _ = client.received.partition(b"\n")
                if newline:
                    client.deadline = None
                    self._request(client, line)
                elif len(client.received) > REQUEST_MAX:
                    self._refuse(client, "a request is one short line")
        self._flush(client)

    def _drop(self, client: Client) -> None:
        if client not in self._clients:
            return
        self._clients.remove(client)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(client.sock)
        client.sock.close()
        if client.rings:
            client.rings.clear()
            self._switch()

    # Requests.

    def _request(self, client: Client, line: bytes) -> None:
        try:
            request = json.loads(line)
            what = request["do"]
        except (ValueError, TypeError, KeyError, RecursionError):
            self._refuse(client, "not a request")
            return
        if what == "status":
            client.unsent += json.dumps(self._status()).encode() + b"\n"
            client.last_words = True
        elif what == "trace":
            self._trace(client, request)
        else:
            self._refuse(client, "unknown request")

    def _refuse(self, client: Client, why: str) -> None:
        client.unsent += json.dumps({"error": why}).encode() + b"\n"
        client.last_words, client.deadline = True, time.monotonic() + REQUEST_SECONDS

    def _trace(self, client: Client, request: dict[str, Any]) -> None:
        known = self._rings()
        devices, kinds = request.get("devices"), request.get("kinds", watch.ALL_KINDS)
        if not isinstance(devices, list) or not all(isinstance(d, str) for d in devices) or not isinstance(kinds, int):
            self._refuse(client, "devices is a list of ids, kinds a number")
            return
        if missing := [d for d in devices if d not in known]:
            self._refuse(client, f"nothing of {missing[0]} is recorded")
            return
        client.devices, client.kinds = devices, kinds & watch.ALL_KINDS
        for index, device in enumerate(devices):
            client.rings[index] = watch.Ring(self._mapping(device, known[device]))
        if request.get("control"):
            client.rings[CORE] = watch.Ring(self._mapping("core", known["core"]), tap.SLOTS, tap.SLOT_SIZE)
        self._switch()
        header = {"devices": devices, "start": time.monotonic_ns(), "time": time.time()}
        self._say(client, HEADER, 0, 0, json.dumps(header).encode())
        if self._next_look is None:
            self._next_look = time.monotonic() + PERIOD

    def _mapping(self, device: str, fd: int) -> mmap.mmap:
        if device not in self._mappings:
            mapping = mmap.mmap(fd, watch.SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            mapping.madvise(mmap.MADV_DONTFORK)  # a process that is forked later has no business with it
            self._mappings[device] = mapping
        return self._mappings[device]

    def forget(self, device: str) -> None:
        """A device was taken away. Who reads its ring keeps the mapping as long as that."""
        self._mappings.pop(device, None)

    def _switch(self) -> None:
        """Has each process record what its watchers want, all of them together."""
        for device, mapping in self._mappings.items():
            kinds = 0
            for client in self._clients:
                if device == "core":
                    kinds |= int(CORE in client.rings)
                elif client.rings and device in client.devices:
                    kinds |= client.kinds
            switch = watch.Switch(mapping, qmp=False)
            switch.kinds = kinds
            switch.release()
        if not any(client.rings for client in self._clients):
            self._next_look = None

    # Events.

    def _look(self, client: Client) -> None:
        for index, ring in client.rings.items():
            while len(client.unsent) < BUFFER_MAX:
                first, data = ring.read(_CHUNK)
                if ring.lost != client.told_lost.get(index, 0):
                    new = ring.lost - client.told_lost.get(index, 0)
                    client.told_lost[index] = ring.lost
                    self._say(client, LOST, index, new, b"")
                if not data:
                    break
                self._say(client, CONTROL if index == CORE else EVENTS, index, first, data)
        self._flush(client)

    def _say(self, client: Client, what: int, index: int, number: int, data: bytes) -> None:
        client.unsent += FRAME.pack(len(data), what, index, number & (1 << 64) - 1) + data

    def _flush(self, client: Client) -> None:
        with contextlib.suppress(BlockingIOError):
            while client.unsent:
                del client.unsent[: client.sock.send(client.unsent[: 1 << 18])]
        if not client.unsent and client.last_words:
            self._drop(client)
            return
        if bool(client.unsent) != client.writing and client in self._clients:
            client.writing = bool(client.unsent)
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.writing else 0)
            self._selector.modify(client.sock, events, self._selector.get_key(client.sock).data)


def listen(path: Path) -> socket.socket:
    """A unix socket for this user, non-blocking; the caller owns it. Errors: OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        old = os.umask(0o177)
        try:
            sock.bind(str(path))
        finally:
            os.umask(old)
        sock.listen(16)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def listen_tcp(address: str) -> socket.socket:
    """``HOST:PORT``, as config.py has checked it; the caller owns it. Errors: UserError."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        sock = socket.create_server((host, int(port)), family=family, backlog=16)
    except OSError as e:
        raise UserError(f"metrics: {address}: {e.strerror or e}") from None
    sock.setblocking(False)
    return sock
