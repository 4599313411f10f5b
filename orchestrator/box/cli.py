"""``vmmctl box``: run | shell | status | down."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from motorcade.orchestrator.errors import EXIT_NOT_FOUND, EXIT_USAGE, UserError

if TYPE_CHECKING:
    from motorcade.orchestrator.box.vm import Box

_ABOUT = """\
A Linux machine with working KVM, for hosts whose own /dev/kvm cannot run a stock kernel (or is missing):
QEMU emulates an AMD CPU with SVM, and this host's file tree is there under an overlay. What a command
writes in it is forgotten with the box, except below --share. It starts by itself and stays until
`vmmctl box down`."""

_EXAMPLES = """\
examples:
  vmmctl box run -- uname -a
  vmmctl box run --share ./out -- sh -c 'dmesg > out/dmesg.txt'
  vmmctl box run --env DEBUG=1 -- pytest tests/guest
  vmmctl box shell
  vmmctl box down
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds ``box`` and its subcommands; each sets ``run``, which takes the namespace and returns a status."""
    form = argparse.RawDescriptionHelpFormatter
    box = subparsers.add_parser(
        "box", help="a machine with working KVM on hosts that lack it", description=_ABOUT, epilog=_EXAMPLES,
        formatter_class=form,
    )  # fmt: skip
    commands = box.add_subparsers(dest="box_command", metavar="COMMAND", required=True)

    run = commands.add_parser("run", help="run a command in the box", epilog=_EXAMPLES, formatter_class=form)
    _add_start_options(run)
    run.add_argument("--no-tty", action="store_true", help="do not give the command this terminal")
    run.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- COMMAND...", help="program and arguments")
    run.set_defaults(run=_run)

    shell = commands.add_parser("shell", help="an interactive shell in the box, in this directory")
    _add_start_options(shell)
    shell.set_defaults(run=_shell)

    commands.add_parser("status", help="whether the box runs, and since when").set_defaults(run=_status)
    commands.add_parser("down", help="end the box and forget what was written in it").set_defaults(run=_down)


def _add_start_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--share", metavar="PATH", type=Path, action="append", default=[],
        help="what the command writes here is written on the host (repeatable)",
    )  # fmt: skip
    parser.add_argument(
        "--env", metavar="NAME[=VALUE]", action="append", default=[], help="pass this variable, too (repeatable)"
    )
    parser.add_argument("--cpus", type=int, default=2, help="CPUs, if this starts the box (default: 2)")
    parser.add_argument("--memory", type=int, default=4096, metavar="MIB", help="its memory (default: 4096)")


def progress(line: str) -> None:
    """Reports a step of the box's start on standard error."""
    print(f"box: {line}", file=sys.stderr, flush=True)


def _ensure(args: argparse.Namespace) -> "Box":
    from motorcade.orchestrator.box.vm import ensure_box

    return ensure_box(progress, cpus=args.cpus, memory_mib=args.memory)


def _in_box(args: argparse.Namespace, argv: Sequence[str], tty: bool) -> int:
    from motorcade.orchestrator.box.session import carried_environment, run

    for path in args.share:
        if not path.exists():
            raise UserError(f"--share {path}: no such file or directory", EXIT_USAGE)
    return run(_ensure(args), argv, env=carried_environment(args.env), shares=args.share, tty=tty)


def _run(args: argparse.Namespace) -> int:
    argv = args.argv[1:] if args.argv[:1] == ["--"] else args.argv
    if not argv:
        raise UserError("box run: no command given (vmmctl box run -- COMMAND)", EXIT_USAGE)
    return _in_box(args, argv, tty=not args.no_tty and os.isatty(0) and os.isatty(1))


def _shell(args: argparse.Namespace) -> int:
    if not os.isatty(0):
        raise UserError("box shell needs a terminal; use: vmmctl box run -- sh", EXIT_USAGE)
    import pwd

    return _in_box(args, [os.environ.get("SHELL") or pwd.getpwuid(os.geteuid()).pw_shell or "/bin/sh", "-i"], tty=True)


def _status(args: argparse.Namespace) -> int:
    from motorcade.orchestrator.box.vm import find_box

    box = find_box()
    if box is None:
        print("no box runs")
        return EXIT_NOT_FOUND
    minutes = (time.time() - box.started) / 60
    print(f"up for {minutes:.0f} min: {box.cpus} CPUs, {box.memory_mib} MiB, Linux {box.kernel}, qemu pid {box.pid}")
    print(f"console log: {box.console_log}")
    return 0


def _down(args: argparse.Namespace) -> int:
    from motorcade.orchestrator.box.vm import stop_box

    print("box: ended" if stop_box() else "no box runs")
    return 0
