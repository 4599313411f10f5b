"""The supervisor's process: how vmmctl forks it, and what it is before it is a Supervisor."""

from __future__ import annotations

import logging
import os
import signal
import socket

from motorcade.orchestrator import lifeline
from motorcade.orchestrator.errors import EXIT_ERROR, UserError
from motorcade.orchestrator.machine import Machine
from motorcade.orchestrator.rundir import RunDir


def main(machine: Machine, line: socket.socket, *, config: str, accel: str, paused: bool) -> int:
    """The supervisor's process, forked by vmmctl with ``line``, its end of the lifeline. Returns its exit status."""
    os.setsid()
    os.umask(0o077)
    os.chdir("/")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    close_all_but(line.fileno())
    raise_nofile()
    try:
        sockets = tuple(f"console-{c.id}.sock" for c in machine.consoles)
        run = RunDir.acquire(machine.name, sockets)
    except UserError as e:
        lifeline.send(line, event="failed", message=str(e), status=e.status)
        return e.status
    start_log(run, machine.log_level)
    from motorcade.orchestrator.spawn import title
    from motorcade.orchestrator.supervisor import Supervisor

    title("supervisor", machine.name)
    return Supervisor(machine, run, line, config=config, accel=accel, paused=paused).run()


def close_all_but(keep: int) -> None:
    """vmmctl's descriptors, and what it inherited, are not ours. 0, 1 and 2 become /dev/null."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.closerange(3, keep)
    os.closerange(keep + 1, (1 << 31) - 1)


def raise_nofile() -> None:
    """A large VM has hundreds of descriptors, all of them here."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def start_log(run: RunDir, level: str) -> None:
    """log/supervisor.log, JSON lines; also stderr, for Python's last words."""
    from motorcade.sidecars.log import JsonFormatter

    fd = run.open_log("supervisor")
    os.dup2(fd, 2)
    os.close(fd)
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter("supervisor"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def fork(machine: Machine, *, config: str, accel: str, paused: bool) -> tuple[int, socket.socket]:
    """Forks the supervisor of a VM; for a process with one thread. Returns its pid and vmmctl's end of the lifeline,
    which the caller owns."""
    ours, theirs = lifeline.pair()
    pid = os.fork()
    if pid == 0:
        status = EXIT_ERROR
        try:
            status = main(machine, theirs, config=config, accel=accel, paused=paused)
        except BaseException as e:
            # Whatever it is, vmmctl must hear of it; it then reads the log too, if there is one by now.
            logging.getLogger("motorcade.supervisor").exception("the supervisor ends")
            what = f"the supervisor failed: {type(e).__name__}: {e}"
            lifeline.send(theirs, event="failed", message=what, status=EXIT_ERROR)
        finally:
            os._exit(status)
    theirs.close()
    return pid, ours
