"""Between vmmctl and the supervisor that it forked: a SEQPACKET pair of JSON messages.

It is also the tie between the two: while vmmctl has not said ``detach``, the end of its life ends the VM, however
vmmctl ends. From the supervisor come, as ``{"event": ...}``:

- ``progress``: ``text``, what is being done
- ``started``: ``processes``, as in state.json; ``console``, the socket to attach to (it listens already), or null
- ``running``: the guest runs
- ``sidecar-died``: ``role``, ``reason``; the VM goes on
- ``failed``: ``message``, ``status``; the VM did not come to run
- ``ended``: ``status``, ``reason``, ``detail``

vmmctl says ``{"do": "detach"}``.
"""

from __future__ import annotations

import json
import os
import select
import socket
from typing import Any

_MAX = 256 << 10  # bytes; ``detail`` may hold registers


def pair() -> tuple[socket.socket, socket.socket]:
    """vmmctl's end and the supervisor's, both CLOEXEC."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(sock: socket.socket, **message: Any) -> bool:
    """Sends one message without waiting; False when the other side is gone, or has let its buffer fill up."""
    data = json.dumps(message).encode()
    try:
        sock.send(data[:_MAX], socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
    except (BrokenPipeError, ConnectionResetError, BlockingIOError):
        return False
    return True


def receive(sock: socket.socket) -> dict[str, Any] | None:
    """The next message; None when the other side is gone. Errors: BlockingIOError, TimeoutError as the socket is set;
    ValueError for what is not a message."""
    try:
        data = sock.recv(_MAX)
    except ConnectionResetError:
        # It closed with words of ours unread. unix(7) says so first, and keeps its own last words for the next call.
        data = sock.recv(_MAX)
    if not data:
        return None
    message = json.loads(data)
    if not isinstance(message, dict):
        raise ValueError("not a message")
    return message


def pidfd(sock: socket.socket, pid: int) -> int | None:
    """A pidfd of the supervisor ``pid`` at the other end of ``sock``, which the caller owns; None where it is gone.

    It may be no child of ours, and its pid another process's by now; but as long as its end is open, it is not.
    """
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    poll = select.poll()
    poll.register(sock, 0)
    if poll.poll(0):  # POLLHUP, which needs no asking
        os.close(fd)
        return None
    return fd
