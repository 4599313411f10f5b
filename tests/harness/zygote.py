"""A warm process from which the tests fork sidecars, since a cold one takes 200 ms to import what it needs.

One a test session. It is asked over a SEQPACKET socket, with the child's descriptors beside the request, and answers
with the child's pid; when a child ends, its wait status is written to the pipe that came with the request. It dies,
and its children with it, when the session's end of the socket is gone.
"""

from __future__ import annotations

import atexit
import os
import selectors
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Child:
    """A process that the zygote forked. ``status`` is readable when it has ended (4 bytes, then end of file)."""

    pid: int
    status: int  # descriptor, owned by whoever asked


def python_path() -> str:
    """For a new interpreter: this checkout and its tests, then whatever else is named: a kind that is not ours."""
    return ":".join([str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])


class Zygote:
    """The session's end."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            env = {**os.environ, "PYTHONPATH": python_path()}
            self._process = subprocess.Popen(
                [sys.executable, "-m", "harness.zygote", str(theirs.fileno())], pass_fds=[theirs.fileno()], env=env
            )
        self._socket = ours
        self._socket.settimeout(30)

    def spawn(self, kind: str, boot_socket: socket.socket) -> Child:
        """Forks a sidecar of ``kind``, a name such as blk or MODULE:CLASS. Its end of ``boot_socket`` is a copy; close
        yours."""
        if ":" not in kind:
            kind = f"motorcade.sidecars.{kind}.device:{kind.capitalize()}Device"
        status, theirs = os.pipe2(os.O_CLOEXEC)
        try:
            socket.send_fds(self._socket, [kind.encode()], [boot_socket.fileno(), theirs])
        finally:
            os.close(theirs)
        return Child(int(self._socket.recv(64)), status)

    def close(self) -> None:
        """Ends the zygote and every child that is left."""
        self._socket.close()
        self._process.wait(30)


_zygote: Zygote | None = None


def get() -> Zygote:
    """The session's zygote, started at first use and ended with the interpreter."""
    global _zygote
    if _zygote is None:
        _zygote = Zygote()
        atexit.register(_zygote.close)
    return _zygote


def serve(sock: socket.socket) -> None:
    """The zygote."""
    import importlib

    import motorcade.proto.boot
    import motorcade.proto.framing  # noqa: F401 - warm for the children
    from motorcade.sidecars import runtime

    status_pipes: dict[int, int] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is not sock:
                    pid = key.data
                    _, status = os.waitpid(pid, 0)
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    pipe = status_pipes.pop(pid)
                    os.write(pipe, status.to_bytes(4, "little"))
                    os.close(pipe)
                    continue
                request, fds, _, _ = socket.recv_fds(sock, 64, 2)
                if not request:
                    for pid in status_pipes:
                        os.kill(pid, signal.SIGKILL)
                    return
                boot_fd, pipe = fds
                module, _, name = request.decode().rpartition(":")
                device_class = getattr(importlib.import_module(module), name)
                if (pid := os.fork()) == 0:
                    selector.close()
                    sock.close()
                    for other in [pipe, *status_pipes.values()]:
                        os.close(other)
                    os.set_inheritable(boot_fd, False)
                    runtime.run_and_exit(device_class, socket.socket(fileno=boot_fd))
                os.close(boot_fd)
                status_pipes[pid] = pipe
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)
                sock.send(str(pid).encode())


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(socket.socket(fileno=int(sys.argv[1])))
