"""What the core asks of its supervisor when devices come and go: JSON in a Life message (boot.capnp, Hotplug).

The supervisor opens, names and forks; the core knows the slots and the guest. A request either is done, or has left
nothing behind: its answer says which. One at a time.

    OpenBackend -> Plug -> (the core expects the new process) -> Boot -> hello -> Settled ... Unplug -> CloseBackend

A slot whose driver is bound gets its next sidecar by Plug with ``replaces``: the two share the slot's doorbells,
and Unplug of the old one follows.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec


class _Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="op"):
    pass


class OpenBackend(_Request, frozen=True, tag="open"):
    """Opens, and locks, a disk (``kind`` blk) or a NIC's other side (net), for a later Plug.

    ``options``: as in machine.yaml, with the backend's name as their id. ``fds``: how many descriptors came along, each
    a queue of a tap.
    """

    kind: str
    options: dict[str, Any]
    fds: int = 0


class CloseBackend(_Request, frozen=True, tag="close"):
    """Lets go of a backend that no device uses."""

    name: str


class Plug(_Request, frozen=True, tag="plug"):
    """Forks a sidecar for device ``id``. Answered by Plugged, with the descriptors of a new slot's wiring.

    ``backend``: its name; empty: none, what is left of ``replaces`` in a slot whose driver stays bound. ``replaces``:
    the device whose queues it goes on with. ``keep``: the backend outlives the device.
    """

    id: str
    slot: int
    backend: str = ""
    replaces: str = ""
    keep: bool = True
    serial: str | None = None
    mac: str | None = None


class Boot(_Request, frozen=True, tag="boot"):
    """The core expects the process: it gets its Boot. ``incoming``: it starts quiesced."""

    id: str
    incoming: bool


class Settled(_Request, frozen=True, tag="settled"):
    """The device is one like the others: its sidecar's death is to be dealt with as theirs."""

    id: str


class Unplug(_Request, frozen=True, tag="unplug"):
    """The device is gone. Answered when its process is, which the core has asked to end; ``kill``: it has not."""

    id: str
    kill: bool = False


class Plugged(msgspec.Struct, frozen=True):
    """Slot of boot.capnp, of a new sidecar."""

    kind: str
    queues: int
    pid: int
    info: str
    mac: str | None = None


UNLIKE = "unlike: "
"""Begins the error of a Plug with ``replaces`` whose device has not the queues that are there."""

Request: TypeAlias = OpenBackend | CloseBackend | Plug | Boot | Settled | Unplug


def encode(request: Request | Plugged) -> str:
    """As JSON."""
    return msgspec.json.encode(request).decode()


def decode(text: str) -> Request:
    """What ``encode`` gave. ValueError."""
    request: Request = msgspec.json.decode(text, type=Request)
    return request
