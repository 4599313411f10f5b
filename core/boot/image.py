"""The bytes of a kernel or an initrd: from a file descriptor, or unpacked in this process."""

from __future__ import annotations

import os
from typing import Protocol

from motorcade.core.boot.error import BootError, mib


class Image(Protocol):
    """A file to load. ``name`` is for messages, ``size`` in bytes."""

    name: str
    size: int

    def read(self, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes at ``offset``; BootError where the image ends before."""

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fills ``target`` from ``offset``; BootError where the image ends before."""


class FileImage:
    """An image read with pread, so that a file which shrinks under us is an error and not a SIGBUS.

    The descriptor stays the caller's.
    """

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self.name = name
        try:
            self.size = os.fstat(fd).st_size
        except OSError as e:
            raise BootError(f"{name}: {e.strerror}") from e

    def read(self, offset: int, size: int) -> bytes:
        data = bytearray(size)
        self.read_into(memoryview(data), offset)
        return bytes(data)

    def read_into(self, target: memoryview, offset: int) -> None:
        done = 0
        while done < len(target):
            try:
                n = os.preadv(self._fd, [target[done:]], offset + done)
            except OSError as e:
                raise BootError(f"{self.name}: cannot be read: {e.strerror}") from e
            if n == 0:
                raise _short(self.name, offset + len(target), offset + done)
            done += n


class BytesImage:
    """An image that is in memory already."""

    def __init__(self, data: bytes, name: str) -> None:
        self._data = memoryview(data)
        self.name = name
        self.size = len(data)

    def read(self, offset: int, size: int) -> bytes:
        if offset + size > self.size:
            raise _short(self.name, offset + size, self.size)
        return bytes(self._data[offset : offset + size])

    def read_into(self, target: memoryview, offset: int) -> None:
        if offset + len(target) > self.size:
            raise _short(self.name, offset + len(target), self.size)
        target[:] = self._data[offset : offset + len(target)]


def _short(name: str, wanted: int, got: int) -> BootError:
    return BootError(f"{name}: truncated: {wanted} bytes ({mib(wanted)}) are needed, it ends after {got}")
