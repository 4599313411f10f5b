"""The microvm's address map and interrupt lines, as docs/internals.md lists them."""

from __future__ import annotations

VIRTIO_MMIO_BASE = 0xD000_0000
VIRTIO_MMIO_STRIDE = 0x1000
VIRTIO_MMIO_SIZE = 0x200  # bytes that a slot answers (virtio 1.2, 4.2.2: registers, then configuration space)
VIRTIO_MMIO_SLOTS = 48  # disks from 0, NICs from 16, virtio consoles from 32, devices of the kit's kinds from 40

HOTPLUG_SLOTS = range(32)  # those of disks and NICs: the tables describe them whether something is in them or not
FIRST_SLOT = {"blk": 0, "net": 16}  # of the hot-pluggable kinds
SLOTS_A_KIND = 16

UART_PORT, UART_GSI = 0x3F8, 4
RTC_PORT, RTC_GSI = 0x70, 8
GED_GSI = 9

# The IOAPIC's pins that no platform device uses, shared by the slots. A machine's first 8 disks, 4 NICs and
# 5 consoles have lines of their own: each kind starts at its own place in the list.
VIRTIO_GSIS: tuple[int, ...] = (5, 6, 7, *range(10, 24))


def slot_address(slot: int) -> int:
    """Guest physical address of a virtio-mmio slot's registers."""
    return VIRTIO_MMIO_BASE + slot * VIRTIO_MMIO_STRIDE


def slot_gsi(slot: int) -> int:
    """The interrupt line of a virtio-mmio slot (edge-triggered, active high, possibly shared)."""
    if not 0 <= slot < VIRTIO_MMIO_SLOTS:
        raise ValueError(f"virtio-mmio slot {slot} is not in 0..{VIRTIO_MMIO_SLOTS - 1}")
    kind, index = divmod(slot, 16)
    return VIRTIO_GSIS[((0, 8, 12)[kind] + index) % len(VIRTIO_GSIS)]
