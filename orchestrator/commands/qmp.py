"""vmmctl qmp: one QMP command, or a prompt."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from motorcade.orchestrator.commands.common import find_running
from motorcade.orchestrator.errors import EXIT_ERROR, EXIT_USAGE, UserError

if TYPE_CHECKING:
    from motorcade.orchestrator.qmpclient import QmpClient

_EPILOG = """\
examples:
  vmmctl qmp web query-status
  vmmctl qmp web stop
  vmmctl qmp web x-motorcade-sidecar-stats id=root
  vmmctl qmp web                      a prompt; events are shown as they come, Ctrl-D leaves
  vmmctl qmp web < commands           one command a line; stops at the first error

A value is JSON where it can be (true, 5, "5", [1,2]), else text. query-commands lists what there is.
"""


def add_parser(commands: Any) -> None:
    """Adds ``qmp``."""
    p = commands.add_parser(
        "qmp",
        help="talk QMP to a VM",
        description="Send one QMP command to a VM and print what it returns; without one, a prompt.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("name", metavar="NAME")
    p.add_argument("qmp_command", metavar="COMMAND", nargs="?")
    p.add_argument("arguments", metavar="KEY=VALUE|JSON", nargs="*")
    p.add_argument("--timeout", type=float, default=30.0, metavar="SECONDS", help="for the answer (default 30)")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """See the module."""
    vm = find_running(args.name)
    request = parse(args.qmp_command, args.arguments) if args.qmp_command else None
    from motorcade.orchestrator.qmpclient import QmpClient

    with QmpClient(vm.path / "qmp.sock", timeout=args.timeout) as qmp:
        if request is not None:
            _print(qmp.send(request, request["execute"]))
            return 0
        return _prompt(qmp) if sys.stdin.isatty() else _script(qmp)


def parse(command: str, arguments: list[str]) -> dict[str, Any]:
    """A QMP request from words. Errors: UserError."""
    if command.startswith("{"):
        request = _json_object(command)
        if not isinstance(request.get("execute"), str) or arguments:
            raise UserError('give a whole request, {"execute": ...}, or a command and its arguments', EXIT_USAGE)
        return request
    request = {"execute": command}
    values: dict[str, Any] = {}
    for word in arguments:
        if word.startswith("{"):
            values.update(_json_object(word))
            continue
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(f"'{word}' is neither KEY=VALUE nor a JSON object", EXIT_USAGE)
        try:
            values[key] = json.loads(value)
        except ValueError:
            values[key] = value
    if values:
        request["arguments"] = values
    return request


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as e:
        raise UserError(f"not JSON: {e}", EXIT_USAGE) from None
    if not isinstance(value, dict):
        raise UserError("a JSON object is needed", EXIT_USAGE)
    return value


def _split(line: str) -> tuple[str, list[str]]:
    import shlex

    if line.startswith("{"):
        return line, []
    try:
        words = shlex.split(line)
    except ValueError as e:
        raise UserError(f"{e}", EXIT_USAGE) from None
    return words[0], words[1:]


def _print(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False), flush=True)


def _script(qmp: QmpClient) -> int:
    for line in sys.stdin:
        if line.strip() and not line.startswith("#"):
            request = parse(*_split(line.strip()))
            _print(qmp.send(request, request["execute"]))
    return 0


def _prompt(qmp: QmpClient) -> int:
    import readline

    names = sorted(c["name"] for c in qmp.execute("query-commands"))
    readline.set_completer(lambda text, i: [n for n in names if n.startswith(text)][i])
    readline.set_completer_delims(" ")
    readline.parse_and_bind("tab: complete")
    version = qmp.greeting["QMP"].get("version", {}).get("package", "")
    print(f"{version}; Tab completes, Ctrl-D leaves")
    while True:
        try:
            line = input("qmp> ").strip()
        except EOFError:
            print()
            return 0
        try:
            if line:
                request = parse(*_split(line))
                _print(qmp.send(request, request["execute"]))
            _show_events(qmp)
        except EOFError:
            print("the VM has ended")
            return 0
        except UserError as e:
            print(e, file=sys.stderr)
            if getattr(e, "error", {}) is None:  # the connection, not the command
                return EXIT_ERROR


def _show_events(qmp: QmpClient) -> None:
    """Those that have come since the last command."""
    while event := qmp.wait_event(0.0):
        print(f"{event['event']} {json.dumps(event.get('data', {}))}")
