"""What machine.yaml says of a vhost-user device, and what follows from it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from motorcade.sidecars.sdk import Options

VIRTIO_ID_NET, VIRTIO_ID_BLOCK, VIRTIO_ID_FS = 1, 2, 26
BLK_CONFIG = 60  # bytes of struct virtio_blk_config up to what backends of any age know (5.2.4)
BLK_NUM_QUEUES = 34  # its place in there
FS_TAG = 36  # bytes (5.11.4)
MAX_QUEUES = 16  # what a device may have in a machine
_PATH_MAX = 107  # sun_path

Command = Annotated[list[Annotated[str, Meta(min_length=1, max_length=4096)]], Meta(min_length=1, max_length=100)]


class VhostUserOptions(Options, kw_only=True):
    """In machine.yaml."""

    type: Annotated[int, Meta(ge=1, le=63)] | Literal["fs", "blk"]
    socket: Annotated[str | None, Meta(description="Where the backend listens.")] = None
    command: Annotated[Command | None, Meta(description="Starts the backend; {fd} or {socket} is where.")] = None
    tag: Annotated[str | None, Meta(description="fs: what the guest mounts.")] = None
    queues: Annotated[int, Meta(ge=1, le=MAX_QUEUES)] = 1
    queue_size: Annotated[int, Meta(ge=2, le=1024)] = 128
    config_size: Annotated[int, Meta(ge=0, le=256)] = 0
    stateless: bool | None = None
    reconnect: Annotated[float, Meta(ge=0, le=86400)] = 30.0

    def problems(self) -> Iterator[tuple[str, str]]:
        """What types alone cannot say."""
        if self.socket is None and self.command is None:
            yield "", "give the backend's socket, or a command that starts it"
        if self.socket is not None:
            if not self.socket.startswith("/"):
                yield "socket", f"'{self.socket}' is not an absolute path"
            elif len(os.fsencode(self.socket)) > _PATH_MAX or "\0" in self.socket:
                yield "socket", f"no path of a unix socket (at most {_PATH_MAX} bytes)"
        if self.command is not None:
            yield from self._of_command(self.command)
        if self.type in (VIRTIO_ID_NET, "net"):
            yield "type", "network cards are in nets; this front-end has no control queue for one"
        if self.type == VIRTIO_ID_FS:
            yield "type", "say fs, which has a tag"
        if self.type == VIRTIO_ID_BLOCK:
            yield "type", "say blk"
        yield from self._of_type()
        if self.queue_size & (self.queue_size - 1):
            yield "queue_size", f"{self.queue_size} is not a power of two"

    def _of_command(self, command: list[str]) -> Iterator[tuple[str, str]]:
        places = sum("{fd}" in word or "{socket}" in word for word in command)
        if any("\0" in word for word in command):
            yield "command", "NULs cannot be part of it"
        if self.socket is None and not places:
            yield "command", "{fd} (a socket that listens) or {socket} (a path to listen at) tells it where to serve"
        if self.socket is not None and places:
            yield "command", "with a socket of its own it has neither {fd} nor {socket}"

    def _of_type(self) -> Iterator[tuple[str, str]]:
        if self.type == "fs":
            if not self.tag:
                yield "tag", "what the guest is to mount is missing (tag)"
            elif len(self.tag.encode()) > FS_TAG or "\0" in self.tag:
                yield "tag", f"at most {FS_TAG} bytes"
            if self.queues >= MAX_QUEUES:
                yield "queues", f"at most {MAX_QUEUES - 1}, since fs has one more for urgent requests"
            if self.stateless:
                yield "stateless", "a backend of fs has open files"
        elif self.tag is not None:
            yield "tag", "only fs has one"
        if isinstance(self.type, str) and self.config_size:
            yield "config_size", f"that of {self.type} is known"

    @property
    def shape(self) -> Shape:
        """What kind of device it is."""
        if self.type == "fs":
            return Shape("fs", VIRTIO_ID_FS, 1 + self.queues, 0, stateless=False)
        if self.type == "blk":
            return Shape("blk", VIRTIO_ID_BLOCK, self.queues, BLK_CONFIG, stateless=self.stateless is not False)
        number = int(self.type)
        return Shape(f"type {number}", number, self.queues, self.config_size, stateless=bool(self.stateless))

    @property
    def whose(self) -> str:
        """For messages: the backend."""
        return f"the backend at {self.socket}" if self.socket else f"the backend {(self.command or [''])[0]}"


@dataclass(frozen=True)
class Shape:
    """``config_size``: bytes that the backend says. ``stateless``: it keeps nothing but the rings' positions, and a
    request that it may have done already can be given to it once more."""

    name: str
    virtio_type: int
    queues: int
    config_size: int
    stateless: bool

    def config(self, given: bytes, options: VhostUserOptions) -> bytes:
        """Configuration space, of what the backend ``given``."""
        if self.virtio_type == VIRTIO_ID_FS:
            return (options.tag or "").encode().ljust(FS_TAG, b"\0") + options.queues.to_bytes(4, "little")
        if self.virtio_type == VIRTIO_ID_BLOCK:
            # The backend may have more queues than the device.
            number = options.queues.to_bytes(2, "little")
            return given[:BLK_NUM_QUEUES] + number + given[BLK_NUM_QUEUES + 2 :]
        return given

    @property
    def masked(self) -> int:
        """Feature bits that this front-end cannot pass on."""
        return 1 if self.virtio_type == VIRTIO_ID_FS else 0  # F_NOTIFICATION: a queue more
