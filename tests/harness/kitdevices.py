"""Devices of the kit for tests, named MODULE:CLASS where a kind is."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from harness.kitnative import HANDLER
from motorcade.sidecars import sdk

if TYPE_CHECKING:
    from motorcade.proto.memory import GuestMemory
    from motorcade.proto.messages import Boot


class PostDevice(sdk.Device):
    """Queue 0 sends text; queue 1 gets it, when there is any: so its requests wait. The descriptor ``bell``, an
    eventfd, posts a bell's text from the host. Text that says ``die`` is this device's bug; ``later`` comes again by
    itself."""

    virtio_type = 62
    sizes = (8, 8)
    offers = 1 << 3

    def __init__(self, boot: Boot, fds: Mapping[str, int], memory: GuestMemory) -> None:
        super().__init__(boot, fds, memory)
        self._post: list[bytes] = []
        self._once: set[bytes] = set()
        self._written = b"\0\0"

    @property
    def config(self) -> bytes:
        """Its first byte counts what waits, the others are the driver's."""
        return bytes([len(self._post)]) + self._written

    def write_config(self, offset: int, data: bytes) -> None:
        """All but the first byte."""
        whole = bytearray(self.config)
        whole[offset : offset + len(data)] = data
        self._written = bytes(whole[1:])
        self.changed()

    def handle(self, request: sdk.Request) -> float | None:
        """See the class."""
        if request.queue == 1:
            if not self._post:
                return sdk.UNTIL_WOKEN
            request.write(self._post.pop(0))
        else:
            text = request.read(3) + request.read(1 << 40)
            if text == b"die":
                raise ZeroDivisionError("a bug")
            if text == b"later" and text not in self._once:
                self._once.add(text)
                return 0.05
            if not text:
                raise sdk.BadRequest("no text")
            self._post.append(text)
            self.wake()
        self.changed()
        return None

    def fileno_events(self) -> Mapping[int, Callable[[], None]]:
        """The bell."""
        return {self.fds["bell"]: self._ring} if "bell" in self.fds else {}

    def _ring(self) -> None:
        os.eventfd_read(self.fds["bell"])
        self._post.append(b"ding")
        self.wake()

    def save_state(self) -> bytes:
        """What waits."""
        return b"\n".join(self._post)

    def load_state(self, version: int, data: bytes) -> None:
        """As it was."""
        self._post = data.split(b"\n") if data else []


class NativeDevice(sdk.Device):
    """Answers by tests/device/native/kit_handler.c. The driver's writing to its configuration space is ``later``."""

    virtio_type = 62
    sizes = (64,)

    def native(self) -> tuple[int, int]:
        """The address of the function, and that of ``later``."""
        self._later = ctypes.c_uint32(0)
        return HANDLER, ctypes.addressof(self._later)

    @property
    def config(self) -> bytes:
        """``later``."""
        return bytes([self._later.value])

    def write_config(self, offset: int, data: bytes) -> None:
        """Sets it."""
        self._later.value = data[0]
        self.wake()

    def handle(self, request: sdk.Request) -> float | None:
        """Never called."""
        raise AssertionError("the function in C answers")


class CrowdDevice(PostDevice):
    """More queues than the kit has."""

    sizes = (8,) * 17


class StuckDevice(PostDevice):
    """One that never answers a text of four bytes: its data loop is in it for good."""

    def handle(self, request: sdk.Request) -> float | None:
        """See the class."""
        if request.queue == 0 and request.readable == 4:
            threading.Event().wait()
        return super().handle(request)
