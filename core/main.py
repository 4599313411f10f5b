"""The core process, from its Boot to the VM's end."""

from __future__ import annotations

import faulthandler
import logging
import signal
import socket
import traceback

from motorcade.core import blank as blank_vm
from motorcade.core._native import ffi, lib
from motorcade.core.blank import Blank
from motorcade.core.boot import unpack
from motorcade.core.boot.image import FileImage
from motorcade.core.loop import Loop
from motorcade.core.machine import DETAIL_MAX, Machine
from motorcade.core.qmp.server import QmpServer
from motorcade.proto import boot as bootlink
from motorcade.proto import messages
from motorcade.sidecars import log as logs
from motorcade.sidecars import sandbox

log = logging.getLogger(__name__)


def run(boot_socket: socket.socket, blank: Blank | None = None) -> int:
    """The core's main. Returns the exit status that the VM's end asks for; owns ``boot_socket``.

    ``blank``: what there is already; then the process has given up its privileges, and has threads of ZeroMQ's.
    """
    boot, fds = bootlink.recv_boot(boot_socket)
    start_log(boot.log_level)
    if not isinstance(boot.role, messages.CoreBoot):
        raise bootlink.BootError("this is the core; the Boot is for a sidecar")
    # The terminal's Ctrl-C goes to vmmctl, which asks for an orderly end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        if blank is None:
            blank = blank_vm.make(fds, boot.regions, lazy=boot.lazy)
        ground, server = blank.ground, blank.server
        ground.check(boot, fds["memory"])
        loop = Loop()
        machine = Machine(boot, fds, ground.memory, loop, server, boot_socket, blank.vm)
        # Of whoever has the pid from a pidfile: an orderly end. The handler runs on this thread, between two bytecodes.
        signal.signal(signal.SIGTERM, lambda *_: loop.call_soon(machine.shut_down))
        server.bind(boot.control_socket, fds.pop("control"))
        qmp = QmpServer(loop.outer, machine, [fd for label, fd in sorted(fds.items()) if label.startswith("qmp.")])
        loop.add_deadlines(qmp.next_deadline, qmp.expire)
        machine.on_event = qmp.emit
        bootlink.send_life(boot_socket, ground.ready, ground.descriptors)
        machine.start()
        if "kernel" in fds:
            unpack.import_for(FileImage(fds["kernel"], boot.role.kernel_path))  # a reset may have to
        # All is open, and the vCPUs have not run yet.
        sandbox.close(ffi, lib, "core", "core", boot_socket.fileno())
    except Exception as e:
        # Whatever it is, the person at vmmctl must read it; the traceback is in the log.
        log.exception("the core cannot start")
        bootlink.send_life(boot_socket, messages.Failed(str(e) or type(e).__name__))
        return 1
    try:
        loop.run()
        ended = machine.ended or messages.Ended(1, "internal-error", "the main loop ended by itself")
    except Exception:
        # Our own bug. The vCPUs end with the process; the sidecars flush when their connection does.
        log.exception("the core fails")
        ended = messages.Ended(1, "internal-error", traceback.format_exc()[-DETAIL_MAX:])
    # First of all: whatever the clean-up meets, the reason is known.
    bootlink.send_life(boot_socket, ended)
    qmp.close()
    machine.close()
    return ended.status


def start_log(level: str) -> None:
    """JSON lines on stderr, which the supervisor has made the core's log file."""
    faulthandler.enable()
    logs.start("core", level)
