"""MC146818 real-time clock and CMOS RAM at ports 0x70 and 0x71 (Motorola MC146818A; Intel ICH data sheets).

The clock is the host's, in UTC, plus what the guest set it off by. No interrupt: the alarm registers keep what is
written to them, and the DSDT names no interrupt, so that a driver polls instead of waiting for one.
"""

from __future__ import annotations

import calendar
import struct
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

SIZE = 2  # ports, from layout.RTC_PORT

_SECONDS, _MINUTES, _HOURS, _WEEKDAY, _DAY, _MONTH, _YEAR = 0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09
_A, _B, _C, _D = 0x0A, 0x0B, 0x0C, 0x0D
CENTURY = 0x32  # not the chip's, but where firmware keeps it; the FADT says so
_CLOCK = (_SECONDS, _MINUTES, _HOURS, _WEEKDAY, _DAY, _MONTH, _YEAR, CENTURY)

_UIP = 0x80  # of A: an update is in progress or less than 244 us away
_UIP_NS = 244_000
_SET = 0x80  # of B: the clock stands still while it is being set
_BINARY = 0x04  # of B: registers in binary, else in BCD
_HOURS_24 = 0x02  # of B: else 1 to 12 with _PM
_PM = 0x80  # of the hours
_VALID = 0x80  # of D: the battery is good

# Index, whether the clock stands still, the clock registers if so, the RAM, offset from UTC in nanoseconds (signed).
_STATE = struct.Struct(f"<BB{len(_CLOCK)}s128s16s")

_NS = 1_000_000_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# A guest may set the years 1900 to 9000; the clock goes on from there.
_OLDEST_NS, _NEWEST_NS = ((datetime(y, 1, 1, tzinfo=UTC) - _EPOCH) // timedelta(seconds=1) * _NS for y in (1899, 9500))


class Rtc:
    """The two ports as one BusDevice of SIZE ports. ``now_ns`` is UTC in nanoseconds since the epoch."""

    def __init__(self, now_ns: Callable[[], int] = time.time_ns) -> None:
        self._now_ns = now_ns
        self._lock = threading.Lock()
        self._index = _D
        self._ram = bytearray(128)
        self._ram[_A] = 0x26  # 32.768 kHz, periodic rate 1024 Hz: what firmware leaves
        self._ram[_B] = _HOURS_24
        self._offset_ns = 0
        self._frozen: dict[int, int] | None = None  # the clock registers while _SET holds them

    def read(self, offset: int, size: int) -> int:
        """BusDevice: port 0x70 cannot be read back, port 0x71 is the register chosen."""
        if size != 1 or offset != 1:
            return (1 << 8 * size) - 1
        with self._lock:
            return self._read(self._index)

    def write(self, offset: int, size: int, value: int) -> None:
        """BusDevice. A word written to 0x70 is an index and a value, as on the bus of a PC."""
        with self._lock:
            for i in range(size):
                byte = value >> 8 * i & 0xFF
                if offset + i == 0:
                    self._index = byte & 0x7F  # bit 7 masks NMI on a PC; there is none to mask
                elif offset + i == 1:
                    self._write(self._index, byte)

    def save(self) -> bytes:
        """All of it but the time, which is the host's wherever it is restored, for a snapshot."""
        with self._lock:
            frozen = bytes(self._frozen[i] for i in _CLOCK) if self._frozen is not None else bytes(len(_CLOCK))
            offset = self._offset_ns.to_bytes(16, "little", signed=True)
            return _STATE.pack(self._index, self._frozen is not None, frozen, self._ram, offset)

    def restore(self, data: bytes) -> None:
        """Puts back what ``save`` gave; ValueError where it is not that."""
        if len(data) != _STATE.size:
            raise ValueError(f"{len(data)} bytes, not {_STATE.size}")
        index, is_frozen, frozen, ram, offset = _STATE.unpack(data)
        offset_ns = int.from_bytes(offset, "little", signed=True)
        shown = self._now_ns() + offset_ns
        if index > 0x7F or is_frozen != bool(ram[_B] & _SET) or not _OLDEST_NS < shown < _NEWEST_NS:
            raise ValueError("it is not one that the clock can be in")
        with self._lock:
            self._index, self._offset_ns, self._ram = index, offset_ns, bytearray(ram)
            self._frozen = dict(zip(_CLOCK, frozen, strict=True)) if is_frozen else None

    def _read(self, index: int) -> int:
        if index in _CLOCK:
            return self._clock()[index]
        if index == _A:
            until_tick = _NS - (self._now_ns() + self._offset_ns) % _NS
            updating = self._frozen is None and until_tick <= _UIP_NS
            return self._ram[_A] | (_UIP if updating else 0)
        if index == _C:
            return 0  # no interrupt was ever raised
        if index == _D:
            return _VALID
        return self._ram[index]

    def _write(self, index: int, value: int) -> None:
        if index in _CLOCK:
            if self._frozen is not None:
                self._frozen[index] = value
            else:
                registers = self._clock()
                registers[index] = value
                self._set_clock(registers, (self._now_ns() + self._offset_ns) % _NS)
        elif index == _A:
            self._ram[_A] = value & ~_UIP & 0xFF
        elif index == _B:
            self._write_b(value)
        elif index not in (_C, _D):
            self._ram[index] = value

    def _write_b(self, value: int) -> None:
        if value & _SET and self._frozen is None:
            self._frozen = self._clock()
        elif not value & _SET and self._frozen is not None:
            registers, self._frozen = self._frozen, None
            self._ram[_B] = value  # the registers are read by the format that holds when the clock starts again
            # The first tick comes half a second after the clock starts, as on the chip (data sheet, divider chain);
            # Linux sets the time at such a moment that this is right.
            self._set_clock(registers, _NS // 2)
        self._ram[_B] = value

    def _clock(self) -> dict[int, int]:
        """The clock registers as the guest reads them."""
        if self._frozen is not None:
            return self._frozen
        # Not utcfromtimestamp: a guest may set its clock to years where the platform's functions end.
        t = _EPOCH + timedelta(seconds=(self._now_ns() + self._offset_ns) // _NS)
        hour, pm = t.hour, 0
        if not self._ram[_B] & _HOURS_24:
            hour, pm = (t.hour - 1) % 12 + 1, _PM if t.hour >= 12 else 0
        values = {
            _SECONDS: t.second,
            _MINUTES: t.minute,
            _HOURS: hour,
            _WEEKDAY: t.isoweekday() % 7 + 1,
            _DAY: t.day,
            _MONTH: t.month,
            _YEAR: t.year % 100,
            CENTURY: t.year // 100,
        }
        encoded = {index: self._encode(value) for index, value in values.items()}
        encoded[_HOURS] |= pm
        return encoded

    def _set_clock(self, registers: dict[int, int], fraction: int) -> None:
        """Moves the offset to what the registers say and ``fraction`` nanoseconds.

        Values that no clock shows are brought to the nearest one.
        """
        hours = registers[_HOURS]
        hour = self._decode(hours)
        if not self._ram[_B] & _HOURS_24:
            hour = self._decode(hours & ~_PM) % 12 + (12 if hours & _PM else 0)
        year = min(max(self._decode(registers[CENTURY]) * 100 + self._decode(registers[_YEAR]), 1900), 9000)
        month = min(max(self._decode(registers[_MONTH]), 1), 12)
        day = min(max(self._decode(registers[_DAY]), 1), calendar.monthrange(year, month)[1])
        t = datetime(
            year,
            month,
            day,
            min(hour, 23),
            min(self._decode(registers[_MINUTES]), 59),
            min(self._decode(registers[_SECONDS]), 59),
            tzinfo=UTC,
        )
        self._offset_ns = (t - _EPOCH) // timedelta(seconds=1) * _NS + fraction - self._now_ns()

    def _encode(self, value: int) -> int:
        return value if self._ram[_B] & _BINARY else value // 10 << 4 | value % 10

    def _decode(self, value: int) -> int:
        return value if self._ram[_B] & _BINARY else (value >> 4) * 10 + (value & 0xF)
