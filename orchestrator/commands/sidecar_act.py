"""vmmctl sidecar pause, resume: one device comes to rest, and goes on."""

from __future__ import annotations

import argparse
from typing import Any

from motorcade.orchestrator.commands.sidecar_common import add_target, ask, find_device


def add_parser(sub: Any) -> None:
    """Adds ``pause`` and ``resume``."""
    pause = sub.add_parser(
        "pause",
        help="bring one to rest",
        description="Bring a sidecar to rest: it finishes what it has in hand, takes nothing more, and raises no "
        "interrupt. The guest waits for it. Snapshots, resets and the VM's end work as ever.",
    )
    add_target(pause)
    pause.set_defaults(run=lambda args: _tell(args, "pause"))
    resume = sub.add_parser("resume", help="let a paused one go on", description="Let a paused sidecar go on.")
    add_target(resume)
    resume.set_defaults(run=lambda args: _tell(args, "resume"))


def _tell(args: argparse.Namespace, what: str) -> int:
    vm = find_device(args.name, args.device)
    # A disk at rest has flushed: that may take its time.
    ask(vm, f"x-motorcade-sidecar-{what}", {"id": args.device}, timeout=40.0)
    return 0
