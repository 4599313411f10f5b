"""What both ends of the control plane share: addresses, waiting, reading a message, noting what was refused."""

from __future__ import annotations

import logging
import os
import select
import time
from collections import Counter

import zmq

log = logging.getLogger(__name__)

MAX_PATH = 107  # sun_path without its NUL
HWM = 64  # messages queued per peer and direction; a sender beyond that waits, which costs only itself


def endpoint(path: str) -> str:
    """The ZeroMQ address of the socket at ``path``. ValueError where the kernel could not hold the path."""
    if len(os.fsencode(path)) > MAX_PATH:
        raise ValueError(f"socket path {path} is longer than {MAX_PATH} bytes; choose a shorter run directory")
    return f"ipc://{path}"


class Refusals:
    """Counts what was refused, by (device, why), and logs each pair at most once a second."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self._logged: dict[tuple[str, str], tuple[float, int]] = {}

    def note(self, device_id: str, why: str, detail: object = "") -> None:
        """``device_id`` and ``why`` come from us, never from a peer; ``detail`` may."""
        key = (device_id, why)
        self.counts[key] += 1
        now = time.monotonic()
        when, seen = self._logged.get(key, (0.0, 0))
        if seen and now - when < 1.0:
            return
        more = self.counts[key] - seen - 1
        self._logged[key] = (now, self.counts[key])
        log.warning("%s: refused %s %.300r%s", device_id, why, detail, f" (and {more} before)" if more else "")


class Wait:
    """The descriptors that one object waits for, as one descriptor."""

    def __init__(self, *sockets: zmq.Socket[bytes]) -> None:
        self._epoll = select.epoll()
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._event, select.EPOLLIN)
        for s in sockets:
            self._epoll.register(int(s.getsockopt(zmq.FD)), select.EPOLLIN)
        self.wake()  # messages may have arrived before the registration

    def fileno(self) -> int:
        return self._epoll.fileno()

    def wake(self) -> None:
        os.eventfd_write(self._event, 1)

    def clear(self) -> None:
        try:
            os.eventfd_read(self._event)
        except BlockingIOError:
            return

    def poll(self, seconds: float) -> None:
        self._epoll.poll(max(0.0, seconds))

    def close(self) -> None:
        self._epoll.close()
        os.close(self._event)


def readable(socket: zmq.Socket[bytes]) -> bool:
    """Whether a message waits. Runs the socket's internal commands, so its FD's edge may be used up afterwards."""
    return bool(int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)


def receive(socket: zmq.Socket[bytes], frames: int) -> list[zmq.Frame] | None:
    """One message of exactly ``frames`` frames, [] for one of another count, None when there is none.

    Surplus frames are dropped one by one, so a message of many costs no list of many.
    """
    try:
        parts = [socket.recv(zmq.NOBLOCK, copy=False)]
    except zmq.Again:
        return None
    surplus = 0
    while socket.getsockopt(zmq.RCVMORE):
        part = socket.recv(zmq.NOBLOCK, copy=False)
        if len(parts) < frames:
            parts.append(part)
        else:
            surplus += 1
    return parts if len(parts) == frames and not surplus else []
