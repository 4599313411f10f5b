"""The state of the machine without its RAM and disks, saved and loaded while it is there: save-devices-state, and the
names that Xen's toolstack uses."""

from __future__ import annotations

import os
import re

from motorcade.core.qmp.errors import QmpError
from motorcade.core.qmp.machine import RunState
from motorcade.core.qmp.migration import MACHINE_IS_THERE, finished, given
from motorcade.core.qmp.registry import Arguments, Context, Deferred, Empty, command
from motorcade.core.snapshot.plan import Plan


class SaveDevicesState(Arguments, frozen=True):
    """Of save-devices-state. ``live`` is Xen's, whose toolstack knows itself whether the guest runs."""

    filename: str
    live: bool = True


class LoadDevicesState(Arguments, frozen=True):
    """Of load-devices-state."""

    filename: str


def _uri(filename: str) -> str:
    """Raises QmpError for a name that begins as a protocol's might, one day."""
    if not re.match("[A-Za-z]+:", filename):
        return f"file:{filename}"
    if not filename.startswith("fd:"):
        raise QmpError(f"'{filename}': a file's name must begin with / or ./ where it begins like a protocol's")
    return filename


def _save_devices_state(ctx: Context, args: SaveDevicesState) -> Deferred:
    """Writes the state of the machine without RAM and disks to a file; the answer comes when it is written."""
    uri = _uri(args.filename)
    return finished(ctx, Plan(uri, what="devices", given=given(ctx, uri)))


def _load_devices_state(ctx: Context, args: LoadDevicesState) -> Deferred:
    """Puts such a state into the machine, which is stopped; the answer comes when it is there."""
    uri = _uri(args.filename)
    later = Deferred()
    fd = given(ctx, uri)
    try:
        ctx.machine.load_devices(uri, fd, lambda error: later.finish(Empty() if error is None else error))
    except QmpError:
        if fd >= 0:
            os.close(fd)
        raise
    return later


_STOPPED = (RunState.PRELAUNCH, RunState.PAUSED, RunState.POSTMIGRATE, RunState.INMIGRATE)
for _xen in ("", "xen-"):
    command(f"{_xen}save-devices-state", arguments=SaveDevicesState, states=MACHINE_IS_THERE)(_save_devices_state)
    command(f"{_xen}load-devices-state", arguments=LoadDevicesState, states=_STOPPED)(_load_devices_state)
