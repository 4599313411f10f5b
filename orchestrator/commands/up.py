"""vmmctl up: start a VM; in a terminal, stay on its console."""

from __future__ import annotations

import argparse
import gc
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motorcade.orchestrator.commands.common import tell
from motorcade.orchestrator.errors import EXIT_USAGE, UserError

if TYPE_CHECKING:
    from motorcade.orchestrator.config import Source
    from motorcade.orchestrator.frozendisks import Incoming
    from motorcade.orchestrator.machine import Machine

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
  vmmctl up --incoming file:/templates/web    go on from a template (docs/clones.md); what it writes to its disks
                                              is forgotten at its end, unless --keep-overlays or a machine.yaml
                                              says where it goes
  vmmctl up --incoming file:/run/web.state    go on from a state that left RAM in memory_file (docs/qemu-and-xen.md)
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
    about = "default: machine.yaml, or with --incoming file:DIR the template's own; -: standard input"
    p.add_argument("file", metavar="FILE", nargs="?", help=about)
    p.add_argument("-d", "--detach", action="store_true", help="return when the VM runs, leave it in the background")
    p.add_argument("--paused", action="store_true", help="do not run the CPUs yet")
    p.add_argument("--name", help="instead of the file's name:")
    about = "go on from a template, file:DIR; defer: from the one that QMP's migrate-incoming will name"
    p.add_argument("--incoming", metavar="URI", help=about)
    p.add_argument("--same-id", action="store_true", help="of --incoming: the guest keeps its VM generation ID")
    p.add_argument("--generation-id", type=bytes.fromhex, help=argparse.SUPPRESS)
    about = "of --incoming: overlays stay, as FOLDER/NAME-ID.overlay"
    p.add_argument("--keep-overlays", metavar="FOLDER", type=Path, help=about)
    about = "the core's pid is in this file as long as the VM lives"
    p.add_argument("--pidfile", metavar="FILE", type=Path, help=about)
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
        return _start(args, pid, line, *_machine(args))
    finally:
        line.close()


def start(args: argparse.Namespace, machine: Machine, source: Source, incoming: Incoming | None) -> int:
    """Starts ``machine`` as ``up`` does; its exit status. Errors: UserError."""
    from motorcade.orchestrator import daemon

    pid, line = daemon.fork()
    try:
        return _start(args, pid, line, machine, source, incoming)
    finally:
        line.close()


def _start(
    args: argparse.Namespace,
    pid: int,
    line: socket.socket,
    machine: Machine,
    source: Source,
    incoming: Incoming | None,
) -> int:
    from motorcade.orchestrator.commands.foreground import Foreground, Reporter

    pidfile = str(args.pidfile.absolute()) if args.pidfile else ""
    launch(line, machine, source, incoming, paused=args.paused, pidfile=pidfile)
    front = Reporter if args.report else Foreground
    return front(machine.name, pid, line, detach=args.detach).run()


def launch(
    line: socket.socket,
    machine: Machine,
    source: Source,
    incoming: Incoming | None,
    *,
    paused: bool,
    pidfile: str = "",
    log_file: str = "",
) -> None:
    """Gives the supervisor at the other end of ``line`` its VM. Paths are absolute. Errors: UserError."""
    from motorcade.orchestrator import accel, daemon, hostcheck, rundir

    gc.freeze()
    gc.enable()
    hostcheck.check(machine, source, incoming)
    # A VM of that name is the more likely mistake, and quicker to see, than what follows.
    if (vm := rundir.find(machine.name)) is not None and vm.alive:
        raise rundir.Running(f"{machine.name} is running already; {source.another_name}")
    chosen = accel.choose(machine.accel)
    if chosen.reason:
        tell(f"{chosen.reason}; running {machine.name} in the box (accel: kvm insists)")
    daemon.start(line, daemon.Order(machine, source.name, chosen.name, paused, incoming, pidfile, log_file))


def _machine(args: argparse.Namespace) -> tuple[Machine, Source, Incoming | None]:
    """What to start, and what of a template it needs. Errors: UserError."""
    from motorcade.orchestrator import config, restore
    from motorcade.orchestrator.frozendisks import Incoming

    if not args.incoming and (args.same_id or args.keep_overlays):
        raise UserError("--same-id and --keep-overlays go with --incoming", EXIT_USAGE)
    generation_id = b"" if args.same_id else args.generation_id or os.urandom(restore.GENERATION_ID)
    if not args.incoming or args.incoming == "defer":
        if args.file is None and not os.path.lexists("machine.yaml"):
            hint = "vmmctl up FILE names another, vmmctl run starts a VM without one"
            raise UserError(f"there is no machine.yaml here: {hint}", EXIT_USAGE)
        machine, source = config.load(args.file or "machine.yaml", name=args.name, accel=args.accel)
        return machine, source, Incoming(generation_id=generation_id) if args.incoming else None
    plan = restore.read(restore.uri_path(args.incoming))
    machine, source = plan.machine, plan.source
    if args.file is not None:
        machine, source = config.load(args.file, name=args.name, accel=args.accel)
        restore.check(machine, source, plan)
    else:
        machine = restore.renamed(plan.machine, name=args.name, accel=args.accel)
    overlays = args.keep_overlays.absolute() if args.keep_overlays else None
    return machine, source, restore.incoming(machine, plan, generation_id=generation_id, overlays=overlays)
