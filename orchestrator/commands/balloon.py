"""vmmctl balloon: how much of its memory a VM has, and making it less or more while it runs."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from motorcade.orchestrator.commands.common import ago, find_running, size, tell
from motorcade.orchestrator.errors import EXIT_ERROR, EXIT_OK, EXIT_TIMEOUT, EXIT_USAGE, UserError

if TYPE_CHECKING:
    from motorcade.orchestrator.qmpclient import QmpClient

_PAGE = 4096

_EPILOG = """\
SIZE is what the guest is to be left with: bytes, or text such as 256M or 2G; `all` gives it everything back. The
guest's driver does the work, as far as the guest can do without the memory, and the host has it at once. The command
waits as long as that gets on, and says what came of it. machine.yaml has to say `balloon: true`, and the guest needs a
driver (Linux: modprobe virtio_balloon).

examples:
  vmmctl balloon web                how much it has, and what it says of its memory
  vmmctl balloon web 256M           leave it 256 MiB; the rest goes back to the host
  vmmctl balloon web all            give it everything back
  vmmctl balloon --no-wait web 1G   tell it, and do not wait

exit status: 4 when the guest stopped getting on before it was there: it needs what it has.
"""


def add_parser(commands: Any) -> None:
    """Adds ``balloon``."""
    p = commands.add_parser(
        "balloon",
        help="take memory from a running VM, or give it back",
        description="Show how much of its memory a VM has, or change that while it runs.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--json", action="store_true", help="say it as JSON")
    p.add_argument("--no-wait", action="store_true", help="do not wait for the guest")
    p.add_argument(
        "--timeout",
        type=_seconds,
        default=20.0,
        metavar="S",
        help="give up when the guest has got nowhere for S seconds (default: %(default)g)",
    )
    p.add_argument("name", metavar="NAME")
    p.add_argument("size", metavar="SIZE", nargs="?")
    p.set_defaults(run=run)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of seconds")
    return value


def run(args: argparse.Namespace) -> int:
    """See the module. Errors: UserError where the VM has no balloon, or SIZE is none of its."""
    vm = find_running(args.name)
    from motorcade.orchestrator.qmpclient import QmpClient, QmpError

    with QmpClient(vm.path / "qmp.sock") as qmp:
        try:
            now = qmp.execute("x-motorcade-balloon-stats")
            status = EXIT_OK if args.size is None else _set(args, qmp, now)
            now = qmp.execute("x-motorcade-balloon-stats")
        except QmpError as e:
            if e.error is not None and e.error.get("class") == "DeviceNotActive":
                text = f"{args.name} has no balloon: its machine.yaml has to say `balloon: true`"
                raise UserError(text) from None
            raise
    if args.json:
        print(json.dumps(now))
    else:
        _show(args.name, now)
    return status


def _set(args: argparse.Namespace, qmp: QmpClient, now: dict[str, Any]) -> int:
    """Tells the guest, and waits."""
    wanted = _wanted(args.size, now["size"])
    qmp.execute("balloon", {"value": wanted})
    if args.no_wait:
        return EXIT_OK
    if not now["driver"]:
        tell(f"{args.name}: the guest has no driver for its balloon, and will hear of it when it has one (Linux: "
             "modprobe virtio_balloon)")  # fmt: skip
        return EXIT_ERROR
    target = now["size"] - (now["size"] - wanted) // _PAGE * _PAGE
    on_terminal = sys.stderr.isatty()
    actual, moved = now["actual"], time.monotonic()
    while actual != target:
        left = moved + args.timeout - time.monotonic()
        if left <= 0:
            tell(f"{args.name}: the guest is at {_mib(actual)} and gets no nearer to {_mib(target)}; it goes on trying")
            return EXIT_TIMEOUT
        try:
            event = qmp.wait_event(left)
        except EOFError:
            raise UserError(f"{args.name} ended meanwhile") from None
        if event is not None and event["event"] == "BALLOON_CHANGED":
            if abs(event["data"]["actual"] - target) < abs(actual - target):
                moved = time.monotonic()
            actual = event["data"]["actual"]
            if on_terminal:
                print(f"\r{_mib(actual)} of {_mib(target)} wanted   ", end="", file=sys.stderr, flush=True)
    if on_terminal:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    return EXIT_OK


def _wanted(text: str, most: int) -> int:
    """Bytes. Errors: UserError."""
    from motorcade.orchestrator.machine import parse_size

    if text == "all":
        return most
    try:
        wanted = int(parse_size(text))
    except ValueError as e:
        raise UserError(f"{e}, or all", EXIT_USAGE) from None
    if not wanted:
        raise UserError("a guest cannot be left with nothing", EXIT_USAGE)
    if wanted > most:
        raise UserError(f"{text} is more than the {size(most)} that the machine was started with", EXIT_USAGE)
    return wanted


def _mib(number: int) -> str:
    return f"{number / (1 << 20):.0f} MiB" if number % (1 << 20) == 0 else f"{number / (1 << 20):.1f} MiB"


def _show(name: str, now: dict[str, Any]) -> None:
    whole, actual, target, stats = now["size"], now["actual"], now["target"], now["stats"]
    print(f"{name} has {_mib(actual)} of its {_mib(whole)}; {_mib(whole - actual)} are in the balloon")
    if target != actual:
        print(f"it is to have {_mib(target)}" + ("" if now["driver"] else ", but has no driver for its balloon"))
    parts = (("free", "stat-free-memory"), ("available", "stat-available-memory"), ("caches", "stat-disk-caches"))
    if said := [f"{word} {_mib(stats[key])}" for word, key in parts if key in stats]:
        print(f"the guest says ({ago(now['last-update'])} ago): {', '.join(said)}")
