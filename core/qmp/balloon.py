"""The balloon (QEMU's qapi/machine.json)."""

from __future__ import annotations

from motorcade.core.qmp.errors import DeviceNotActive
from motorcade.core.qmp.registry import Context, NoArguments, Result, command


class BalloonInfo(Result, frozen=True, omit_defaults=False):
    """Of query-balloon. ``actual``: bytes of RAM that the guest has."""

    actual: int


@command("query-balloon", arguments=NoArguments, returns=BalloonInfo)
def query_balloon(_ctx: Context, _args: NoArguments) -> BalloonInfo:
    """How much of its RAM the guest has."""
    raise DeviceNotActive("No balloon device has been activated")
