"""vmmctl sidecar debug: a Python prompt inside a sidecar, or a debugger attached to it."""

from __future__ import annotations

import argparse
import os
import select
import shutil
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any

from motorcade.orchestrator.commands.sidecar_common import add_target, find_device, process_of
from motorcade.orchestrator.errors import UserError

if TYPE_CHECKING:
    from motorcade.orchestrator import rundir

_EPILOG = """\
The prompt is there for devices that have `debug: true` in machine.yaml. It is the sidecar's main thread: `device` is
its device, `sidecar` what runs it, `lib` its C part. Ctrl-C interrupts a command, Ctrl-D leaves.

A debugger may hold a sidecar as long as it likes: nobody takes it for hung.

examples:
  vmmctl sidecar debug web root                 the prompt
  echo 'device.stats()' | vmmctl sidecar debug web root
  vmmctl sidecar debug web root --gdb           attach gdb
  vmmctl sidecar debug web root --gdb -batch -ex 'thread apply all bt'
  vmmctl sidecar debug web root --py-spy        where its Python is, once
  vmmctl sidecar debug web root --py-spy top
"""


def add_parser(sub: Any) -> None:
    """Adds ``debug``."""
    p = sub.add_parser(
        "debug",
        help="a Python prompt inside it, or gdb or py-spy attached to it",
        description="Open a Python prompt inside a sidecar, or attach a debugger to it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_target(p)
    how = p.add_mutually_exclusive_group()
    rest = argparse.REMAINDER
    how.add_argument("--gdb", metavar="ARG", nargs=rest, help="attach gdb; what follows are gdb's own arguments")
    how.add_argument("--py-spy", metavar="ARG", nargs=rest, help="run py-spy on it; what follows are its own (dump)")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Becomes the debugger, or the terminal of the prompt."""
    vm = find_device(args.name, args.device)
    if args.gdb is None and args.py_spy is None:
        return _prompt(vm, args.device)
    return _attach(vm, args)


def _attach(vm: rundir.Vm, args: argparse.Namespace) -> int:
    if vm.state.get("accel") == "box":
        raise UserError(f"{vm.name} runs in the box: vmmctl box run -- vmmctl sidecar debug ... is the way there")
    pid = str(process_of(vm, args.device)["pid"])
    if args.gdb is not None:
        command = [_program("gdb", "apt install gdb"), "-q", "-p", pid, *args.gdb]
    else:
        what = args.py_spy or ["dump"]
        command = [_program("py-spy", "pip install py-spy"), what[0], "--pid", pid, *what[1:]]
    sys.stdout.flush()
    os.execv(command[0], command)


def _program(name: str, how: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise UserError(f"{name} is not installed ({how})")
    return found


def _prompt(vm: rundir.Vm, device: str) -> int:
    path = vm.path / f"debug-{device}.sock"
    if not path.exists():
        raise UserError(
            f"{device} has no prompt: give it `debug: true` in machine.yaml and start {vm.name} again (--gdb and "
            "--py-spy work on any)"
        )
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(str(path))
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    with sock:
        while True:
            try:
                if not _relay(sock):
                    return 0
            except KeyboardInterrupt:
                if vm.state.get("accel") != "box":
                    # What it runs now, if it runs anything.
                    os.kill(int(process_of(vm, device)["pid"]), signal.SIGINT)


def _relay(sock: socket.socket) -> bool:
    """Lines to the prompt, and what it says; False at the end of either."""
    listening = [sys.stdin.fileno(), sock.fileno()]
    while True:
        ready = select.select(listening, [], [])[0]
        if sock.fileno() in ready:
            data = sock.recv(65536)
            if not data:
                return False
            sys.stdout.write(data.decode(errors="replace"))
            sys.stdout.flush()
        if sys.stdin.fileno() in ready:
            line = os.read(sys.stdin.fileno(), 65536)
            if line:
                sock.sendall(line)
            else:  # Ctrl-D, or a script's end: what was asked is still answered
                sock.shutdown(socket.SHUT_WR)
                listening = [sock.fileno()]
