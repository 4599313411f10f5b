"""vmmctl metrics: what Prometheus would be told of a VM."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from motorcade.orchestrator.commands.common import find_running
from motorcade.orchestrator.errors import UserError


def add_parser(commands: Any) -> None:
    """Adds ``metrics``."""
    p = commands.add_parser(
        "metrics",
        help="a VM's Prometheus metrics",
        description="Print a VM's metrics in Prometheus' text format: what its processes cost, and what its queues "
        "have done. A scraper gets the same from metrics.sock in the run directory, or from the loopback address that "
        "`metrics` in machine.yaml names.",
        epilog="example: curl --unix-socket /run/motorcade/web/metrics.sock http://web/metrics",
    )
    p.add_argument("name", metavar="NAME")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """As any scraper asks."""
    from motorcade.orchestrator.traceclient import connect

    vm = find_running(args.name)
    path = vm.path / "metrics.sock"
    with connect(path) as sock:
        try:
            sock.sendall(f"GET /metrics HTTP/1.1\r\nHost: {vm.name}\r\n\r\n".encode())
            data = b""
            while more := sock.recv(1 << 20):
                data += more
        except OSError as e:
            raise UserError(f"{path}: {e.strerror or e}") from None
    head, _, body = data.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise UserError(f"{path}: {head.partition(bytes([13]))[0].decode(errors='replace') or 'no answer'}")
    sys.stdout.write(body.decode())
    return 0
