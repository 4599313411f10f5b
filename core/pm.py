"""Power management registers: the guest's poweroff and reboot, and the power button we press.

The FADT and DSDT of core/acpi say where these are; both are in docs/internals.md. A guest may also try the ways of
an older PC to reset, so two of them are here: the keyboard controller's and port 0xcf9. The last in Linux's order,
a triple fault, is not taken for a reset: a guest that crashed in early boot looks the same, and must be reported
with its registers, not started over for ever. A guest gets there only by asking for it (``reboot=t``).
"""

from __future__ import annotations

import logging
import struct
import threading
from collections.abc import Callable

from motorcade.core.layout import GED_GSI

log = logging.getLogger(__name__)

BASE = 0x600  # port
SIZE = 0x10
EVENT_STATUS = 0x0  # 4 bytes, read-only, cleared by reading: what the event interrupt is about
SLEEP_CONTROL = 0x4  # 1 byte: ACPI 6.5, section 4.8.3.7
SLEEP_STATUS = 0x5  # 1 byte
RESET = 0x6  # 1 byte: RESET_VALUE resets the machine

EVENT_POWER_BUTTON = 1 << 0
EVENT_GENERATION = 1 << 1  # the VM generation ID has changed
EVENT_SLOTS = 1 << 2  # a device has come to a virtio-mmio slot, or gone from one: tables.PRESENT_SLOTS
_EVENTS = EVENT_POWER_BUTTON | EVENT_GENERATION | EVENT_SLOTS
RESET_VALUE = 0x42
SLEEP_TYPE_S5 = 5  # what \_S5 says

_SLP_EN = 1 << 5
_SLP_TYP_SHIFT, _SLP_TYP_MASK = 2, 7

KBD_COMMAND = 0x64
CF9 = 0xCF9

_CF9_KEPT = 0xE & ~0x4  # RST_CPU is a pulse
_STATE = struct.Struct("<I")


class PmDevice:
    """The registers at BASE. The callables are called on the vCPU's thread that wrote, or power_button's caller's.

    ``on_shutdown`` and ``on_reset`` must only note the wish: the vCPU that calls is still inside its exit.
    ``raise_gsi`` sends one edge on it.
    """

    def __init__(
        self, on_shutdown: Callable[[], None], on_reset: Callable[[], None], raise_gsi: Callable[[int], None]
    ) -> None:
        self._on_shutdown = on_shutdown
        self._on_reset = on_reset
        self._raise_gsi = raise_gsi
        self._lock = threading.Lock()
        self._events = 0

    def read(self, offset: int, size: int) -> int:
        """BusDevice: only a whole read of EVENT_STATUS clears it, so that no half of it gets lost."""
        if offset == EVENT_STATUS and size == 4:
            with self._lock:
                events, self._events = self._events, 0
            return events
        # WAK_STS of the sleep status never comes up: we do not sleep, and from S5 nobody wakes.
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """BusDevice."""
        if size != 1:
            log.debug("a write of %d bytes to power management register %#x", size, offset)
        elif offset == SLEEP_CONTROL and value & _SLP_EN:
            kind = value >> _SLP_TYP_SHIFT & _SLP_TYP_MASK
            if kind == SLEEP_TYPE_S5:
                self._on_shutdown()
            else:
                log.warning("the guest asked for sleep type %d, which this machine has not", kind)
        elif offset == RESET and value == RESET_VALUE:
            self._on_reset()

    def power_button(self) -> None:
        """Presses the button: sets the event and interrupts the guest, which may ignore it. Any thread."""
        self._raise_event(EVENT_POWER_BUTTON)

    def generation_changed(self) -> None:
        """Says that the VM generation ID in memory is another one. Any thread."""
        self._raise_event(EVENT_GENERATION)

    def slots_changed(self) -> None:
        """Says that the bitmap of slots in memory is another one. Any thread."""
        self._raise_event(EVENT_SLOTS)

    def _raise_event(self, event: int) -> None:
        with self._lock:
            self._events |= event
        self._raise_gsi(GED_GSI)

    def reset(self) -> None:
        """Forgets a press that the guest has not seen: the machine starts over."""
        with self._lock:
            self._events = 0

    def save(self) -> bytes:
        """What the guest has not been told yet, for a snapshot."""
        with self._lock:
            return _STATE.pack(self._events)

    def restore(self, data: bytes) -> None:
        """Puts back what ``save`` gave; ValueError where it is not that."""
        if len(data) != _STATE.size:
            raise ValueError(f"{len(data)} bytes, not {_STATE.size}")
        (events,) = _STATE.unpack(data)
        if events & ~_EVENTS:
            raise ValueError(f"events {events:#x}, which this machine has not")
        with self._lock:
            self._events = events


class KeyboardReset:
    """Port 0x64, as much as a reset needs: command 0xfe pulses the processor's reset line.

    Its status reads 0, input buffer empty: Linux waits for that before it commands. One port at KBD_COMMAND.
    """

    def __init__(self, on_reset: Callable[[], None]) -> None:
        self._on_reset = on_reset

    def read(self, offset: int, size: int) -> int:
        """BusDevice: the controller's status."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """BusDevice: a command; all but the reset are taken and forgotten."""
        if value & 0xFF == 0xFE:
            self._on_reset()


class Cf9Reset:
    """Port 0xcf9, the chipset's reset control: bit 1 chooses system reset, a rise of bit 2 does it."""

    def __init__(self, on_reset: Callable[[], None]) -> None:
        self._on_reset = on_reset
        self._value = 0

    def read(self, offset: int, size: int) -> int:
        """BusDevice."""
        return self._value

    def write(self, offset: int, size: int, value: int) -> None:
        """BusDevice."""
        rises = value & 0x4 and not self._value & 0x4
        self._value = value & _CF9_KEPT
        if rises:
            self._on_reset()

    def save(self) -> bytes:
        """The register, for a snapshot."""
        return bytes([self._value])

    def restore(self, data: bytes) -> None:
        """Puts back what ``save`` gave; ValueError where it is not that."""
        if len(data) != 1 or data[0] & ~_CF9_KEPT:
            raise ValueError(f"{data[:4].hex()} is no value of port {CF9:#x}")
        self._value = data[0]
