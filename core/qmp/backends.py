"""Consoles, and the host's threads and memory behind the machine (QEMU's qapi/char.json, misc.json, machine.json)."""

from __future__ import annotations

from motorcade.core.qmp.registry import Context, NoArguments, Result, command


class ChardevInfo(Result, frozen=True):
    """Of query-chardev."""

    label: str
    filename: str
    frontend_open: bool


@command("query-chardev", arguments=NoArguments, returns=list[ChardevInfo])
def query_chardev(ctx: Context, _args: NoArguments) -> list[ChardevInfo]:
    """The consoles and what is behind each."""
    return [ChardevInfo(c.label, c.filename, c.frontend_open) for c in ctx.machine.char_devices()]
