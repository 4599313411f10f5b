"""What `vmmctl sidecar new` writes: a package with a device that works, and shows each part of the kit."""

from __future__ import annotations

_PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "motorcade-{kind}"
version = "0.1"
description = "A {kind} device for Motorcade"
requires-python = ">=3.11"
dependencies = ["motorcade"]

[project.entry-points."motorcade.sidecars"]
{kind} = "{package}.device:{name}Device"

[tool.setuptools]
packages = ["{package}"]
package-data = {{"{package}" = ["py.typed"]}}
"""

_DEVICE = '''\
"""The {kind} device: it sends back, in capitals, what the driver sends. Make it yours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from motorcade.sidecars import sdk

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from motorcade.proto.memory import GuestMemory
    from motorcade.proto.messages import Boot

CHUNK = 4096  # bytes of a request that are looked at, whatever the driver sends


class {name}Options(sdk.Options):
    """Its keys in machine.yaml."""

    greeting: str = ""


class {name}Device(sdk.Device):
    """One queue: what is to be read, then room for the answer."""

    virtio_type = 62  # a number that virtio 1.2 has not given away
    sizes = (64,)
    Options = {name}Options
    options: {name}Options

    def __init__(self, boot: Boot, fds: Mapping[str, int], memory: GuestMemory) -> None:
        super().__init__(boot, fds, memory)
        self._answered = 0

    @property
    def config(self) -> bytes:
        """What the driver reads at offset 0x100: how long the greeting is."""
        return len(self.options.greeting.encode()).to_bytes(4, "little")

    def handle(self, request: sdk.Request) -> float | None:
        """Answers at once."""
        text = request.read(CHUNK)
        if not text:
            raise sdk.BadRequest("it says nothing")
        request.write(self.options.greeting.encode() + text.upper())
        self._answered += 1
        return None

    def save_state(self) -> bytes:
        """What a template keeps of it."""
        return self._answered.to_bytes(8, "little")

    def load_state(self, version: int, data: bytes) -> None:
        """What a clone goes on from."""
        if len(data) != 8:
            raise ValueError(f"{{len(data)}} bytes of state, not 8")
        self._answered = int.from_bytes(data, "little")

    def counters(self) -> Sequence[sdk.Counter]:
        """For x-motorcade-sidecar-stats, beside what is counted of every queue."""
        return (sdk.Counter("answered", self._answered),)
'''


def files(kind: str) -> dict[str, str]:
    """Path and text of each file."""
    words = {"kind": kind, "package": f"motorcade_{kind.replace('-', '_')}", "name": kind.title().replace("-", "")}
    package = words["package"]
    return {
        "pyproject.toml": _PYPROJECT.format(**words),
        f"{package}/__init__.py": f'"""The {kind} device."""\n',
        f"{package}/py.typed": "",
        f"{package}/device.py": _DEVICE.format(**words),
    }
