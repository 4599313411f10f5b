"""Going on from a template: the machine's state into a machine that has not run.

Nothing half-restored ever runs. All is checked before anything is set, the sidecars answer before the vCPUs have
threads, and any error is the end of the VM, with its reason.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable

from motorcade.core.link import DEADLINE_MS, SidecarError
from motorcade.core.platform import Platform
from motorcade.core.snapshot import cpu
from motorcade.core.snapshot.components import Restored, WrongTemplate
from motorcade.core.task import Future, every
from motorcade.proto import messages, template

log = logging.getLogger(__name__)

POPULATE_MS = 3_600_000  # the supervisor's patience with a start ends earlier
_TRIES, _BACK_OFF = 100, 0.05  # seconds
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
    await _populate(platform)
    await put_devices(platform, restored)
    platform.vcpus.start_threads()
    log.info("restored; time stands still")


async def _populate(platform: Platform) -> None:
    """Fetches all of the memory where a process is going to use it whose faults the pager does not see: the backend of
    another program (vhost-user). Such a one would find zeros, and keep the pager from ever filling those pages.

    Errors: SidecarError.
    """
    wanting = [link.device_id for link in platform.device_links if link.whole_memory]
    if wanting and platform.pager is not None:
        log.info("all of the memory is fetched now, for %s", ", ".join(wanting))
        for patience in range(_TRIES, -1, -1):
            try:
                await platform.pager.ask(messages.Populate(), POPULATE_MS)
                return
            except SidecarError:
                # It is being replaced; or has not been told of our mapping yet, which the supervisor does.
                if not patience:
                    raise
            again: Future[None] = Future()
            platform.loop.call_later(_BACK_OFF, functools.partial(again.set, None))
            await again


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
            queues, config = device.running_queues(), device.kept_config
            activations.append(links[name].restore_queues(device.driver_features, queues, of, config))
        except ValueError as e:
            raise WrongTemplate(f"component sidecar.{name}: {e}") from None
    await every(activations)
