"""Looking at the sidecars, and interfering with them, for a person: queue depths, pause and resume, injected faults,
which events are recorded. Nothing here is needed for a guest to run.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Mapping, Sequence

from motorcade.core.link import LinkState, SidecarError, SidecarLink
from motorcade.core.platform import PAGER, Platform
from motorcade.core.qmp import machine as qmp
from motorcade.core.qmp.errors import DeviceNotFound, QmpError
from motorcade.core.task import Future
from motorcade.proto import messages, watch

INJECT_MS = 3_000
Done = Callable[[QmpError | None], None]


class Watching:
    """The core's side of docs/looking-in.md. Main thread only."""

    def __init__(self, platform: Platform, fds: Mapping[str, int], refusal: Callable[[], str]) -> None:
        """``fds`` by label stay the caller's. ``refusal`` says why no sidecar may be paused or resumed now; empty: all
        may."""
        self._platform, self._refusal = platform, refusal
        self._fds = {label: fd for label, fd in fds.items() if label.startswith("watch.")}
        self._mappings: dict[str, mmap.mmap] = {}

    def _mapping(self, device_id: str) -> mmap.mmap | None:
        """A sidecar's counters and events; mapped when they are first asked for."""
        if device_id not in self._mappings:
            fd = self._fds.get(f"watch.{device_id}")
            if fd is None:
                return None
            self._mappings[device_id] = watch.map_or_make(fd)
        return self._mappings[device_id]

    def add(self, device_id: str, fd: int) -> None:
        """That of a device that has come; taken."""
        self._fds[f"watch.{device_id}"] = fd
        if self._kinds:
            self.trace(self._kinds)

    def forget(self, device_id: str) -> None:
        """A device is gone."""
        if (fd := self._fds.pop(f"watch.{device_id}", None)) is not None:
            os.close(fd)
        if (mapping := self._mappings.pop(device_id, None)) is not None:
            mapping.close()

    def _link(self, device_id: str) -> SidecarLink:
        link = self._platform.links.get(device_id)
        if link is None:
            raise DeviceNotFound(f"no device has the id {device_id}")
        return link

    def depths(self, device_id: str) -> Sequence[qmp.QueueDepth]:
        """Of the queues that the driver has set up, without a word to the sidecar: one that hangs is seen, too."""
        device, mapping = self._platform.devices.get(device_id), self._mapping(device_id)
        if device is None or mapping is None:
            return ()
        found = []
        for index, queue in device.running_queues().items():
            counted = watch.counters(mapping, index)
            # The avail ring's idx (virtio 1.2, 2.7.6). Both numbers may be lies; the difference is of 16 bits.
            offered = int.from_bytes(self._platform.memory.read(queue.driver + 2, 2), "little")
            waiting = (offered - counted.last_avail) & 0xFFFF
            most = queue.size
            found.append(qmp.QueueDepth(index, most, min(counted.in_flight, most), min(waiting, most)))
        return found

    # One sidecar comes to rest, and goes on.

    def pause(self, device_id: str, done: Done) -> None:
        """Brings a sidecar to rest until ``resume``: it takes nothing, and raises no interrupt. ``done`` once."""
        link = self._may_change(device_id)
        if link.paused:
            done(None)
            return
        if link is self._platform.links.get(self._platform.uart_id):
            self._platform.poll_uart(False)  # as for a snapshot: each byte is with the one or the other
        rest = link.pause()
        rest.on_done(lambda: self._paused(link, rest, done))

    def _paused(self, link: SidecarLink, rest: Future[messages.Answer], done: Done) -> None:
        error = _error(rest)
        if error is not None:
            self._platform.poll_uart(True)
        done(error)

    def resume(self, device_id: str, done: Done) -> None:
        """Undoes ``pause``; nothing if it is not paused."""
        link = self._may_change(device_id)
        if link.paused:
            link.paused = False
            link.wake()
            if device := self._platform.devices.get(device_id):
                device.raise_again()
            self._platform.poll_uart(True)
        done(None)

    def _may_change(self, device_id: str) -> SidecarLink:
        link = self._link(device_id)
        if link.kind == PAGER:
            raise QmpError("the pager fills the machine's memory; it cannot be paused")
        if why := self._refusal():
            raise QmpError(why)
        if link.state is not LinkState.PRESENT:
            raise QmpError(f"the sidecar of {device_id} is {link.state.value}")
        return link

    # Faults.

    def inject(self, device_id: str, what: messages.Inject, done: Done) -> None:
        """Has the next requests fail, or wait. ``done`` once; refused by a kind that cannot do it."""
        answer = self._link(device_id).ask(what, INJECT_MS)
        answer.on_done(lambda: done(_error(answer)))

    # Which events are recorded.

    def tracing(self) -> int:
        """Bits of watch.Kind that QMP has switched on."""
        return self._kinds

    _kinds = 0

    def trace(self, kinds: int) -> None:
        """Records events of these kinds in every sidecar's ring, for whoever will look."""
        self._kinds = kinds
        for slot in self._platform.slots:
            mapping = self._mapping(slot.device_id)
            if mapping is not None:
                switch = watch.Switch(mapping, qmp=True)
                switch.kinds = kinds
                switch.release()


def _error(future: Future[messages.Answer]) -> QmpError | None:
    try:
        future.result()
    except SidecarError as e:
        return QmpError(str(e))
    return None
