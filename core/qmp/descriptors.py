"""Descriptors that clients send beside their requests (SCM_RIGHTS), and the names that ``getfd`` gives them.

What arrives belongs to the requests that it came with: the first ``getfd`` among them takes it, and what none has taken
is closed. What has a name is the machine's, and any client's to use, as QEMU keeps it with the monitor: it outlives its
client, until ``closefd``, the command that uses it up, or the VM's end.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Sequence

from motorcade.core.qmp.errors import QmpError

MAX_RECEIVED = 16
"""Descriptors that one message may bring; the kernel closes those beyond."""
MAX_NAMED = 64
"""Names at a time."""
MAX_NAME = 255
"""Characters of a name."""

_SPACE = socket.CMSG_SPACE(MAX_RECEIVED * array.array("i").itemsize)


class Received:
    """What came with one client's last message. Owns it until ``take``."""

    def __init__(self) -> None:
        self._fds: list[int] = []

    def read(self, sock: socket.socket, size: int) -> bytes:
        """recv(2), with what comes beside the bytes; that of an earlier message is closed. Errors: OSError."""
        data, ancillary, _, _ = sock.recvmsg(size, _SPACE, socket.MSG_CMSG_CLOEXEC)
        fds = array.array("i")
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        if fds:
            self.close()
            self._fds = list(fds)
        return data

    def take(self) -> int:
        """The oldest, the caller's from now on. QmpError where there is none."""
        if not self._fds:
            raise QmpError("No file descriptor supplied via SCM_RIGHTS")
        return self._fds.pop(0)

    def close(self) -> None:
        """Closes what nobody took."""
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)


class Named:
    """The machine's, by name. Owns them."""

    def __init__(self) -> None:
        self._fds: dict[str, int] = {}

    def add(self, name: str, received: Received) -> None:
        """Gives what was received a name, in place of what had it. QmpError where it cannot have it."""
        if not name or name[0].isdigit():  # a number is a descriptor inherited from the start, in QEMU's commands
            raise QmpError("Parameter 'fdname' expects a name not starting with a digit")
        if len(name) > MAX_NAME:
            raise QmpError(f"Parameter 'fdname' is longer than {MAX_NAME} characters")
        if name not in self._fds and len(self._fds) >= MAX_NAMED:
            raise QmpError(f"There are {MAX_NAMED} named file descriptors already; closefd makes room")
        fd = received.take()
        if name in self._fds:
            os.close(self._fds[name])
        self._fds[name] = fd

    def take(self, name: str) -> int:
        """The descriptor of that name, which it has no longer: the caller's. QmpError where there is none."""
        try:
            return self._fds.pop(name)
        except KeyError:
            raise QmpError(f"File descriptor named '{name}' not found") from None

    def take_all(self, names: Sequence[str]) -> list[int]:
        """As ``take``, of all or of none."""
        for name in names:
            if name not in self._fds or names.count(name) > 1:
                raise QmpError(f"File descriptor named '{name}' not found, or named twice")
        return [self.take(name) for name in names]

    def close(self) -> None:
        """Closes all."""
        fds, self._fds = self._fds, {}
        for fd in fds.values():
            os.close(fd)
