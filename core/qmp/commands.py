"""The protocol's own commands: negotiation, what there is, descriptors by name.

Shapes of all commands are QEMU's (qapi/*.json) unless the name begins with ``x-motorcade-``.
"""

from __future__ import annotations

import os

import msgspec

from motorcade import __version__
from motorcade.core.qmp.errors import QmpError
from motorcade.core.qmp.events import EVENTS
from motorcade.core.qmp.registry import Arguments, Context, Empty, NoArguments, Result, command


class Version(Result, frozen=True, omit_defaults=False):
    """The numbers of a version."""

    micro: int
    minor: int
    major: int


class VersionInfo(Result, frozen=True):
    """Of query-version and the greeting. The member's name is the protocol's; the numbers are Motorcade's."""

    qemu: Version
    package: str


def version_info() -> VersionInfo:
    """Our version."""
    major, minor, micro = (
        int("".join(filter(str.isdigit, part)) or 0) for part in (__version__ + ".0.0").split(".")[:3]
    )
    return VersionInfo(Version(micro, minor, major), f"motorcade-{__version__}")


class Capabilities(Arguments, frozen=True):
    """Of qmp_capabilities."""

    enable: list[str] = msgspec.field(default_factory=list)


@command("qmp_capabilities", arguments=Capabilities)
def qmp_capabilities(_ctx: Context, args: Capabilities) -> Empty:
    """Ends the negotiation, which is not required; there are no capabilities to enable."""
    if args.enable:
        raise QmpError(f"Capability '{args.enable[0]}' is not available: the greeting offers none")
    return Empty()


@command("query-version", arguments=NoArguments, returns=VersionInfo)
def query_version(_ctx: Context, _args: NoArguments) -> VersionInfo:
    """The version of this VMM."""
    return version_info()


class Named(Result, frozen=True):
    """An entry of query-commands and query-events; the answer of query-name."""

    name: str


@command("query-commands", arguments=NoArguments, returns=list[Named])
def query_commands(ctx: Context, _args: NoArguments) -> list[Named]:
    """The names of all commands."""
    return [Named(name) for name in ctx.registry.names()]


@command("query-events", arguments=NoArguments, returns=list[Named])
def query_events(_ctx: Context, _args: NoArguments) -> list[Named]:
    """The names of all events."""
    return [Named(name) for name in sorted(EVENTS)]


class DescriptorName(Arguments, frozen=True):
    """Of getfd and closefd."""

    fdname: str


@command("getfd", arguments=DescriptorName)
def getfd(ctx: Context, args: DescriptorName) -> Empty:
    """Gives the descriptor that came with the request (SCM_RIGHTS) a name, for fd:NAME."""
    ctx.descriptors.add(args.fdname, ctx.received)
    return Empty()


@command("closefd", arguments=DescriptorName)
def closefd(ctx: Context, args: DescriptorName) -> Empty:
    """Closes a descriptor that has a name."""
    os.close(ctx.descriptors.take(args.fdname))
    return Empty()
