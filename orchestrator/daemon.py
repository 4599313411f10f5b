"""The supervisor's process: how vmmctl forks it, and what it is before it is a Supervisor."""

from __future__ import annotations

import gc
import os
import signal
import socket
from typing import TYPE_CHECKING, NamedTuple

from motorcade.orchestrator import lifeline
from motorcade.orchestrator.errors import EXIT_ERROR, EXIT_OK, UserError

if TYPE_CHECKING:
    from motorcade.orchestrator.machine import Machine
    from motorcade.orchestrator.rundir import RunDir

_MAX_ORDER = 1 << 20  # bytes


class Order(NamedTuple):
    """The VM that vmmctl wants. ``config``: the path of machine.yaml, for people."""

    machine: Machine
    config: str
    accel: str
    paused: bool


def fork() -> tuple[int, socket.socket]:
    """Forks a supervisor that has no VM yet: it loads its code while vmmctl reads machine.yaml, which are the two
    longest parts of a start. For a process with one thread. Returns its pid and vmmctl's end of the lifeline, which
    the caller owns; closing it without ``start`` makes the process go away.
    """
    ours, theirs = lifeline.pair()
    pid = os.fork()
    if pid == 0:
        status = EXIT_ERROR
        try:
            status = main(theirs)
        except BaseException as e:
            # Whatever it is, vmmctl must hear of it; the traceback is in the log, if there is one by now.
            import logging

            logging.getLogger("motorcade.supervisor").exception("the supervisor ends")
            what = f"the supervisor failed: {type(e).__name__}: {e}"
            lifeline.send(theirs, event="failed", message=what, status=EXIT_ERROR)
        finally:
            os._exit(status)
    theirs.close()
    return pid, ours


def start(line: socket.socket, order: Order) -> None:
    """Gives the forked supervisor its VM. Errors: UserError where it is gone."""
    import pickle  # of our own types, between two halves of one program

    data = pickle.dumps(order)
    try:
        if line.send(data, socket.MSG_NOSIGNAL) != len(data):
            raise UserError("the machine's description is too large")
    except (BrokenPipeError, ConnectionResetError) as e:
        last = lifeline.receive(line) or {}  # its last words
        raise UserError(last.get("message", f"the supervisor is gone: {e.strerror}")) from None
    except OSError as e:
        raise UserError(f"the machine's description cannot be handed over: {e.strerror}") from None


def main(line: socket.socket) -> int:
    """The supervisor's process, with ``line``, its end of the lifeline. Returns its exit status."""
    leave_vmmctl(line.fileno())
    # Imports make no garbage worth looking for; frozen, their pages stay shared with the children.
    gc.disable()
    preload()
    gc.freeze()
    gc.enable()
    order = receive(line)
    if order is None:
        return EXIT_OK
    from motorcade.orchestrator.rundir import RunDir

    machine = order.machine
    try:
        sockets = tuple(f"console-{c.id}.sock" for c in machine.consoles)
        run = RunDir.acquire(machine.name, sockets)
    except UserError as e:
        lifeline.send(line, event="failed", message=str(e), status=e.status)
        return e.status
    start_log(run, machine.log_level)
    from motorcade.orchestrator.spawn import title

    title("supervisor", machine.name)
    if order.accel == "box":
        from motorcade.orchestrator.boxed import BoxedVm

        return BoxedVm(machine, run, line, config=order.config, paused=order.paused).run()
    from motorcade.orchestrator.supervisor import Supervisor

    return Supervisor(machine, run, line, config=order.config, accel=order.accel, paused=order.paused).run()


def leave_vmmctl(line: int) -> None:
    """Away from vmmctl's terminal, signals, folder and descriptors; only ``line`` stays."""
    os.setsid()
    os.umask(0o077)
    os.chdir("/")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    close_all_but(line)
    raise_nofile()


def preload() -> None:
    """What every VM needs, in the order of how long it takes."""
    from motorcade.orchestrator import supervisor
    from motorcade.orchestrator.spawn import load_mains

    assert supervisor.Supervisor is not None  # imported for its sake
    load_mains({"serial"})


def receive(line: socket.socket) -> Order | None:
    """The order; None when vmmctl has thought better of it."""
    import pickle

    data = line.recv(_MAX_ORDER)
    order = pickle.loads(data) if data else None
    assert order is None or isinstance(order, Order)
    return order


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

    from motorcade.sidecars import log as logs

    fd = run.open_log("supervisor")
    os.dup2(fd, 2)
    os.close(fd)
    logs.start("supervisor", level, limited=False)
