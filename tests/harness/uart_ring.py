"""The core's end of the 16550's rings (core/native/uart_ring.h), in Python: producer of tx, consumer of rx.

It keeps to the wake-up protocol, so a wake-up that the sidecar forgets shows as a TimeoutError; and every position can
be written raw, as a broken core would.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import struct
import time
from typing import Self

from harness.driver import fence
from motorcade.sidecars._serial import ffi, lib

TX_SIZE, RX_SIZE = lib.MC_UART_TX_SIZE, lib.MC_UART_RX_SIZE
SIZE = ffi.sizeof("struct mc_uart_ring")
_TX_POS, _RX_POS = ffi.offsetof("struct mc_uart_ring", "tx"), ffi.offsetof("struct mc_uart_ring", "rx")
_TX_DATA, _RX_DATA = ffi.offsetof("struct mc_uart_ring", "tx_data"), ffi.offsetof("struct mc_uart_ring", "rx_data")
_HEAD, _TAIL, _ASLEEP, _WAITING = (
    ffi.offsetof("struct mc_ring_pos", name) for name in ("head", "tail", "consumer_asleep", "producer_waiting")
)


class UartRing:
    """Owns the ring's memfd and the two eventfds."""

    def __init__(self, *, size: int = SIZE, sealed: bool = True) -> None:
        self.fd = os.memfd_create("uart", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, size)
        if sealed:
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self._map = mmap.mmap(self.fd, size)
        flags = os.EFD_NONBLOCK | os.EFD_CLOEXEC
        self.tx_event, self.rx_event = os.eventfd(0, flags), os.eventfd(0, flags)
        self.tx_head = self.rx_tail = 0
        self.wakeups = 0  # signals sent

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def fds(self) -> dict[str, int]:
        """By the labels of the sidecar."""
        return {"uart.ring": self.fd, "uart.tx": self.tx_event, "uart.rx": self.rx_event}

    # Words of the rings, raw.

    def _get(self, at: int) -> int:
        return int(struct.unpack_from("<I", self._map, at)[0])

    def _put(self, at: int, value: int) -> None:
        struct.pack_into("<I", self._map, at, value & 0xFFFFFFFF)

    def set_tx_head(self, value: int) -> None:
        """Publishes this position, whatever is behind it."""
        self.tx_head = value & 0xFFFFFFFF
        self._put(_TX_POS + _HEAD, value)

    def set_rx_tail(self, value: int) -> None:
        """Likewise, of the other ring."""
        self.rx_tail = value & 0xFFFFFFFF
        self._put(_RX_POS + _TAIL, value)

    def set_start(self, tx: int, rx: int) -> None:
        """Both rings empty at these positions, before the sidecar starts."""
        for base, value in ((_TX_POS, tx), (_RX_POS, rx)):
            self._put(base + _HEAD, value)
            self._put(base + _TAIL, value)
        self.tx_head, self.rx_tail = tx, rx

    @property
    def tx_tail(self) -> int:
        """How far the sidecar has read."""
        return self._get(_TX_POS + _TAIL)

    @property
    def tx_room(self) -> int:
        """Bytes that fit."""
        return TX_SIZE - (self.tx_head - self.tx_tail & 0xFFFFFFFF)

    @property
    def rx_filled(self) -> int:
        """Bytes that the sidecar has put in."""
        return self._get(_RX_POS + _HEAD) - self.rx_tail & 0xFFFFFFFF

    def signal(self) -> None:
        """Wakes the sidecar, asked or not."""
        self.wakeups += 1
        os.eventfd_write(self.tx_event, 1)

    def _wait(self, deadline: float, what: str) -> None:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([self.rx_event], [], [], left)[0]:
            raise TimeoutError(f"{what}: the sidecar did not signal")
        os.eventfd_read(self.rx_event)

    # The core.

    def put(self, data: bytes) -> int:
        """Adds what fits, as the 16550 does; returns how many bytes."""
        n = min(len(data), self.tx_room)
        at = self.tx_head % TX_SIZE
        first = min(n, TX_SIZE - at)
        self._map[_TX_DATA + at : _TX_DATA + at + first] = data[:first]
        self._map[_TX_DATA : _TX_DATA + n - first] = data[first:n]
        self.set_tx_head(self.tx_head + n)
        fence()
        if n and self._get(_TX_POS + _ASLEEP):
            self._put(_TX_POS + _ASLEEP, 0)
            self.signal()
        return n

    def print(self, data: bytes, timeout: float = 20.0) -> None:
        """Adds everything, waiting for room as often as it takes."""
        deadline = time.monotonic() + timeout
        view = memoryview(data)
        while view:
            view = view[self.put(bytes(view[:TX_SIZE])) :]
            if view and not self.tx_room:
                self._put(_TX_POS + _WAITING, 1)
                fence()
                if not self.tx_room:
                    self._wait(deadline, f"{len(view)} bytes left to print")

    def drained(self, timeout: float = 20.0) -> None:
        """Waits until the sidecar has read everything."""
        deadline = time.monotonic() + timeout
        while self.tx_tail != self.tx_head:
            self._put(_TX_POS + _WAITING, 1)
            fence()
            if self.tx_tail != self.tx_head:
                self._wait(deadline, "waiting for the ring to be drained")

    def take(self, most: int = RX_SIZE) -> bytes:
        """Takes what is there, without waiting, and makes room for more."""
        n = min(self.rx_filled, most)
        at = self.rx_tail % RX_SIZE
        first = min(n, RX_SIZE - at)
        data = self._map[_RX_DATA + at : _RX_DATA + at + first] + self._map[_RX_DATA : _RX_DATA + n - first]
        self.set_rx_tail(self.rx_tail + n)
        fence()
        if n and self._get(_RX_POS + _WAITING):
            self._put(_RX_POS + _WAITING, 0)
            self.signal()
        return bytes(data)

    def read(self, n: int, timeout: float = 20.0) -> bytes:
        """Waits for ``n`` bytes of input, by signals alone."""
        deadline = time.monotonic() + timeout
        data = b""
        while len(data) < n:
            data += self.take(n - len(data))
            if len(data) < n and not self.rx_filled:
                self._put(_RX_POS + _ASLEEP, 1)
                fence()
                if not self.rx_filled:
                    self._wait(deadline, f"{len(data)} of {n} bytes of input")
        return data

    def wait_signal(self, timeout: float = 20.0) -> None:
        """Waits for a signal of the sidecar, whatever it means."""
        self._wait(time.monotonic() + timeout, "waiting for a signal")

    def wait_rx_filled(self, n: int, timeout: float = 20.0) -> None:
        """Waits until ``n`` bytes are in the rx ring, taking none."""
        deadline = time.monotonic() + timeout
        while self.rx_filled < n:
            self._put(_RX_POS + _ASLEEP, 1)
            fence()
            if self.rx_filled < n:
                self._wait(deadline, f"{self.rx_filled} of {n} bytes of input in the ring")

    def close(self) -> None:
        """Lets go of everything."""
        self._map.close()
        for fd in (self.fd, self.tx_event, self.rx_event):
            os.close(fd)
