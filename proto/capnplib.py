"""pycapnp without asyncio, which costs half of its import: 70 modules, and OpenSSL.

pycapnp's RPC needs asyncio; we use its messages alone, and every VM's start waits for this import. So a stand-in takes
asyncio's place while pycapnp is imported, unless asyncio is there already. It has what a class of pycapnp's derives
from, and passes any other name on to the real asyncio. In a process that imported this first, pycapnp's RPC over
asyncio streams does not work, since that class is not one of asyncio's protocols.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any


class _Protocol:
    """The base of pycapnp's stream protocol (capnp.pyx, _PyAsyncIoStreamProtocol)."""

    __slots__ = ()


class _Asyncio(types.ModuleType):
    BufferedProtocol = _Protocol

    def __getattr__(self, name: str) -> Any:
        """The real one's, imported now; a pycapnp that wants more of it while it is imported costs the old time."""
        if sys.modules.get("asyncio") is self:
            del sys.modules["asyncio"]
        return getattr(importlib.import_module("asyncio"), name)


def _import() -> Any:
    if "asyncio" in sys.modules:
        return importlib.import_module("capnp")
    stand_in = sys.modules["asyncio"] = _Asyncio("asyncio")
    try:
        return importlib.import_module("capnp")
    finally:
        if sys.modules.get("asyncio") is stand_in:
            del sys.modules["asyncio"]


capnp = _import()
