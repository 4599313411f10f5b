"""The microvm's address map and interrupt lines, as docs/internals.md lists them."""

from __future__ import annotations

VIRTIO_MMIO_BASE = 0xD000_0000
VIRTIO_MMIO_STRIDE = 0x1000
VIRTIO_MMIO_SIZE = 0x200  # bytes that a slot answers (virtio 1.2, 4.2.2: registers, then configuration space)
VIRTIO_MMIO_SLOTS = 48

UART_PORT, UART_GSI = 0x3F8, 4
RTC_PORT, RTC_GSI = 0x70, 8
GED_GSI = 9

# The IOAPIC's pins that no platform device uses. Slots share them round robin; the first 16 of them do not
# share with each other, nor do a machine's first disks with its first NICs (slot 16 begins one pin further).
VIRTIO_GSIS: tuple[int, ...] = (5, 6, 7, *range(10, 24))


def slot_address(slot: int) -> int:
    """Guest physical address of a virtio-mmio slot's registers."""
    return VIRTIO_MMIO_BASE + slot * VIRTIO_MMIO_STRIDE


def slot_gsi(slot: int) -> int:
    """The interrupt line of a virtio-mmio slot (edge-triggered, active high, possibly shared)."""
    if not 0 <= slot < VIRTIO_MMIO_SLOTS:
        raise ValueError(f"virtio-mmio slot {slot} is not in 0..{VIRTIO_MMIO_SLOTS - 1}")
    return VIRTIO_GSIS[slot % len(VIRTIO_GSIS)]
