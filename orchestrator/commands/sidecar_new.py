"""vmmctl sidecar new: a package that is a new kind of sidecar, to be filled in (docs/write-a-sidecar.md)."""

from __future__ import annotations

import argparse
import keyword
import re
from pathlib import Path
from typing import Any

from motorcade.orchestrator import skeleton
from motorcade.orchestrator.errors import EXIT_USAGE, UserError

_KIND = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def add_parser(sub: Any) -> None:
    """Adds ``new`` to the commands of ``sidecar``."""
    new = sub.add_parser("new", help="write the skeleton of a new kind", description=__doc__)
    new.add_argument("kind", metavar="KIND", help="what machine.yaml will call it: small letters, digits and -")
    new.add_argument("--into", metavar="FOLDER", type=Path, help="where (default: ./KIND); must not exist")
    new.set_defaults(run=run_new)


def run_new(args: argparse.Namespace) -> int:
    """Writes it all, or nothing."""
    from motorcade.sidecars import kinds

    kind: str = args.kind
    if not _KIND.fullmatch(kind) or len(kind) > 31 or keyword.iskeyword(kind):
        raise UserError(f"'{kind}' cannot be a kind: small letters, digits and -, at most 31, no Python keyword",
                        EXIT_USAGE)  # fmt: skip
    if kind in kinds.RESERVED:
        raise UserError(f"'{kind}' cannot be the kind's name: it is one of Motorcade's own", EXIT_USAGE)
    folder: Path = args.into or Path(kind)
    try:
        folder.mkdir()
    except FileExistsError:
        raise UserError(f"{folder} is there already") from None
    for name, text in skeleton.files(kind).items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        print(path)
    return 0
