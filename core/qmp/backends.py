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


class IoThreadInfo(Result, frozen=True):
    """Of query-iothreads."""

    id: str
    thread_id: int


@command("query-iothreads", arguments=NoArguments, returns=list[IoThreadInfo])
def query_iothreads(_ctx: Context, _args: NoArguments) -> list[IoThreadInfo]:
    """None: each device has a process of its own (x-motorcade-sidecars)."""
    return []


class MemorySizeSummary(Result, frozen=True, omit_defaults=False):
    """Of query-memory-size-summary. Bytes."""

    base_memory: int
    plugged_memory: int = 0


@command("query-memory-size-summary", arguments=NoArguments, returns=MemorySizeSummary)
def query_memory_size_summary(ctx: Context, _args: NoArguments) -> MemorySizeSummary:
    """The RAM that the machine was started with; none can be plugged in."""
    return MemorySizeSummary(ctx.machine.memory_size)
