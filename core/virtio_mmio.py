"""The virtio-mmio transport, version 2 (virtio 1.2, section 4.2.2): registers in front of a virtio.Device.

InterruptStatus and InterruptACK are answered in the C exit loop, and QueueNotify is an ioeventfd once the device
runs; what arrives here is the rest.
"""

from __future__ import annotations

import enum
from typing import ClassVar

from motorcade.core.virtio import Device

MAGIC = 0x7472_6976  # "virt"
VENDOR = 0x4D43_4144  # "MCAD"
CONFIG = 0x100


class Reg(enum.IntEnum):
    """Register offsets (table 4.1)."""

    MAGIC = 0x000
    VERSION = 0x004
    DEVICE_ID = 0x008
    VENDOR_ID = 0x00C
    DEVICE_FEATURES = 0x010
    DEVICE_FEATURES_SEL = 0x014
    DRIVER_FEATURES = 0x020
    DRIVER_FEATURES_SEL = 0x024
    QUEUE_SEL = 0x030
    QUEUE_NUM_MAX = 0x034
    QUEUE_NUM = 0x038
    QUEUE_READY = 0x044
    QUEUE_NOTIFY = 0x050
    STATUS = 0x070
    QUEUE_DESC_LOW = 0x080
    QUEUE_DESC_HIGH = 0x084
    QUEUE_DRIVER_LOW = 0x090
    QUEUE_DRIVER_HIGH = 0x094
    QUEUE_DEVICE_LOW = 0x0A0
    QUEUE_DEVICE_HIGH = 0x0A4
    SHM_LEN_LOW = 0x0B0
    SHM_BASE_HIGH = 0x0BC
    CONFIG_GENERATION = 0x0FC


_QUEUE_ADDRESS = {
    Reg.QUEUE_DESC_LOW: ("desc", 0),
    Reg.QUEUE_DESC_HIGH: ("desc", 32),
    Reg.QUEUE_DRIVER_LOW: ("driver", 0),
    Reg.QUEUE_DRIVER_HIGH: ("driver", 32),
    Reg.QUEUE_DEVICE_LOW: ("device", 0),
    Reg.QUEUE_DEVICE_HIGH: ("device", 32),
}


class EmptySlot:
    """A bus.BusDevice: a slot without a device (device id 0, 4.2.2), in which one may appear."""

    _REGISTERS: ClassVar[dict[int, int]] = {Reg.MAGIC: MAGIC, Reg.VERSION: 2, Reg.VENDOR_ID: VENDOR}

    def read(self, offset: int, size: int) -> int:
        """Nothing, but that it is a slot. A driver whose device has just gone finds it reset."""
        return self._REGISTERS.get(offset, 0) if size == 4 else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Dropped."""


class VirtioMmio:
    """A bus.BusDevice: the register block of one slot. Without an identity the slot reads as empty (device id 0)."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def read(self, offset: int, size: int) -> int:
        """A register, 32 bits wide and aligned, or configuration space at any size; other accesses read 0."""
        device = self._device
        if offset >= CONFIG:
            return device.read_config(offset - CONFIG, size)
        if size != 4:
            return 0
        match offset:
            case Reg.MAGIC:
                return MAGIC
            case Reg.VERSION:
                return 2
            case Reg.DEVICE_ID:
                return device.identity.virtio_type if device.identity else 0
            case Reg.VENDOR_ID:
                return VENDOR
            case Reg.DEVICE_FEATURES:
                return (device.offered >> (32 * device.features_sel)) & 0xFFFF_FFFF if device.features_sel < 2 else 0
            case Reg.QUEUE_NUM_MAX:
                return queue.max_size if (queue := device.queue) else 0
            case Reg.QUEUE_READY:
                return int(queue.ready) if (queue := device.queue) else 0
            case Reg.STATUS:
                return int(device.status)
            case Reg.CONFIG_GENERATION:
                return device.config_generation
        if Reg.SHM_LEN_LOW <= offset <= Reg.SHM_BASE_HIGH:
            return 0xFFFF_FFFF  # no shared memory regions: length -1 (4.2.2.1)
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """A register or configuration space; writes to read-only registers and of other widths are dropped."""
        device = self._device
        if offset >= CONFIG:
            device.write_config(offset - CONFIG, size, value)
            return
        if size != 4:
            return
        match offset:
            case Reg.DEVICE_FEATURES_SEL:
                device.features_sel = value
            case Reg.DRIVER_FEATURES:
                device.write_driver_features(value)
            case Reg.DRIVER_FEATURES_SEL:
                device.driver_features_sel = value
            case Reg.QUEUE_SEL:
                device.queue_sel = value
            case Reg.QUEUE_NUM:
                if queue := device.queue_writable():
                    # Not judged before QueueReady; 16 bits cannot hold what the sidecar could not be told.
                    queue.size = min(value, 0xFFFF)
            case Reg.QUEUE_READY:
                device.set_queue_ready(bool(value & 1))
            case Reg.QUEUE_NOTIFY:
                device.notify(value)
            case Reg.STATUS:
                device.write_status(value)
            case _ if offset in _QUEUE_ADDRESS:
                if queue := device.queue_writable():
                    name, shift = _QUEUE_ADDRESS[Reg(offset)]
                    kept = getattr(queue, name) & ~(0xFFFF_FFFF << shift)
                    setattr(queue, name, kept | value << shift)
