"""What the machine is, and having it run, stop, reset and end (QEMU's qapi/run-state.json, misc.json, machine.json)."""

from __future__ import annotations

import os

import msgspec

from motorcade.core.qmp import guid
from motorcade.core.qmp.commands import Named
from motorcade.core.qmp.errors import QmpError
from motorcade.core.qmp.machine import RunState
from motorcade.core.qmp.registry import Arguments, Context, Empty, NoArguments, Result, Then, command

_OVER = frozenset({RunState.SHUTDOWN, RunState.INTERNAL_ERROR})
_ALIVE = frozenset(RunState) - _OVER


class StatusInfo(Result, frozen=True):
    """Of query-status."""

    running: bool
    singlestep: bool
    status: RunState


@command("query-status", arguments=NoArguments, returns=StatusInfo)
def query_status(ctx: Context, _args: NoArguments) -> StatusInfo:
    """Whether the machine runs, and why not."""
    state = ctx.machine.run_state
    return StatusInfo(state.runs, False, state)


@command("query-name", arguments=NoArguments, returns=Named)
def query_name(ctx: Context, _args: NoArguments) -> Named:
    """The VM's name."""
    return Named(ctx.machine.name)


class Uuid(Result, frozen=True):
    """Of query-uuid."""

    uuid: str = msgspec.field(name="UUID")


@command("query-uuid", arguments=NoArguments, returns=Uuid)
def query_uuid(ctx: Context, _args: NoArguments) -> Uuid:
    """The VM's UUID."""
    return Uuid(ctx.machine.uuid)


class Guid(Result, frozen=True):
    """Of query-vm-generation-id."""

    guid: str


@command("query-vm-generation-id", arguments=NoArguments, returns=Guid)
def query_vm_generation_id(ctx: Context, _args: NoArguments) -> Guid:
    """The VM generation ID as it is in the guest's memory now."""
    return Guid(guid.text(ctx.machine.generation_id))


class NewGenerationId(Arguments, frozen=True):
    """Of x-motorcade-set-generation-id. ``guid``: ``auto`` makes a new one."""

    guid: str = "auto"


@command("x-motorcade-set-generation-id", arguments=NewGenerationId, returns=Guid, states=_ALIVE)
def x_motorcade_set_generation_id(ctx: Context, args: NewGenerationId) -> Guid:
    """Gives the machine another generation ID, and tells the guest, which then takes new random numbers."""
    value = os.urandom(guid.SIZE) if args.guid == "auto" else guid.parse(args.guid)
    if value is None:
        raise QmpError(f"Parameter 'guid' expects auto or a UUID such as {guid.text(bytes(guid.SIZE))}")
    ctx.machine.set_generation_id(value)
    return Guid(guid.text(value))


class KvmInfo(Result, frozen=True):
    """Of query-kvm."""

    enabled: bool
    present: bool


@command("query-kvm", arguments=NoArguments, returns=KvmInfo)
def query_kvm(_ctx: Context, _args: NoArguments) -> KvmInfo:
    """Whether KVM is there and in use: always."""
    return KvmInfo(enabled=True, present=True)  # there is no machine without it


class TargetInfo(Result, frozen=True):
    """Of query-target."""

    arch: str


@command("query-target", arguments=NoArguments, returns=TargetInfo)
def query_target(_ctx: Context, _args: NoArguments) -> TargetInfo:
    """The guest's architecture."""
    return TargetInfo("x86_64")


@command("stop", arguments=NoArguments, states=_ALIVE)
def stop(ctx: Context, _args: NoArguments) -> Empty:
    """Stops the vCPUs, if they run. Event STOP."""
    ctx.machine.pause()
    return Empty()


@command("cont", arguments=NoArguments)
def cont(ctx: Context, _args: NoArguments) -> Empty:
    """Lets the vCPUs run, if they do not. Event RESUME."""
    ctx.machine.resume()
    return Empty()


@command("system_reset", arguments=NoArguments)
def system_reset(ctx: Context, _args: NoArguments) -> Empty:
    """Resets the machine as its reset button would. Event RESET."""
    ctx.machine.reset("host-qmp-system-reset")
    return Empty()


@command("system_powerdown", arguments=NoArguments, states=_ALIVE)
def system_powerdown(ctx: Context, _args: NoArguments) -> Empty:
    """Presses the ACPI power button; the guest decides what comes of it. Event POWERDOWN."""
    ctx.machine.powerdown()
    return Empty()


@command("quit", arguments=NoArguments)
def quit_(ctx: Context, _args: NoArguments) -> Then:
    """Ends the VM, disks flushed. Event SHUTDOWN, after the answer."""
    return Then(Empty(), lambda: ctx.machine.quit("host-qmp-quit"))
