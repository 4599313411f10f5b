"""The main of every sidecar: its process's story, up to the loop of sidecar.py."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from motorcade.sidecars import ground, sandbox
from motorcade.sidecars.device import Device
from motorcade.sidecars.ground import Ground
from motorcade.sidecars.sidecar import HELLO_TIMEOUT as HELLO_TIMEOUT
from motorcade.sidecars.sidecar import Sidecar, device_id

if TYPE_CHECKING:
    from motorcade.proto.framing import ControlClient
    from motorcade.proto.memory import Region
    from motorcade.proto.messages import Boot

log = logging.getLogger("motorcade.sidecar")


def main(device_class: type[Device], argv: Sequence[str] | None = None) -> int:
    """``python -m motorcade.sidecars.KIND --boot-fd N``. Returns the exit status."""
    parser = argparse.ArgumentParser(description="A Motorcade device backend; started by the supervisor.")
    parser.add_argument("--boot-fd", type=int, required=True, help="descriptor of the SOCK_SEQPACKET boot socket")
    options = parser.parse_args(argv)
    from motorcade.proto import boot

    try:
        boot_socket = boot.from_fd(options.boot_fd)
    except boot.BootError as e:
        parser.error(str(e))
    return run(device_class, boot_socket)


@dataclass(frozen=True)
class Ahead:
    """What a sidecar has before its Boot."""

    ground: Ground
    client: ControlClient


def prepare(device_class: type[Device], fds: Mapping[str, int], regions: Sequence[Region], *, lazy: bool) -> Ahead:
    """For ``run``; the process has one thread, and drops its privileges. ``fds``, which stay the caller's: ``memory``
    and, perhaps, ``userfaultfd``. Errors: as ground.make."""
    from motorcade.proto.framing import ControlClient

    sandbox.load(device_class.sandbox_role, tuple(device_class.system_calls), tuple(device_class.late_imports))
    made = ground.make(device_class.ffi, device_class.lib, device_class.sandbox_role, fds, regions, lazy=lazy)
    return Ahead(made, ControlClient())


def run(device_class: type[Device], boot_socket: socket.socket, ahead: Ahead | None = None) -> int:
    """The story of a sidecar process, which owns ``boot_socket`` and has no other thread yet, but ZeroMQ's where it has
    been prepared. Returns its exit status: 0 after an orderly end, 1 after a failure, which is in the log and, for the
    supervisor, in a Life message."""
    from motorcade.proto import boot as boot_proto
    from motorcade.proto.messages import Failed
    from motorcade.proto.versions import negotiate

    try:
        boot, fds = boot_proto.recv_boot(boot_socket)
        open_log(fds.get("log"), boot)
        negotiate(boot.protocol_version)
        if "debug" in fds:
            importlib.import_module("motorcade.sidecars.prompt")  # later there are no files
        if ahead is None:
            ahead = prepare(device_class, fds, boot.regions, lazy=boot.lazy)
        ahead.ground.check(boot, fds["memory"])
        if not device_class.keeps_memory:
            os.close(fds.pop("memory"))
        device = device_class(boot, fds, ahead.ground.memory)
        # Now, so that the core goes on meanwhile: it waits for the hello, which comes from inside the sandbox.
        boot_proto.send_life(boot_socket, ahead.ground.ready, ahead.ground.descriptors)
        # The core expects one process a device, so that the connection is made when it expects this one.
        if boot.standby and not await_turn(boot_socket):
            return 0
        reach(ahead.client, boot, fds)
        device.close_sandbox(boot_socket.fileno())
        return Sidecar(device, boot_socket, ahead.client).loop()
    except Exception as e:
        log.exception("the sidecar ends")
        boot_proto.send_life(boot_socket, Failed(f"{type(e).__name__}: {e}"[:2000]))
        return 1


def await_turn(boot_socket: socket.socket) -> bool:
    """Waits until the one that still serves has made way; False where it will not, or nobody is there to say so."""
    from motorcade.proto.boot import recv_life
    from motorcade.proto.messages import Go

    while (life := recv_life(boot_socket)) is not None:
        if isinstance(life, Go):
            return True
    return False


def open_log(fd: int | None, boot: Boot) -> None:
    """Makes ``fd`` stderr, for the logging module, for Python's and C's last words, one JSON object a line."""
    import faulthandler

    from motorcade.sidecars import log as logs

    if fd is not None:
        os.dup2(fd, 2)
        os.close(fd)
    faulthandler.enable()
    logs.start(device_id(boot), boot.log_level)


def reach(client: ControlClient, boot: Boot, fds: dict[str, int]) -> None:
    """Connects to the core. Its socket is found from the run directory that the Boot brought, since this process has an
    empty root by now; that descriptor is closed. Errors: TimeoutError; KeyError without it."""
    run = fds.pop("run")
    here = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)  # a link's directory, perhaps
    try:
        os.fchdir(run)
        client.connect(Path(boot.control_socket).name, device_id(boot))
        client.wait_connected(HELLO_TIMEOUT)
    finally:
        os.fchdir(here)
        os.close(here)
        os.close(run)


def run_and_exit(device_class: type[Device], boot_socket: socket.socket) -> None:
    """For a forked child: ``run`` and leave without the parent's clean-up (exit handlers, buffers)."""
    status = 1
    try:
        status = run(device_class, boot_socket)
    finally:
        logging.shutdown()
        sys.stdout.flush()
        os._exit(status)
