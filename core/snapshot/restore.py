"""Going on from a template: the machine's state into a machine that has not run.

Nothing half-restored ever runs. All is checked before anything is set, the sidecars answer before the vCPUs have
threads, and any error is the end of the VM, with its reason.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable

from motorcade.core.link import DEADLINE_MS
from motorcade.core.platform import Platform
from motorcade.core.snapshot import cpu
from motorcade.core.snapshot.components import Restored, WrongTemplate
from motorcade.core.task import every
from motorcade.proto import messages, template

log = logging.getLogger(__name__)

LOAD_MS = 3 * DEADLINE_MS  # a sidecar may have its part of guest memory filled on demand meanwhile


async def restore(platform: Platform, state: int, hellos: Awaitable[None]) -> None:
    """Puts the template whose state file is ``state`` (the caller's) into ``platform``.

    ``hellos``: when every sidecar has said hello. Afterwards the vCPUs are parked, the sidecars quiet, and time stands
    still. Errors: TemplateError and WrongTemplate (both ValueError), CpuError, KvmError, SidecarError.
    """
    whole = template.read(state)
    cpu.check(whole.cpu, platform.kvm)
    restored = Restored(platform, whole)
    cpu.adopt(whole.cpu, platform.vcpus.vcpus)
    restored.restore_platform()
    await hellos
    await put_devices(platform, restored)
    platform.vcpus.start_threads()
    log.info("restored; time stands still")


async def put_devices(platform: Platform, restored: Restored) -> None:
    """The virtio devices, and what the sidecars know, into sidecars that are quiet and have no queues.

    Errors: WrongTemplate, SidecarError.
    """
    for device_id in platform.devices:
        restored.restore_device(device_id)
    links = {link.device_id: link for link in platform.device_links}
    await every([links[name].ask(messages.Load(of), LOAD_MS) for name, of in restored.sidecars.items()])
    activations = []
    for name, of in restored.sidecars.items():
        device = platform.devices.get(name)
        if not of.queues:
            continue
        if device is None:
            raise WrongTemplate(f"component sidecar.{name}: a device without a slot has queues")
        try:
            activations.append(links[name].restore_queues(device.driver_features, device.running_queues(), of))
        except ValueError as e:
            raise WrongTemplate(f"component sidecar.{name}: {e}") from None
    await every(activations)
