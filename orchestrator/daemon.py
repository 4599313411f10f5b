"""The supervisor's process: how vmmctl forks it, and what it is before it is a Supervisor."""

from __future__ import annotations

import functools
import gc
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import msgspec

from motorcade.orchestrator import lifeline
from motorcade.orchestrator.errors import EXIT_ERROR, EXIT_OK, UserError
from motorcade.orchestrator.frozendisks import Incoming
from motorcade.orchestrator.machine import Machine, decode, encode

if TYPE_CHECKING:
    from motorcade.orchestrator.rundir import RunDir

_MAX_ORDER = 1 << 20  # bytes


class Order(NamedTuple):
    """The VM that vmmctl wants. ``config``: the path of machine.yaml, for people. ``incoming``: it goes on from a
    template. ``pidfile``, ``log_file``: absolute paths, or empty."""

    machine: Machine
    config: str
    accel: str
    paused: bool
    incoming: Incoming | None = None
    pidfile: str = ""
    log_file: str = ""


def fork(shape: dict[str, Any] | None = None) -> tuple[int, socket.socket]:
    """A supervisor that has no VM yet, and vmmctl's end of the lifeline, which the caller owns; closing it without
    ``start`` makes the process go away. For a process with one thread.

    A zygote that runs already forks it: its code is loaded then, and with a ``shape`` (pool.shape) it may have its
    processes already. Else it is forked from here, and loads its code while vmmctl reads machine.yaml, which are the
    two longest parts of a start. So it may be no child of ours: ``lifeline.pidfd`` is how to wait for it.
    """
    from motorcade.orchestrator import zygoteclient

    if (of_zygote := zygoteclient.fork(shape)) is not None:
        return of_zygote
    ours, theirs = lifeline.pair()
    pid = os.fork()
    if pid == 0:
        run(theirs, from_vmmctl)
    theirs.close()
    return pid, ours


def run(line: socket.socket, first: Callable[[socket.socket], bool]) -> NoReturn:
    """The forked process, with its end of the lifeline. Never returns into what its parent was about to do.

    ``first`` makes it what it is while it has no order: ``from_vmmctl``, ``from_zygote``, or, where all is prepared,
    ``take_environment``. It says False when there will be none.
    """
    status = EXIT_ERROR
    try:
        data = line.recv(_MAX_ORDER) if first(line) else b""
        gc.enable()
        # Without an order, vmmctl has thought better of it.
        status = supervise(line, decode_order(data)) if data else EXIT_OK
    except BaseException as e:
        # Whatever it is, vmmctl must hear of it; the traceback is in the log, if there is one by now.
        import logging

        logging.getLogger("motorcade.supervisor").exception("the supervisor ends")
        what = f"the supervisor failed: {type(e).__name__}: {e}"
        lifeline.send(line, event="failed", message=what, status=EXIT_ERROR)
    finally:
        os._exit(status)


def from_vmmctl(line: socket.socket) -> bool:
    """Loads the code, while vmmctl goes on."""
    leave_parent(line.fileno())
    # Imports make no garbage worth looking for; frozen, their pages stay shared with the children.
    gc.disable()
    preload()
    gc.freeze()
    return True


def from_zygote(line: socket.socket) -> bool:
    """The code is there."""
    leave_parent(line.fileno())
    return take_environment(line)


def take_environment(line: socket.socket) -> bool:
    """vmmctl's environment instead of the zygote's."""
    message = lifeline.receive(line)
    if message is None:
        return False
    os.environ.clear()
    os.environ.update(message["environ"])
    return True


def start(line: socket.socket, order: Order) -> None:
    """Gives the forked supervisor its VM. Errors: UserError where it is gone."""
    data = encode_order(order)
    try:
        if line.send(data, socket.MSG_NOSIGNAL) != len(data):
            raise UserError("the machine's description is too large")
    except (BrokenPipeError, ConnectionResetError) as e:
        last = lifeline.receive(line) or {}  # its last words
        raise UserError(last.get("message", f"the supervisor is gone: {e.strerror}")) from None
    except OSError as e:
        raise UserError(f"the machine's description cannot be handed over: {e.strerror}") from None


def encode_order(order: Order) -> bytes:
    """JSON of an order, for decode_order."""
    return msgspec.json.encode(order, enc_hook=encode)


def decode_order(data: bytes) -> Order:
    """The order in ``data``. Errors: msgspec.MsgspecError, where it is none."""
    return _order_decoder().decode(data)


@functools.cache
def _order_decoder() -> msgspec.json.Decoder[Order]:
    """Made once: its tables take milliseconds."""
    return msgspec.json.Decoder(Order, dec_hook=decode)


def supervise(line: socket.socket, order: Order) -> int:
    """The VM's whole life. Returns the exit status."""
    from motorcade.orchestrator.pidfile import PidFile
    from motorcade.orchestrator.rundir import RunDir

    machine = order.machine
    try:
        sockets = tuple(f"console-{c.id}.sock" for c in machine.consoles)
        run = RunDir.acquire(machine.name, sockets)
    except UserError as e:
        lifeline.send(line, event="failed", message=str(e), status=e.status)
        return e.status
    try:
        run.log_file = order.log_file
        run.pidfile = PidFile(order.pidfile) if order.pidfile else None
        start_log(run, machine.log_level)
    except (UserError, OSError) as e:
        run.release()
        what = str(e) if isinstance(e, UserError) else f"log: {order.log_file or e.filename}: {e.strerror}"
        lifeline.send(line, event="failed", message=what, status=EXIT_ERROR)
        return EXIT_ERROR
    from motorcade.orchestrator.spawn import title

    title("supervisor", machine.name)
    if order.accel == "box":
        from motorcade.orchestrator.boxed import BoxedVm

        if run.pidfile is not None:
            run.pidfile.write(os.getpid())  # who stands for it out here
        return BoxedVm(machine, run, line, config=order.config, paused=order.paused, incoming=order.incoming).run()
    from motorcade.orchestrator.supervisor import Supervisor

    return Supervisor(
        machine, run, line, config=order.config, accel=order.accel, paused=order.paused, incoming=order.incoming
    ).run()


def leave_parent(line: int) -> None:
    """Away from the terminal, signals, folder and descriptors of whoever forked us; only ``line`` stays."""
    from motorcade.orchestrator.spawn import default_signals

    os.setsid()
    os.umask(0o077)
    os.chdir("/")
    default_signals()
    close_all_but(line)
    raise_nofile()


def preload() -> None:
    """What every VM needs, in the order of how long it takes."""
    from motorcade.orchestrator import supervisor
    from motorcade.orchestrator.spawn import load_mains

    assert supervisor.Supervisor is not None  # imported for its sake
    load_mains({"serial"})


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
