"""vmmctl's side of the zygote (zygote.py): where it is, whether its code is ours, and asking it for a supervisor.

Light: every `vmmctl up` imports it. The protocol is one JSON object a packet on a SEQPACKET socket:

- ``{"do": "fork", "code": fingerprint(), "place": place(), "shape": ... or null}`` with one descriptor, the
  supervisor's end of a lifeline; answered by ``{"pid": N, "prepared": bool}``
- ``{"do": "status"}``: answered by what `vmmctl zygote status` shows
- ``{"do": "stop"}``: answered by ``{"stopped": true}``, and then by the end of the connection
- whatever it will not do is answered by ``{"refused": why}``
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from motorcade.orchestrator import lifeline, rundir
from motorcade.orchestrator.errors import UserError

MAX_PACKET = 64 << 10  # bytes
ANSWER_TIMEOUT = 20.0  # seconds; one that has just been started imports its modules first
IDLE = 600.0  # seconds without a request after which it ends
POOL = 4  # prepared VMs a shape
_NAMESPACES = ("mnt", "net", "pid", "user")
_SUFFIXES = (".py", ".so", ".capnp")


class ZygoteError(UserError):
    """It cannot be started, or does not answer as it should."""


def socket_path() -> Path:
    """Where it listens, in the directory of run directories. Errors: RunDirError."""
    return rundir.root() / "zygote.sock"


def fingerprint() -> str:
    """Which code this is: the interpreter, where the package is, and how many files of which newest date it has.

    Costs less than a millisecond; a file that is replaced, added or removed changes it.
    """
    package = Path(__file__).resolve().parent.parent
    newest = count = 0
    folders = [os.fspath(package / name) for name in ("core", "orchestrator", "proto", "sidecars")]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.name.endswith(_SUFFIXES):
                    count += 1
                    # Not mtime, which an older file that takes a newer one's place brings along.
                    newest = max(newest, entry.stat().st_ctime_ns)
                elif "." not in entry.name and entry.name != "__pycache__" and entry.is_dir():
                    folders.append(entry.path)
    return f"{sys.executable} {sys.version_info[:3]} {package} {count} {newest}"


def place() -> list[int]:
    """The namespaces of this process. A supervisor opens taps and files in those that its zygote lives in."""
    return [os.stat(f"/proc/self/ns/{name}").st_ino for name in _NAMESPACES]  # noqa: PTH116


class Zygote:
    """A connection to the zygote. Owns its socket until ``close``; one thread."""

    def __init__(self, sock: socket.socket) -> None:
        """Takes the connected ``sock``."""
        self._sock = sock
        self._sock.settimeout(ANSWER_TIMEOUT)
        self._code, self._place = fingerprint(), place()

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of it; what it forked lives on."""
        self._sock.close()

    def ask(self, request: dict[str, Any], fds: tuple[int, ...] = ()) -> dict[str, Any]:
        """Its answer. Errors: ZygoteError where it refuses, is gone, or is silent for ANSWER_TIMEOUT."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._sock.sendmsg([json.dumps(request).encode()], rights, socket.MSG_NOSIGNAL)
            data = self._sock.recv(MAX_PACKET)
        except OSError as e:
            raise ZygoteError(f"the zygote does not answer: {e.strerror or e}") from None
        if not data:
            raise ZygoteError("the zygote is gone")
        try:
            answer = json.loads(data)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ZygoteError("the zygote answers with nonsense")
        if "refused" in answer:
            raise ZygoteError(f"the zygote refuses: {answer['refused']}")
        return answer

    def stop(self) -> None:
        """Ends it; returns when it is gone. Errors: ZygoteError."""
        self.ask({"do": "stop"})
        try:
            self._sock.recv(MAX_PACKET)
        except OSError as e:
            raise ZygoteError(f"the zygote does not end: {e.strerror or e}") from None

    def fork(self, shape: dict[str, Any] | None = None) -> tuple[int, socket.socket]:
        """A supervisor that has no VM yet, and our end of its lifeline, which the caller owns. It is no child of ours.

        ``shape``: of the VM that is to come (pool.Shape), for one that has its processes already. It gets this
        process's environment. Errors: ZygoteError.
        """
        ours, theirs = lifeline.pair()
        with theirs:
            try:
                if not lifeline.send(ours, environ=dict(os.environ)):
                    raise ZygoteError("the environment does not fit a packet")
                request = {"do": "fork", "code": self._code, "place": self._place, "shape": shape}
                pid = self.ask(request, (theirs.fileno(),)).get("pid")
                if not isinstance(pid, int):
                    raise ZygoteError("the zygote answers with nonsense")
            except BaseException:
                ours.close()
                raise
        return pid, ours


def find() -> Zygote | None:
    """The zygote that runs; None where none does. Errors: UserError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.connect(os.fspath(socket_path()))
    except (FileNotFoundError, ConnectionRefusedError):  # never started, or its socket has outlived it
        sock.close()
        return None
    except OSError as e:
        sock.close()
        raise ZygoteError(f"{socket_path()}: {e.strerror}") from None
    return Zygote(sock)


def start(idle: float = IDLE, pool: int = POOL) -> Zygote:
    """Starts one unless it runs already. Returns when it listens; it imports its modules while requests wait.

    ``idle``, in seconds, and ``pool``, a number of VMs a shape, are those of the new one. Errors: ZygoteError.
    """
    import subprocess

    if (running := find()) is not None:
        return running
    # A process of its own rather than a fork of vmmctl: it is to hold nothing of one command's.
    command = [sys.executable, "-P", "-m", "motorcade.orchestrator.zygote", "--idle", str(idle), "--pool", str(pool)]
    environment = {**os.environ, "MOTORCADE_RUN_DIR": os.fspath(rundir.root())}
    # What is waited for ends once its own child listens, or another zygote does.
    done = subprocess.run(
        command, cwd="/", env=environment, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, errors="replace",
    )  # fmt: skip
    zygote = find()
    if zygote is None:
        raise ZygoteError(f"the zygote does not start: {done.stderr.strip()[-2000:] or 'it ended at once'}")
    return zygote


def fork(shape: dict[str, Any] | None = None) -> tuple[int, socket.socket] | None:
    """As Zygote.fork, from the one that runs; None where none does, or it will not."""
    with contextlib.suppress(ZygoteError):
        zygote = find()
        if zygote is not None:
            with zygote:
                return zygote.fork(shape)
    return None
