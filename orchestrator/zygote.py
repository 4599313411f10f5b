"""The zygote: one a host and user, a warm interpreter from which supervisors are forked.

It has every module imported that a VM's processes need, one thread, no ZeroMQ context and nothing of any VM: who asks
sends one end of a lifeline, over which the supervisor gets its order from vmmctl itself (daemon.py). zygoteclient.py
has the protocol, pool.py the VMs that are prepared ahead. It can be killed at any time: supervisors do not depend on
it, prepared VMs end with it, and its socket then refuses.

Its processes share its memory copy-on-write, and its address space layout: secrets of one are not in the others, but
addresses are the same in all. `vmmctl zygote stop` makes the next one new.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gc
import json
import logging
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from motorcade.orchestrator import zygoteclient
from motorcade.orchestrator.errors import EXIT_ERROR, EXIT_OK, UserError
from motorcade.orchestrator.pool import BadShape, Pool
from motorcade.orchestrator.zygoteclient import MAX_PACKET

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("motorcade.zygote")

_BACKLOG = 256
_LOG = "zygote.log"  # in the directory of run directories; gone with a zygote that ended in good order
_UCRED = 12  # bytes of struct ucred (unix(7)): pid, uid, gid


class Refused(Exception):
    """What is answered instead of being done."""


def listen() -> socket.socket | None:
    """The socket, listening, mode 0600; None where another zygote has it. Errors: UserError, OSError.

    Whether another one lives is seen by connecting; a lock on the directory keeps two that start at once apart.
    """
    path = zygoteclient.socket_path()
    with _locked(path.parent):
        if (other := zygoteclient.find()) is not None:
            other.close()
            return None
        path.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        old = os.umask(0o177)
        try:
            sock.bind(os.fspath(path))
            sock.listen(_BACKLOG)
        except OSError as e:
            sock.close()
            raise UserError(f"{path}: {e.strerror}") from None
        finally:
            os.umask(old)
    return sock


@contextlib.contextmanager
def _locked(folder: Path) -> Any:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


class Server:
    """The zygote's loop. Owns the listening socket."""

    def __init__(self, sock: socket.socket, code: str, *, idle: float, pool: Pool) -> None:
        """``code``: the fingerprint of before the imports. ``idle``: seconds without a request until the end."""
        self.sock, self.code, self.idle, self.pool = sock, code, idle, pool
        self.place = zygoteclient.place()
        self.selector = selectors.DefaultSelector()
        self.selector.register(sock, selectors.EVENT_READ, self.on_connect)
        self.children: dict[int, int] = {}  # pidfd to pid, of the supervisors not reaped yet
        self.forked = 0
        self.used = self.began = time.monotonic()
        self.stopping = False

    def run(self) -> None:
        """Until it is stopped, out of use, or its code is old."""
        while not self.stopping:
            now = time.monotonic()
            if now >= self.used + self.idle:
                log.info("not used for %g s", self.idle)
                return
            due = self.used + self.idle
            if (refill := self.pool.due(self.used)) is not None:
                due = min(due, refill)
            events = self.selector.select(max(0.0, due - now))
            for key, _ in events:
                if key.fd in self.selector.get_map():
                    key.data()
            if not events and refill is not None and time.monotonic() >= refill:
                self.prepare()

    # Clients.

    def on_connect(self) -> None:
        """A client. The directory keeps others out already; this does so again."""
        try:
            client, _ = self.sock.accept()
        except BlockingIOError:
            return  # it has gone again
        client.setblocking(False)
        cred = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED)
        pid, uid = (int.from_bytes(cred[i : i + 4], sys.byteorder) for i in (0, 4))
        if uid != os.geteuid():
            log.error("uid %d (pid %d) is not to use this zygote", uid, pid)
            client.close()
            return
        self.selector.register(client, selectors.EVENT_READ, lambda: self.on_request(client))

    def on_request(self, client: socket.socket) -> None:
        """One packet, or the end of the connection."""
        fds: list[int] = []
        try:
            data, fds, flags, _ = socket.recv_fds(client, MAX_PACKET, 1)
            if not data:
                self.drop(client)
                return
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise Refused("a packet that is too long, or with too many descriptors")
            answer = self.handle(_parse(data), fds)
        except Refused as e:
            log.warning("refused: %s", e)
            answer = {"refused": str(e)}
        except ConnectionResetError:
            self.drop(client)
            return
        finally:
            for fd in fds:
                os.close(fd)
        try:
            client.send(json.dumps(answer).encode(), socket.MSG_NOSIGNAL)
        except (BrokenPipeError, ConnectionResetError, BlockingIOError):
            self.drop(client)  # gone, or it asks and does not read

    def drop(self, client: socket.socket) -> None:
        """The end of a connection."""
        self.selector.unregister(client)
        client.close()

    def handle(self, request: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        """The answer. Errors: Refused."""
        match request.get("do"):
            case "fork":
                self.check(request)
                if len(fds) != 1:
                    raise Refused("a fork needs the lifeline's descriptor")
                self.used = time.monotonic()
                return self.fork(request.get("shape"), fds[0])
            case "status":
                return self.status()
            case "stop":
                self.stopping = True
                return {"stopped": True}
        raise Refused(f"nobody knows how to do {str(request.get('do'))[:40]!r}")

    def check(self, request: dict[str, Any]) -> None:
        """That the client's supervisor would be the same as ours. Ends the zygote where that is for its own age."""
        if request.get("code") != self.code:
            if zygoteclient.fingerprint() != self.code:
                log.info("the code has changed since the start")
                self.stopping = True
            raise Refused("its code is not that of the client")
        if request.get("place") != self.place:
            raise Refused("the client is in other namespaces")

    def status(self) -> dict[str, Any]:
        """For a person."""
        pool = self.pool.status()
        return {
            "pid": os.getpid(),
            "code": self.code,
            "current": zygoteclient.fingerprint() == self.code,
            "seconds": round(time.monotonic() - self.began, 3),
            "idle": self.idle,
            "forked": self.forked,
            "running": len(self.children) - sum(len(shelf["forked"]) for shelf in pool),
            "pool": pool,
        }

    # Processes.

    def fork(self, shape: Any, line: int) -> dict[str, Any]:
        """A supervisor with this end of a lifeline: a prepared one, or a new one."""
        try:
            pid = self.pool.take(shape, line)
        except BadShape as e:
            raise Refused(str(e)) from None
        prepared = pid is not None
        if pid is None:
            from motorcade.orchestrator import daemon

            pid = self.spawn(lambda: daemon.run(socket.socket(fileno=line), daemon.from_zygote))
        self.pool.forked(shape, pid)
        self.forked += 1
        return {"pid": pid, "prepared": prepared}

    def prepare(self) -> None:
        """One more VM for the pool."""
        self.pool.prepare(self.spawn)

    def spawn(self, main: Callable[[], NoReturn]) -> int:
        """Forks ``main``, which closes what it does not need, and watches for its end. Returns its pid."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # whose handler is ours alone
        try:
            pid = os.fork()
            if pid == 0:
                main()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        pidfd = os.pidfd_open(pid)
        self.children[pidfd] = pid
        self.selector.register(pidfd, selectors.EVENT_READ, lambda: self.on_exit(pidfd))
        return pid

    def on_exit(self, pidfd: int) -> None:
        """A supervisor is gone; how, is vmmctl's and the log's to say."""
        self.selector.unregister(pidfd)
        pid = self.children.pop(pidfd)
        os.waitpid(pid, 0)
        os.close(pidfd)
        self.pool.gone(pid)


def _parse(data: bytes) -> dict[str, Any]:
    try:
        request = json.loads(data)
    except ValueError:
        request = None
    if not isinstance(request, dict):
        raise Refused("not a request")
    return request


def warm() -> None:
    """Loads and tries out what a VM's processes need, and frees what that left over. Frozen, the pages stay shared with
    what is forked: the garbage collector writes to every object that it looks at."""
    from motorcade.orchestrator import daemon, warmth

    gc.disable()
    daemon.preload()
    warmth.load()
    warmth.rehearse()
    gc.collect()
    gc.freeze()


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m motorcade.orchestrator.zygote``: returns when its child listens, or when another zygote does."""
    parser = argparse.ArgumentParser(description="The zygote; vmmctl zygote starts it.")
    parser.add_argument("--idle", type=float, default=zygoteclient.IDLE, help="seconds without use until its end")
    parser.add_argument("--pool", type=int, default=zygoteclient.POOL, help="prepared VMs a shape")
    options = parser.parse_args(argv)
    code = zygoteclient.fingerprint()  # before any import that could be of newer code
    try:
        sock = listen()
    except (UserError, OSError) as e:
        sys.stderr.write(f"{e}\n")
        return EXIT_ERROR
    if sock is None or os.fork() != 0:
        return EXIT_OK
    status = EXIT_ERROR
    try:
        status = serve(sock, code, options.idle, options.pool)
    finally:
        os._exit(status)


def serve(sock: socket.socket, code: str, idle: float, pool_size: int) -> int:
    """The zygote's life, in a process that is nobody's. Owns ``sock``."""
    from motorcade.orchestrator import daemon

    path = zygoteclient.socket_path()
    ours = path.stat()
    daemon.leave_parent(sock.fileno())
    fd = os.open(path.with_name(_LOG), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.dup2(fd, 2)
    os.close(fd)
    from motorcade.orchestrator.spawn import title
    from motorcade.sidecars import log as logs

    logs.start("zygote", "info")
    title("zygote", os.fspath(path.parent))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_OK))
    try:
        warm()
        Server(sock, code, idle=idle, pool=Pool(pool_size)).run()
    except SystemExit:
        log.info("SIGTERM")
    except Exception:
        log.exception("the zygote ends")
        return EXIT_ERROR
    with _locked(path.parent), contextlib.suppress(FileNotFoundError):
        if os.path.samestat(ours, path.stat()):  # else another one has taken its place already
            path.unlink()
            path.with_name(_LOG).unlink()
    return EXIT_OK


if __name__ == "__main__":
    raise SystemExit(main())
