"""What a zygote has loaded and tried out before it forks.

Whatever is imported, made or specialized on first use would be made again in each of a VM's processes, in time that
somebody waits for and in pages of its own. So everything is imported here, and the code that every start goes through
is run a few times: CPython counts a function's calls in the function itself, until it has rewritten it for good.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import types
from collections.abc import Iterable
from typing import Any, Union, get_args, get_origin, get_type_hints

# Imported inside functions, where `vmmctl up` should not wait for them before it has to.
_LAZY = (
    "encodings.idna",
    "faulthandler",
    "motorcade.core.boot.unpack",
    "motorcade.core.kvm",
    "motorcade.orchestrator.accel",
    "motorcade.orchestrator.disks",
    "motorcade.orchestrator.kvmprobe",
    "motorcade.orchestrator.pool",
    "motorcade.proto.framing",
    "motorcade.sidecars.log",
    "motorcade.orchestrator.frozendisks",
    "resource",
    "setproctitle",
)
_KINDS = ("blk", "net", "serial", "rng", "balloon", "pager")
_REHEARSALS = 10  # calls after which CPython 3.11 has specialized a function (8), and looked at it once more


def load() -> None:
    """Imports all."""
    from motorcade.orchestrator.spawn import load_mains

    load_mains(_KINDS)
    for name in _LAZY:
        importlib.import_module(name)


def rehearse(times: int = _REHEARSALS) -> None:
    """Encodes and decodes every message, an order and a template, and formats log lines, to no effect but speed."""
    from motorcade.orchestrator import daemon, machine
    from motorcade.proto import messages, template

    nets = [machine.Net(id="n", user=True, mac=machine.Mac(b"\x52\x54\0\0\0\1"))]
    disks, consoles = [machine.Disk(id="d", path="d")], [machine.Console(id="c")]
    kernel = machine.Kernel(image="k")
    example = machine.Machine(name="m", kernel=kernel, disks=disks, nets=nets, consoles=consoles)
    order = daemon.Order(example, "", "kvm", False)
    cpu, part = template.Cpu(bytes(40), (1,), 1), template.Component("vm", 1, b"x")
    parent = template.Parent("/x", bytes(template.IDENTITY_SIZE))
    frozen = template.Template("", cpu, template.CHUNK, b"\1", bytes(4), (parent,), "", (part,))
    kinds = (messages.Body, messages.Life, messages.Role)
    everything = [t for kind in kinds for t in get_args(kind)]
    for _ in range(times):
        _send(everything)
        _receive(everything)
        _log()
        daemon.decode_order(daemon.encode_order(order))
        template.decode(template.encode(frozen))


def _send(types: Iterable[Any]) -> None:
    for kind in types:
        _encoded.setdefault(kind, _encode(kind))


def _receive(types: Iterable[Any]) -> None:
    for kind in types:
        _decode(kind, _encoded[kind])


def _log() -> None:
    from motorcade.sidecars.log import Budget, JsonFormatter

    record = logging.LogRecord("zygote", logging.INFO, __file__, 1, "%s", ("rehearsal",), None)
    Budget().filter(record)
    JsonFormatter("zygote").format(record)


_encoded: dict[Any, bytes] = {}  # an example of each message


def _encode(kind: Any) -> bytes:
    from motorcade.proto import messages, schema

    sample = _sample(kind)
    if kind in get_args(messages.Body):
        return schema.encode(messages.Message(1, 1, sample))
    if kind in get_args(messages.Life):
        return schema.encode_life(sample)
    return schema.encode_boot(dataclasses.replace(_sample(messages.Boot), role=sample))


def _decode(kind: Any, data: bytes) -> None:
    from motorcade.proto import messages, schema

    if kind in get_args(messages.Body):
        schema.decode(data)
    elif kind in get_args(messages.Life):
        schema.decode_life(data)
    else:
        schema.decode_boot(data)


def _sample(annotation: Any) -> Any:
    """A value that the messages' bounds allow."""
    kind = get_origin(annotation)
    if kind is tuple:
        return (_sample(get_args(annotation)[0]),)
    if kind in (Union, types.UnionType):
        return _sample(get_args(annotation)[0])
    if dataclasses.is_dataclass(annotation):
        hints = get_type_hints(annotation)
        made: Any = annotation
        return made(**{f.name: _sample(hints[f.name]) for f in dataclasses.fields(annotation)})
    plain: dict[Any, Any] = {int: 1, bool: False, str: "x", bytes: bytes(6)}  # 1 is a power of 2, 6 bytes are a MAC
    return plain[annotation] if annotation in plain else next(iter(annotation))
