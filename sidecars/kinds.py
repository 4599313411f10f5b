"""The kinds of sidecar that machine.yaml's ``devices`` may name: Motorcade's own, and those of installed packages.

A package offers a kind by an entry point of the group ``motorcade.sidecars`` whose name is the kind and whose object is
a subclass of ``sdk.Device``:

    [project.entry-points."motorcade.sidecars"]
    dice = "my_package.dice:DiceDevice"
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from motorcade.sidecars import sdk

GROUP = "motorcade.sidecars"
OWN = {
    "balloon": "motorcade.sidecars.balloon.device:BalloonDevice",
    "rng": "motorcade.sidecars.rng.device:RngDevice",
    "vhost-user": "motorcade.sidecars.vhostuser.device:VhostUserDevice",
}
MAX_QUEUES, MAX_QUEUE_SIZE = 16, 1024  # of a device of the kit (native/queue.h)
MAX_TYPE = 0xFFFF
ELSEWHERE = frozenset({"balloon"})  # what machine.yaml has another place for
# Not to be had by a package: our own, and the other roles that name a process and its log.
RESERVED = frozenset({"blk", "net", "serial", "pager", "core", "supervisor", "passt", "backend", *OWN})


class UnknownKind(ValueError):
    """There is no such kind, or what should be it is not."""


def names() -> list[str]:
    """Every kind that ``devices`` may name."""
    return sorted({*OWN, *_offered()} - ELSEWHERE)


@functools.cache
def find(kind: str) -> type[sdk.Kind]:
    """The class of a kind, imported. UnknownKind: nobody offers it, several do, or what they offer is no device."""
    from motorcade.sidecars import sdk

    target = OWN.get(kind)
    if target is None:
        offers = {} if kind in RESERVED else _offered()
        if kind not in offers:
            raise UnknownKind(f"there is no kind of device '{kind}' (there are: {', '.join(names())})")
        if len(set(offers[kind])) > 1:
            raise UnknownKind(f"several packages offer a kind '{kind}': {', '.join(sorted(set(offers[kind])))}")
        target = offers[kind][0]
    module, _, name = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as e:  # whatever a package of somebody else's does when it is imported
        raise UnknownKind(f"kind '{kind}': {target} cannot be imported: {type(e).__name__}: {e}") from e
    if not (isinstance(found, type) and issubclass(found, sdk.Kind)):
        raise UnknownKind(f"kind '{kind}': {target} is not a subclass of motorcade.sidecars.sdk.Device")
    needed = ("virtio_type", "sizes") if issubclass(found, sdk.Device) else ()
    if missing := [n for n in needed if not hasattr(found, n)] + sorted(found.__abstractmethods__):
        raise UnknownKind(f"kind '{kind}': {target} has no {', '.join(missing)}")
    if problem := _problem(found):
        raise UnknownKind(f"kind '{kind}': {target}: {problem}")
    return found


def _problem(found: type[sdk.Kind]) -> str:
    """What a class says of its devices that cannot be, while there is somebody to tell; or nothing."""
    from motorcade.sidecars import sdk

    if not (isinstance(found.Options, type) and issubclass(found.Options, sdk.Options)):
        return "its Options are not a subclass of motorcade.sidecars.sdk.Options"
    if issubclass(found, sdk.Device):
        sizes: object = found.sizes
        if not isinstance(sizes, tuple | list) or not 1 <= len(sizes) <= MAX_QUEUES:
            return f"sizes {sizes!r}: it is to be a tuple of one to {MAX_QUEUES} sizes"
        if wrong := [n for n in sizes if not isinstance(n, int) or not 0 < n <= MAX_QUEUE_SIZE or n & (n - 1)]:
            return f"a queue of size {wrong[0]!r}: it is to be a power of two up to {MAX_QUEUE_SIZE}"
        number: object = found.virtio_type
        if not isinstance(number, int) or not 0 < number <= MAX_TYPE:
            return f"virtio_type {number!r}: it is to be a device id (virtio 1.2, 5), or another up to {MAX_TYPE}"
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m motorcade.sidecars.kinds KIND --boot-fd N``: the sidecar of a kind, whoever offers it."""
    from motorcade.sidecars import runtime

    kind, *rest = sys.argv[1:] if argv is None else argv
    return runtime.main(find(kind), rest)


def _offered() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    try:
        points = list(importlib.metadata.entry_points(group=GROUP))
    except Exception as e:  # a damaged file of any installed package
        raise UnknownKind(f"the entry points of the installed packages cannot be read: {type(e).__name__}: {e}") from e
    for point in points:
        if point.name not in RESERVED:
            found.setdefault(point.name, []).append(point.value)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
