"""The QMP server: listeners, clients, events. Driven by the core's loop; nothing here waits.

A selector registration's data is a callable that takes the event mask. Wire rules: QEMU's docs/interop/qmp-spec,
with the differences that docs/qmp.md names.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import selectors
import socket
import time
from collections.abc import Iterable, Mapping

import msgspec

from motorcade.core.qmp import (
    backends,
    balloon,
    block,
    commands,
    cpus,
    debug,
    devices,
    dump,
    events,
    hotplug,
    migration,
    monitor,
    run,
    schema,
    sidecars,
)
from motorcade.core.qmp.client import Client
from motorcade.core.qmp.machine import MachineControl
from motorcade.core.qmp.registry import Context, registry

log = logging.getLogger(__name__)

COMMANDS = (
    backends, balloon, block, commands, cpus, debug, devices, dump, hotplug, migration, monitor, run, schema, sidecars,
)  # fmt: skip
"""Imported, their commands are defined."""
MAX_CLIENTS = 64
HOLD_SECONDS = 2.0
"""How long events wait for a silent client's first words; see Client.send_event."""
CLOSE_SECONDS = 1.0
"""How long close() lets clients take what they have not read yet."""
_NO_DESCRIPTORS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class QmpServer:
    """Serves QMP on listening sockets. One thread: the one that runs ``selector``."""

    def __init__(self, selector: selectors.BaseSelector, machine: MachineControl, listeners: Iterable[int]) -> None:
        """Owns the listening sockets ``listeners`` (unix or TCP) from here on."""
        self._selector = selector
        self._context = Context(machine, registry)
        self._greeting = _line({"QMP": {"version": commands.version_info(), "capabilities": []}})
        self._clients: set[Client] = set()
        self._listeners = [socket.socket(fileno=fd) for fd in listeners]
        for listener in self._listeners:
            listener.setblocking(False)
            selector.register(listener, selectors.EVENT_READ, lambda _mask, s=listener: self._accept(s))
        # Given up for a moment to turn a client away when there are no descriptors: a listener that stays
        # readable would keep the loop busy.
        self._spare = os.eventfd(0, os.EFD_CLOEXEC)
        self._release_at: float | None = None

    @property
    def clients(self) -> int:
        """How many are connected."""
        return len(self._clients)

    def emit(self, name: str, data: Mapping[str, object] | None = None) -> None:
        """Sends an event to every client. ValueError where events.py does not have it so."""
        events.check(name, data or {})
        now = time.time_ns() // 1000
        event: dict[str, object] = {"event": name}
        if data:
            event["data"] = data
        event["timestamp"] = {"seconds": now // 1_000_000, "microseconds": now % 1_000_000}
        line = _line(event)
        for client in list(self._clients):
            client.send_event(line)
            if client.holds and self._release_at is None:
                self._release_at = time.monotonic() + HOLD_SECONDS

    def next_deadline(self) -> float | None:
        """When expire() has something to do, in time.monotonic() seconds."""
        return self._release_at

    def expire(self, now: float) -> None:
        """Gives clients that only listen the events that were held for their first words."""
        if self._release_at is None or self._release_at > now:
            return
        self._release_at = None
        for client in list(self._clients):
            client.release()

    def close(self) -> None:
        """Says goodbye: lets clients take what is queued, for at most CLOSE_SECONDS, and closes everything."""
        for listener in self._listeners:
            self._selector.unregister(listener)
            listener.close()
        self._listeners.clear()
        for client in list(self._clients):
            client.release()
        self._drain(time.monotonic() + CLOSE_SECONDS)
        for client in list(self._clients):
            client.close()
        self._context.descriptors.close()
        os.close(self._spare)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError as e:
            if e.errno in _NO_DESCRIPTORS:
                self._turn_away(listener)
            log.warning("QMP connection not accepted: %s", e.strerror)
            return
        if len(self._clients) >= MAX_CLIENTS:
            log.warning("QMP connection refused: there are %d already", MAX_CLIENTS)
            sock.close()
            return
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client = Client(sock, self._selector, self._context, self._greeting, self._clients.discard)
        if client.open:
            self._clients.add(client)

    def _turn_away(self, listener: socket.socket) -> None:
        os.close(self._spare)
        try:
            listener.accept()[0].close()
        except OSError as e:
            log.warning("QMP connection could not be turned away either: %s", e.strerror)
        self._spare = os.eventfd(0, os.EFD_CLOEXEC)

    def _drain(self, until: float) -> None:
        """Waits for the clients' sockets alone: the loop, and with it the machine, is over."""
        while (left := until - time.monotonic()) > 0:
            waiting = {c.fileno(): c for c in self._clients if c.unsent}
            if not waiting:
                return
            poll = select.poll()
            for fd in waiting:
                poll.register(fd, select.POLLOUT)
            for fd, _ in poll.poll(left * 1000):
                waiting[fd].flush()


def _line(value: object) -> bytes:
    return msgspec.json.encode(value) + b"\r\n"
