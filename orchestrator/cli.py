"""vmmctl: the command line. Each command is in commands/; what is slow to import is imported by those that need it."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from motorcade import __version__
from motorcade.orchestrator.commands import (
    balloon,
    box,
    clone,
    console,
    device,
    doctor,
    down,
    dump,
    logs,
    metrics,
    ps,
    qmp,
    restore,
    run,
    save,
    schema,
    sidecar,
    snapshot,
    template,
    top,
    up,
    zygote,
)
from motorcade.orchestrator.errors import EXIT_ERROR, EXIT_OK, EXIT_USAGE, UserError

_EPILOG = """\
examples:
  vmmctl doctor                       what this host can do
  vmmctl up machine.yaml              start a VM and attach to its console (Ctrl-] leaves it running)
  vmmctl up -d machine.yaml           start it in the background
  vmmctl run -- -machine microvm ...  start it from QEMU's or StratoVirt's command line
  vmmctl ps                           what runs
  vmmctl console web                  attach again, and see what was missed
  vmmctl qmp web query-status         one QMP command
  vmmctl top                          what VMs and their device processes do and cost, live
  vmmctl down web                     press the power button, and wait
  vmmctl snapshot web /templates/web  freeze it into a template
  vmmctl clone /templates/web -n 10   ten VMs that go on from there

exit status: 0 the guest powered off, or the command did its work; 1 an error; 2 the command line or
machine.yaml is wrong; 3 no such VM; 4 the guest did not do in time what it was asked to.

environment: MOTORCADE_RUN_DIR, where run directories are (default /run/motorcade for root, else
$XDG_RUNTIME_DIR/motorcade).
"""


class _Parser(argparse.ArgumentParser):
    """Says what is near to what was typed, and where to read on."""

    def error(self, message: str) -> NoReturn:
        """See ArgumentParser."""
        if match := re.fullmatch(r"argument (?:COMMAND|ACTION): invalid choice: '(.*)' \(choose from (.*)\)", message):
            import difflib

            names = re.findall(r"'([^']+)'", match[2])
            close = difflib.get_close_matches(match[1], names, 1)
            hint = f"; did you mean {close[0]}?" if close else f" (there are: {', '.join(names)})"
            message = f"there is no command {match[1]}{hint}"
        self.print_usage(sys.stderr)
        self.exit(EXIT_USAGE, f"{self.prog}: {message}\n{self.prog} --help says more\n")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    whole = _Parser(
        prog="vmmctl",
        description="Run virtual machines made of small processes.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action="version", version=f"vmmctl {__version__}")
    whole.add_argument("--debug", action="store_true", help="on an error, show where in the code it happened")
    commands = whole.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    daily = (up, run, snapshot, clone, template, save, restore, dump, down, ps, console, logs)
    for module in (*daily, balloon, top, metrics, device, qmp, sidecar, schema, doctor, box, zygote):
        module.add_parser(commands)
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``vmmctl``; the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        parser().print_help(sys.stderr)
        return EXIT_USAGE
    if words[0] == "help":
        words = [*words[1:], "--help"]
    args = parser().parse_args(words)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # vmmctl ps | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as e:
        if args.debug:
            raise
        status, lines = _explain(e)
        for line in lines:
            print(f"vmmctl: {line}", file=sys.stderr)
    return status


def _explain(error: Exception) -> tuple[int, list[str]]:
    """An exit status and what to say. An error that nobody foresaw is named so, with the way to see more."""
    if isinstance(error, UserError):
        return error.status, str(error).splitlines()
    if isinstance(error, OSError) and error.strerror:
        return EXIT_ERROR, [f"{error.filename}: {error.strerror}" if error.filename else error.strerror]
    text = str(error).splitlines() or [""]
    return EXIT_ERROR, [f"{type(error).__name__}: {text[0]} (a bug? vmmctl --debug ... shows where)", *text[1:]]


if __name__ == "__main__":
    raise SystemExit(main())
