"""Devices that come and go while the machine is there: disks and NICs in the slots that its tables describe.

A slot is *empty*, in *use*, or *held*: its device was taken away, but the guest's driver is still bound to it. No
interface lets us take a platform device away from Linux, so that is how every slot ends whose device was in use: the
driver sees a disk of size 0, or a NIC without a link. What it still asks for must be answered, with an error, or the
guest would wait for ever (virtio-blk has no time-out, and the control queue of virtio-net is waited for in a loop).
So a sidecar with nothing behind it, called ``~SLOT``, takes over the queues. It ends when the driver lets go (a reset),
and a held slot can have another device of the same shape: to the driver the same disk, with another size.

Whatever goes wrong on the way is an exception at an ``await``, and is undone: sidecar, descriptors, locks and slot.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

import msgspec

from motorcade.core.layout import FIRST_SLOT, HOTPLUG_SLOTS, SLOTS_A_KIND
from motorcade.core.life import LifeLink
from motorcade.core.link import DEADLINE_MS, QUIESCE_MS, SAVE_MS, LinkState, SidecarError, SidecarLink
from motorcade.core.platform import Platform
from motorcade.core.qmp.errors import DeviceNotFound, QmpError
from motorcade.core.task import Future, Task
from motorcade.core.virtio import Device, Identity, Status
from motorcade.core.watching import Watching
from motorcade.proto import hotplug as ask
from motorcade.proto import messages
from motorcade.proto.framing import ControlServer

log = logging.getLogger(__name__)

HELLO_SECONDS = 30.0  # a new sidecar's
PARK_SECONDS = 60.0
_WCE = 32  # offset of `writeback` in struct virtio_blk_config (virtio 1.2, 5.2.4)
_F_CONFIG_WCE = 1 << 11

T = TypeVar("T", bound=msgspec.Struct)
Done = Callable[[QmpError | None], None]


class Owner(Protocol):
    """The machine."""

    def deny_hotplug(self) -> str | None:
        """Why no device can come or go now, or None."""

    def go_on(self) -> None:
        """The vCPUs may run again, if they are to."""

    def kill_sidecar(self, device_id: str, reason: str, *, unless_traced: bool = False) -> None:
        """See platform.Guest."""

    @property
    def watching(self) -> Watching:
        """What looks at sidecars."""


class AddDevice(msgspec.Struct, frozen=True):
    """A device from a backend that is open. ``slot``: of its kind, from 0; None: the next. ``keep``: Plug's."""

    id: str
    kind: str
    backend: str
    slot: int | None = None
    serial: str | None = None
    mac: str | None = None
    keep: bool = True


class Hotplug:
    """Of one VM; on the main thread. One thing at a time, in the order in which they were asked for."""

    def __init__(self, platform: Platform, life: LifeLink, server: ControlServer, owner: Owner) -> None:
        self._platform, self._life, self._server, self._owner = platform, life, server, owner
        self._queue: deque[tuple[Coroutine[Future[Any], None, None], Done]] = deque()
        self._running = False
        self._idle: list[Callable[[], None]] = []
        self._hellos: dict[str, Future[Identity]] = {}  # of sidecars on their way in
        self._leaving: set[str] = set()  # whose sidecars were asked to end
        self.backends: dict[str, str] = {}
        """Name to kind, of those that a command has opened."""
        self.options: dict[str, dict[str, Any]] = {}
        """And to what it said of them, as machine.yaml has it."""
        self.users: dict[str, str] = {}
        """Backend to the device that has it."""
        self._seen = {slot.index for slot in platform.slots}
        """Slots that the guest may know something of since its start."""

    # What QMP asks for. ``done`` is called once, now or later.

    @property
    def busy(self) -> bool:
        """Whether a device is on its way."""
        return self._running

    def when_idle(self, callback: Callable[[], None]) -> None:
        """Calls it when no device is on its way; at once if none is."""
        if self._running:
            self._idle.append(callback)
        else:
            callback()

    def open(self, kind: str, name: str, options: dict[str, Any], fds: Sequence[int], done: Done) -> None:
        """Opens a backend. Takes ``fds``."""
        self._do(self._open(kind, name, options, fds), done)

    def close(self, name: str, kind: str, done: Done) -> None:
        """Lets go of a backend."""
        self._do(self._close(name, kind), done)

    def add(self, device: AddDevice, done: Done) -> None:
        """Puts a device into a slot, and tells the guest."""
        self._do(self._add(device), done)

    def open_and_add(self, device: AddDevice, options: dict[str, Any], done: Done) -> None:
        """Both, or neither."""
        self._do(self._open_and_add(device, options), done)

    def remove(self, device_id: str, done: Done) -> None:
        """Takes a device away; when it is done nothing is left of it but, in the guest, its driver."""
        self._do(self._remove(device_id), done)

    # What happens.

    def said_hello(self, device_id: str, identity: Identity) -> None:
        """A sidecar that is no device yet is there."""
        if (hello := self._hellos.get(device_id)) is not None:
            hello.set(identity)

    def died(self, device_id: str, reason: str) -> bool:
        """A sidecar has ended. Whether that is a matter of ours: it was on its way in or out."""
        link = self._platform.links.get(device_id)
        if link is None:
            return True
        if device_id not in self._hellos and device_id not in self._leaving:
            return False
        link.died(reason)
        if (hello := self._hellos.get(device_id)) is not None:
            hello.fail(QmpError(f"its sidecar ended: {reason}"))
        return True

    def driver_let_go(self, device_id: str) -> None:
        """(From any thread.) The driver of a device has reset it."""
        if is_held(device_id):
            self._platform.loop.call_soon(lambda: self._do(self._collect(), _log_failure))

    def machine_reset(self) -> None:
        """All starts over: the guest will look at what is there now."""
        self._seen = {slot.index for slot in self._platform.slots if not is_held(slot.device_id)}

    # One at a time.

    def _do(self, coroutine: Coroutine[Future[Any], None, None], done: Done) -> None:
        self._queue.append((coroutine, done))
        if not self._running:
            self._next()

    def _next(self) -> None:
        if not self._queue:
            self._running = False
            idle, self._idle = self._idle, []
            for callback in idle:
                callback()
            return
        self._running = True
        coroutine, done = self._queue.popleft()

        def ended(error: Exception | None) -> None:
            # The next one from the loop: a chain of them must not be a chain of calls.
            self._platform.loop.call_soon(self._next)
            if error is not None and not isinstance(error, QmpError):
                if not isinstance(error, SidecarError | ConnectionError | ValueError):
                    log.error("a device could not come or go, in a way that should not be", exc_info=error)
                error = QmpError(str(error) or type(error).__name__)
            done(error)

        Task(coroutine, ended)

    async def _ask(self, request: ask.Request, fds: Sequence[int] = ()) -> tuple[bytes, dict[str, int]]:
        """The supervisor's answer, and descriptors by label, the caller's. QmpError."""
        answer, received = await self._life.ask(messages.Hotplug(ask.encode(request)), messages.Hotplugged, fds)
        if answer.error or len(answer.labels) != len(received):
            for fd in received:
                os.close(fd)
            if answer.error.startswith(ask.UNLIKE):
                raise _Unlike(answer.error.removeprefix(ask.UNLIKE))
            raise QmpError(answer.error or "the supervisor sent something else than it said")
        return answer.answer.encode(), dict(zip(answer.labels, received, strict=True))

    def _check_state(self) -> None:
        if (reason := self._owner.deny_hotplug()) is not None:
            raise QmpError(reason)

    # Backends.

    async def _open(self, kind: str, name: str, options: dict[str, Any], fds: Sequence[int]) -> None:
        try:
            if name in self.backends or name in self._platform.links:
                raise QmpError(f"Duplicate node: '{name}' is there already")
            await self._ask(ask.OpenBackend(kind, options, len(fds)), fds)
        finally:
            for fd in fds:
                os.close(fd)
        self.backends[name], self.options[name] = kind, options

    async def _close(self, name: str, kind: str) -> None:
        if self.backends.get(name) != kind:
            if kind == "blk":
                raise QmpError(f"Failed to find node with node-name='{name}'")
            raise DeviceNotFound(f"Device '{name}' not found")
        if (user := self.users.get(name)) is not None:
            what = "Node" if kind == "blk" else "Network backend"
            raise QmpError(f"{what} '{name}' is busy: device '{user}' uses it; device_del takes that away")
        await self._ask(ask.CloseBackend(name))
        del self.backends[name], self.options[name]

    # Coming.

    async def _open_and_add(self, device: AddDevice, options: dict[str, Any]) -> None:
        await self._open(device.kind, device.backend, options, ())
        try:
            await self._add(device)
        except BaseException:
            await self._close(device.backend, device.kind)
            raise
        # It goes with its device.
        del self.backends[device.backend], self.options[device.backend], self.users[device.backend]

    async def _add(self, device: AddDevice) -> None:
        self._check_state()
        await self._collect()
        if device.id in self._platform.links:
            raise QmpError(f"Duplicate device ID '{device.id}'")
        kind = self.backends.get(device.backend)
        if kind != device.kind:
            what, prop = ("drive", "drive") if device.kind == "blk" else ("network backend", "netdev")
            hint = f" (it is a {'disk' if kind == 'blk' else 'network backend'})" if kind is not None else ""
            raise QmpError(f"Property '{prop}' can't find {what} '{device.backend}'{hint}")
        if (user := self.users.get(device.backend)) is not None:
            raise QmpError(f"'{device.backend}' is in use by device '{user}'")
        problem: QmpError | None = None
        for slot in self._slots_for(device):
            try:
                await self._plug(device, slot)
            except _Unlike as e:
                problem = e  # the next slot may do
            else:
                self.users[device.backend] = device.id
                return
        raise problem or QmpError("No slot is free")

    def _slots_for(self, device: AddDevice) -> list[int]:
        """Where it can go, the best first: where nothing has ever been, the guest has no driver that knows better."""
        first = FIRST_SLOT[device.kind]
        taken = {slot.index: slot.device_id for slot in self._platform.slots}
        if device.slot is not None:
            slot = first + device.slot
            if not 0 <= device.slot < SLOTS_A_KIND:
                raise QmpError(f"Slot {device.slot:#x} is none: 0x0 to {SLOTS_A_KIND - 1:#x} are there")
            if slot in taken and not is_held(taken[slot]):
                raise QmpError(f"Slot {device.slot:#x} is in use by device '{taken[slot]}'")
            return [slot]
        slots = [s for s in range(first, first + SLOTS_A_KIND) if s not in taken or is_held(taken[s])]
        if not slots:
            raise QmpError(f"All {SLOTS_A_KIND} slots for such devices are in use; device_del makes room")
        return sorted(slots, key=lambda slot: (slot in self._seen, slot not in taken, slot))

    async def _plug(self, device: AddDevice, slot: int) -> None:
        held = next((s.device_id for s in self._platform.slots if s.index == slot), "")
        mac = self._mac_held(held, device) if held and device.kind == "net" else device.mac
        request = ask.Plug(device.id, slot, device.backend, held, device.keep, device.serial, mac)
        fds = await self._bring(request)
        try:
            if held:
                await self._swap(held, device.id)
                self._tell_guest(slot)
            else:
                await self._parked()
                self._platform.fill_slot(self._platform.slot_of(device.id), fds, self._identity(device.id))
                fds = {}
                self._tell_guest(slot)
        except BaseException:
            for fd in fds.values():
                os.close(fd)
            await self._take_back(device.id)
            raise
        finally:
            self._hellos.pop(device.id, None)
            self._owner.go_on()
        self._seen.add(slot)
        log.info("%s is in slot %d", device.id, slot)
        if held:
            await self._end_sidecar(held)
        await self._ask(ask.Settled(device.id))

    def _mac_held(self, held: str, device: AddDevice) -> str:
        """A driver that is bound keeps the address that it has read."""
        config = self._platform.devices[held].read_config(0, 6).to_bytes(6, "little")
        if device.mac is not None and bytes.fromhex(device.mac.replace(":", "")) != config:
            raise _Unlike(
                f"the guest's driver still holds the slot, for a NIC with the address {config.hex(':')}; "
                "unbind it in the guest, or use another slot"
            )
        return config.hex(":")

    async def _bring(self, request: ask.Plug) -> dict[str, int]:
        """A new sidecar up to its hello; it is in ``links``, ``slots`` and ``_hellos``. The slot's descriptors, the
        caller's. Leaves nothing behind where it fails."""
        answer, fds = await self._ask(request)
        try:
            plugged = msgspec.json.decode(answer, type=ask.Plugged)
            index, link = request.slot, self._expect(request.id, plugged)
            self._hellos[link.device_id] = Future()
            self._platform.slots.append(
                messages.Slot(request.id, plugged.kind, index, plugged.queues, plugged.pid, plugged.info)
            )
            self._owner.watching.add(request.id, fds.pop("watch"))
            await self._ask(ask.Boot(request.id, incoming=bool(request.replaces)))
            await self._hello(request.id)
        except BaseException:
            for fd in fds.values():
                os.close(fd)
            await self._take_back(request.id)
            raise
        return fds

    def _expect(self, device_id: str, plugged: ask.Plugged) -> SidecarLink:
        loop, kill = self._platform.loop, self._owner.kill_sidecar
        link = SidecarLink(device_id, plugged.kind, plugged.pid, loop, self._server, kill)
        self._platform.links[device_id] = link
        self._server.expect(device_id, plugged.pid)
        return link

    async def _hello(self, device_id: str) -> Identity:
        hello = self._hellos[device_id]
        late = QmpError(f"its sidecar did not say hello within {HELLO_SECONDS:g} s")
        self._platform.loop.call_later(HELLO_SECONDS, lambda: hello.fail(late))
        return await hello

    def _identity(self, device_id: str) -> Identity:
        return self._hellos[device_id].result()

    async def _take_back(self, device_id: str) -> None:
        """Ends a sidecar that is no device, and whatever there is for it."""
        self._hellos.pop(device_id, None)
        self._leaving.add(device_id)
        try:
            await self._ask(ask.Unplug(device_id, kill=True))
        except QmpError as e:
            log.error("%s: what is left of it: %s", device_id, e.desc)
        self._forget(device_id)

    def _forget(self, device_id: str) -> None:
        link = self._platform.links.pop(device_id, None)
        if link is not None and link.state is not LinkState.GONE:
            link.died("it was taken away")
        slots = self._platform.slots
        slots[:] = [slot for slot in slots if slot.device_id != device_id]
        self._leaving.discard(device_id)
        self._owner.watching.forget(device_id)

    # Going.

    async def _remove(self, device_id: str) -> None:
        self._check_state()
        await self._collect()
        device = self._platform.devices.get(device_id)
        if device is None or is_held(device_id):
            if device_id in self._platform.links:
                raise QmpError(f"Device '{device_id}' does not support hot-unplug")
            raise DeviceNotFound(f"Device '{device_id}' not found")
        slot = self._platform.slot_of(device_id)
        if slot.index not in HOTPLUG_SLOTS:
            raise QmpError(f"Device '{device_id}' does not support hot-unplug: a {slot.kind} device is fixed")
        link = self._platform.links[device_id]
        if link.paused:
            raise QmpError(f"The sidecar of '{device_id}' is paused; resume it first")
        if link.state is LinkState.WAITING:  # it knows where the queues stand
            raise QmpError(f"The sidecar of '{device_id}' has died, and is being replaced; try again")
        nobody = f"~{slot.index}"
        if device.status:
            await self._bring(ask.Plug(nobody, slot.index, replaces=device_id))
        try:
            await self._parked()
            if nobody in self._platform.links and device.status:
                await self._swap(device_id, nobody)
            else:
                self._platform.empty_slot(device_id)
            self._tell_guest(slot.index)
        except BaseException:
            if nobody in self._platform.links:
                await self._take_back(nobody)
            raise
        finally:
            self._hellos.pop(nobody, None)
            self._owner.go_on()
        if nobody in self._platform.links and nobody not in self._platform.devices:
            await self._take_back(nobody)  # the driver let go in the nick of time
        await self._end_sidecar(device_id)
        if nobody in self._platform.links:
            await self._ask(ask.Settled(nobody))
        for name in [name for name, user in self.users.items() if user == device_id]:
            del self.users[name]
        log.info("%s was taken away", device_id)

    async def _collect(self) -> None:
        """Empties the held slots whose drivers have let go, unless the machine is to stay as it is: then later."""
        if self._owner.deny_hotplug() is not None or all(device.status for device in self._held()):
            return
        try:
            await self._parked()
            emptied = [device.id for device in self._held() if not device.status]
            for device_id in emptied:
                self._platform.empty_slot(device_id)
        finally:
            self._owner.go_on()
        for device_id in emptied:
            await self._end_sidecar(device_id)

    def _held(self) -> list[Device]:
        return [device for device_id, device in self._platform.devices.items() if is_held(device_id)]

    async def _end_sidecar(self, device_id: str) -> None:
        """It flushes and ends; what it had is closed after that."""
        self._leaving.add(device_id)
        link = self._platform.links[device_id]
        # The supervisor first: it is to know why the process ends.
        request = ask.Unplug(device_id, kill=link.state is LinkState.WAITING)
        ended = self._life.ask(messages.Hotplug(ask.encode(request)), messages.Hotplugged)
        link.shutdown()  # one that does not is killed
        answer, _ = await ended
        self._forget(device_id)
        if answer.error:
            raise QmpError(answer.error)

    # The vCPUs are parked.

    async def _parked(self) -> None:
        parked = self._platform.park()
        why = f"the vCPUs did not stop within {PARK_SECONDS:g} s: a device's sidecar does not answer"
        self._platform.loop.call_later(PARK_SECONDS, lambda: parked.fail(QmpError(why)))
        await parked

    def _tell_guest(self, slot: int) -> None:
        platform = self._platform
        there = [s.index for s in platform.slots if s.device_id in platform.devices and not is_held(s.device_id)]
        platform.write_present_slots(there)
        platform.pm.slots_changed()
        log.debug("the guest is told of slot %d", slot)

    async def _swap(self, old_id: str, new_id: str) -> None:
        """The sidecar ``new_id``, which is quiet, takes over the queues of ``old_id``, which is quiet then, too.

        Where it cannot, ``old_id`` goes on as before. Errors: _Unlike, SidecarError, QmpError.
        """
        await self._parked()
        device, old = self._platform.devices[old_id], self._platform.links[old_id]
        link, identity = self._platform.links[new_id], self._identity(new_id)
        if problem := device.misfit(identity):
            raise _Unlike(f"the guest's driver still holds the slot, and {problem}; unbind it in the guest, or use "
                          "another slot")  # fmt: skip
        try:
            if device.status & Status.DRIVER_OK and old.state is LinkState.PRESENT:
                await old.ask(messages.Quiesce(), QUIESCE_MS)
                saved = await old.ask(messages.Save(), SAVE_MS)
                assert isinstance(saved, messages.Saved)
                await self._hand_over(device, link, saved.state)
            device.rebind(new_id, link, identity)
        except BaseException:
            if old.state is LinkState.PRESENT:
                old.wake()
            raise
        self._platform.rename_device(old_id, new_id)
        link.wake()

    async def _hand_over(self, device: Device, link: SidecarLink, state: messages.DeviceState) -> None:
        """The driver's choices, and where its queues stand."""
        if link.kind == "net":
            await link.ask(messages.Load(state), DEADLINE_MS)  # offloads, pairs, an address of its own
        elif device.driver_features & _F_CONFIG_WCE and not device.read_config(_WCE, 1):
            await link.ask(messages.ConfigWrite(_WCE, b"\0"), DEADLINE_MS)  # it relies on writes that are permanent
        if state.queues:
            await link.restore_queues(device.driver_features, device.running_queues(), state)


class _Unlike(QmpError):
    """A held slot is not for this device."""


def is_held(device_id: str) -> bool:
    """Whether this is what is left in a slot whose device was taken away."""
    return device_id.startswith("~")


def _log_failure(error: QmpError | None) -> None:
    if error is not None:
        log.error("a slot could not be emptied: %s", error.desc)
