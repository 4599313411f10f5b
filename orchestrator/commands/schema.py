"""vmmctl schema: machine.yaml's JSON Schema, for editors."""

from __future__ import annotations

import argparse
from typing import Any

_EPILOG = """\
In an editor with yaml-language-server:
  vmmctl schema > ~/.config/motorcade.schema.json
and as the first line of machine.yaml:
  # yaml-language-server: $schema=/home/ME/.config/motorcade.schema.json
"""


def add_parser(commands: Any) -> None:
    """Adds ``schema``."""
    p = commands.add_parser(
        "schema",
        help="print machine.yaml's JSON Schema",
        description="Print the JSON Schema of machine.yaml.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints it."""
    import json

    from motorcade.orchestrator.machine import schema

    print(json.dumps(schema(), indent=1))
    return 0
