"""The state of a machine without its RAM, loaded into one that is there: what load-devices-state does.

The machine stands still. Its RAM stays as it is, so the state has to be one that goes with it: taken since it last ran,
or with RAM that came some other way. Whoever asks for this knows.

A state that is not this machine's is refused before anything has changed. What goes wrong after that leaves neither the
old machine nor the new one, and ends the VM.
"""

from __future__ import annotations

import logging

from motorcade.core.link import QUIESCE_MS, LinkState, SidecarError
from motorcade.core.platform import Platform
from motorcade.core.snapshot.components import Restored
from motorcade.core.snapshot.restore import LOAD_MS, put_devices
from motorcade.core.task import every
from motorcade.core.virtio import Status
from motorcade.proto import messages, template

log = logging.getLogger(__name__)


class LoadError(Exception):
    """The state cannot be loaded, and the machine is as it was."""


def read(platform: Platform, state: int) -> Restored:
    """The state in the file ``state``, the caller's, as one of this machine. Errors: LoadError."""
    try:
        whole = template.read(state)
        # A guest that runs already has been told what processors it has, and KVM tells it nothing else any more.
        if whole.cpu.cpuid != platform.vcpus.vcpus[0].cpuid:
            raise LoadError("the state is of other processors than this machine's")
        return Restored(platform, whole)
    except (ValueError, OSError) as e:
        raise LoadError(str(e)) from e


async def load(platform: Platform, state: Restored) -> None:
    """Puts ``state`` into the machine, whose vCPUs are parked. Afterwards it is as restored: time stands still.

    Errors: LoadError; KvmError, SidecarError, ValueError where the machine is not to be used any more.
    """
    links = platform.device_links
    try:
        if gone := [link for link in links if link.state is LinkState.GONE]:
            raise SidecarError(f"{gone[0].device_id}: its sidecar is gone: {gone[0].gone_reason}")
        await every([link.ask(messages.Quiesce(), QUIESCE_MS) for link in links])
    except SidecarError as e:
        raise LoadError(str(e)) from e
    running = [link for link in links if _is_running(platform, link.device_id)]
    await every([link.ask(messages.Reset(), LOAD_MS) for link in running])
    state.restore_platform()
    await put_devices(platform, state)
    log.info("the state of all devices was loaded; time stands still")


def _is_running(platform: Platform, device_id: str) -> bool:
    device = platform.devices.get(device_id)
    return device is not None and bool(device.status & Status.DRIVER_OK)
