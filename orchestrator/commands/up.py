"""vmmctl up: start a VM; in a terminal, stay on its console."""

from __future__ import annotations

import argparse
import gc
import socket
from typing import Any

from motorcade.orchestrator.commands.common import tell

_EPILOG = """\
In a terminal, up shows the processes that it started and attaches to the console: the one with backend: terminal,
else ttyS0. Ctrl-] leaves; the VM goes on in the background, and `vmmctl console NAME` comes back to it.
Ctrl-C goes to the guest. Without a terminal the console's output goes to standard output; SIGINT or SIGTERM then
press the guest's power button (a second one ends the VM at once). If vmmctl itself is killed before the VM was
left or sent to the background, the VM ends with it.

examples:
  vmmctl up machine.yaml
  vmmctl up -d machine.yaml && vmmctl console web
  vmmctl up --name web2 machine.yaml          a second VM from the same file
  vmmctl up --paused machine.yaml             start with the CPUs stopped; vmmctl qmp NAME cont
  vmmctl up machine.yaml > boot.log           no terminal: the console's output in a file

exit status: the VM's, which is 0 after the guest powered off; 1 an error, or the VM ended abnormally;
2 machine.yaml or the command line is wrong. With -d: 0 once the VM runs.
"""


def add_parser(commands: Any) -> None:
    """Adds ``up``."""
    p = commands.add_parser(
        "up",
        help="start a VM",
        description="Start the VM that machine.yaml describes (vmmctl schema, docs/machine-yaml.md).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    about = "default: machine.yaml; -: standard input"
    p.add_argument("file", metavar="FILE", nargs="?", default="machine.yaml", help=about)
    p.add_argument("-d", "--detach", action="store_true", help="return when the VM runs, leave it in the background")
    p.add_argument("--paused", action="store_true", help="do not run the CPUs yet")
    p.add_argument("--name", help="instead of the file's name:")
    p.add_argument("--accel", choices=["auto", "kvm", "box"], help="instead of the file's accel:")
    # For the supervisor of a VM in the box: what happens, as JSON lines, instead of the console.
    p.add_argument("--report", action="store_true", help=argparse.SUPPRESS)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """See the module."""
    # Before the fork only what both need, once for the two: they go on side by side from there. The collector would
    # look through all of it several times and find nothing.
    gc.disable()
    import pickle  # noqa: F401

    from motorcade.orchestrator import daemon, machine, rundir  # noqa: F401

    pid, line = daemon.fork()
    try:
        return _run(args, pid, line)
    finally:
        line.close()


def _run(args: argparse.Namespace, pid: int, line: socket.socket) -> int:
    from motorcade.orchestrator import accel, config, daemon, hostcheck, rundir
    from motorcade.orchestrator.commands.foreground import Foreground, Reporter

    gc.freeze()
    gc.enable()
    machine, source = config.load(args.file, name=args.name, accel=args.accel)
    hostcheck.check(machine, source)
    # A VM of that name is the more likely mistake, and quicker to see, than what follows.
    if (vm := rundir.find(machine.name)) is not None and vm.alive:
        raise rundir.Running(f"{machine.name} is running already; --name starts another from the same file")
    chosen = accel.choose(machine.accel)
    if chosen.reason:
        tell(f"{chosen.reason}; running {machine.name} in the box (accel: kvm insists)")
    daemon.start(line, daemon.Order(machine, str(source.path.absolute()), chosen.name, args.paused))
    front = Reporter if args.report else Foreground
    return front(machine.name, pid, line, detach=args.detach).run()
