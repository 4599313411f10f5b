"""vmmctl box: a small Linux with a complete KVM. The work is in orchestrator/box/."""

from __future__ import annotations

from typing import Any

from motorcade.orchestrator.box import cli


def add_parser(commands: Any) -> None:
    """Adds ``box`` with its own commands."""
    cli.add_parser(commands)
