"""The machine's state as a template's components, and back.

Each part saves itself, in canonical bytes: equal machines give equal components. Here is what they are called, in which
order they are put back, and whether a template's parts are this machine's. The owners' ``restore`` judge the bytes.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator, Mapping

from motorcade.core.kvm import KvmError, Record
from motorcade.core.platform import Platform
from motorcade.core.snapshot import upgrade
from motorcade.proto import schema
from motorcade.proto.messages import DeviceState, Malformed, Message, Saved
from motorcade.proto.template import Component, Template

_LENGTH = struct.Struct("<BI")  # of a record: bytes of its name, of its data
_SLOT = struct.Struct("<H")  # virtio-mmio slot, before the device's own bytes
_PLATFORM = ("vm", "clock", "pm", "rtc")


class WrongTemplate(ValueError):
    """A template that is not of this machine, or whose bytes no machine could have saved."""


# Bytes of what has no form of its own.


def pack_records(records: list[Record]) -> bytes:
    """KVM's structures by name."""
    parts = []
    for name, data in records:
        parts += [_LENGTH.pack(len(name.encode()), len(data)), name.encode(), data]
    return b"".join(parts)


def unpack_records(data: bytes) -> list[Record]:
    """What ``pack_records`` packed. ValueError."""
    records: list[Record] = []
    at = 0
    while at < len(data):
        if at + _LENGTH.size > len(data):
            raise ValueError("a record is cut off")
        name_size, size = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        name, value = data[at : at + name_size], data[at + name_size : at + name_size + size]
        at += name_size + size
        if at > len(data) or not name.isascii():
            raise ValueError("a record is cut off, or has no name")
        records.append((name.decode("ascii"), value))
    if len({name for name, _ in records}) != len(records):
        raise ValueError("two records have the same name")
    return records


def pack_sidecar(state: DeviceState) -> bytes:
    """As the sidecar would send it."""
    return schema.encode(Message(1, 0, Saved(state)))


def unpack_sidecar(data: bytes) -> DeviceState:
    """What ``pack_sidecar`` packed. ValueError."""
    try:
        body = schema.decode(data).body
    except Malformed as e:
        raise ValueError(str(e)) from None
    if not isinstance(body, Saved):
        raise ValueError("it is no sidecar's state")
    return body.state


# Save.


def save(platform: Platform, sidecars: Mapping[str, DeviceState]) -> tuple[Component, ...]:
    """The state of everything; the vCPUs are parked and the sidecars quiet. ``sidecars``: theirs, by device id.

    Errors: KvmError.
    """
    parts: dict[str, bytes] = {
        "vm": pack_records(platform.vm.save()),
        "clock": platform.clock.save(),
        "pm": platform.pm.save() + platform.cf9.save(),
        "rtc": platform.rtc.save(),
    }
    slots = {slot.device_id: slot.index for slot in platform.slots}
    parts |= {f"vcpu.{vcpu.index}": pack_records(vcpu.save()) for vcpu in platform.vcpus.vcpus}
    if platform.uart is not None:
        parts["uart"] = platform.uart.save()
    for name, device in platform.devices.items():
        parts[f"virtio.{name}"] = _SLOT.pack(slots[name]) + device.save()
    for name, state in sidecars.items():
        parts[f"sidecar.{name}"] = pack_sidecar(state)
    return tuple(Component(name, upgrade.current[name.partition(".")[0]], data) for name, data in parts.items())


# Restore.


class Restored:
    """A template on its way into a machine that has not run. Errors: WrongTemplate, KvmError."""

    def __init__(self, platform: Platform, template: Template) -> None:
        """Checks that the template is one of this machine; changes nothing."""
        self._platform = platform
        self._parts = {c.name: upgrade.upgrade(c).data for c in template.components}
        self.sidecars: dict[str, DeviceState] = {}
        self._check(template)
        for name, data in self._parts.items():
            if name.startswith("sidecar."):
                with _naming(name):
                    self.sidecars[name.partition(".")[2]] = unpack_sidecar(data)

    def _check(self, template: Template) -> None:
        platform = self._platform
        if template.memory_size != platform.memory.size:
            raise WrongTemplate(
                f"the template has {template.memory_size >> 20} MiB of memory,"
                f" this machine {platform.memory.size >> 20} MiB"
            )
        cpus = sum(name.startswith("vcpu.") for name in self._parts)
        if cpus != len(platform.vcpus.vcpus):
            raise WrongTemplate(f"the template has {cpus} vCPUs, this machine {len(platform.vcpus.vcpus)}")
        slots = {s.device_id: s for s in platform.slots}
        for device_id in (link.device_id for link in platform.device_links):
            if f"sidecar.{device_id}" not in self._parts:
                raise WrongTemplate(f"the template has no device {device_id} ({slots[device_id].kind})")
        wanted = {*_PLATFORM, *(f"vcpu.{v.index}" for v in platform.vcpus.vcpus)}
        wanted |= {f"virtio.{name}" for name in platform.devices}
        wanted |= {f"sidecar.{link.device_id}" for link in platform.device_links}
        wanted |= {"uart"} if platform.uart is not None else set()
        if unknown := sorted(self._parts.keys() - wanted):
            kind, _, device_id = unknown[0].partition(".")
            what = f"a device {device_id}" if kind in ("sidecar", "virtio") else f"a component {unknown[0]}"
            raise WrongTemplate(f"the template has {what}, which this machine has not")
        if missing := sorted(wanted - self._parts.keys()):
            raise WrongTemplate(f"the template lacks {', '.join(missing)}, which this machine has")
        for device_id in platform.devices:
            slot, there = slots[device_id].index, self._parts[f"virtio.{device_id}"][: _SLOT.size]
            if there != _SLOT.pack(slot):
                was = int.from_bytes(there, "little")
                raise WrongTemplate(f"device {device_id} is in slot {was} in the template, in slot {slot} here")

    def restore_platform(self) -> None:
        """Everything but the virtio devices, which wait for their sidecars' hellos."""
        platform = self._platform
        # The local APICs after the IOAPIC: setting that one may send them interrupts which their own state has.
        if platform.uart is not None:
            self._put("uart", platform.uart.restore)
        self._put("vm", self._restore_vm)
        for vcpu in platform.vcpus.vcpus:
            with _naming(f"vcpu.{vcpu.index}"):
                vcpu.restore_stopped(unpack_records(self._parts[f"vcpu.{vcpu.index}"]))
        self._put("clock", platform.clock.restore)
        self._put("pm", lambda data: platform.pm.restore(data[:-1]))
        self._put("pm", lambda data: platform.cf9.restore(data[-1:]))
        self._put("rtc", platform.rtc.restore)

    def _restore_vm(self, data: bytes) -> None:
        records, vm = unpack_records(data), self._platform.vm
        if missing := {name for name, _ in vm.save()} - {name for name, _ in records}:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        vm.restore(records)

    def restore_device(self, device_id: str) -> None:
        """A virtio device's transport, after its sidecar's hello."""
        device = self._platform.devices[device_id]
        self._put(f"virtio.{device_id}", lambda data: device.restore(data[_SLOT.size :]))

    def _put(self, name: str, restore: Callable[[bytes], None]) -> None:
        with _naming(name):
            restore(self._parts[name])


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Has errors say which component they are about."""
    try:
        yield
    except (ValueError, KvmError) as e:
        raise WrongTemplate(f"component {name}: {e}") from e
