"""The product's vhost-user front-end (sidecars/vhostuser), as much of it as the benchmarks need."""

from __future__ import annotations

import os

from motorcade.proto.memory import Region
from motorcade.sidecars.vhostuser.backend import Backend, Ring
from motorcade.sidecars.vhostuser.opening import connect


class FrontEnd:
    """Owns the connection."""

    def __init__(self, path: str, queues: int) -> None:
        self.backend = Backend(connect(path), queues=queues, config_size=0)
        self._error = os.eventfd(0, os.EFD_CLOEXEC)

    def set_up(self, features: int, memory_fd: int, size: int) -> None:
        """Features and one region of guest memory at 0."""
        if missing := features & ~self.backend.all_features:
            raise ConnectionError(f"the back-end does not offer feature bits {missing:#x}")
        self.backend.set_up(features, memory_fd, [Region(0, size, 0)], log=False)

    def start(self, index: int, size: int, desc: int, driver: int, device: int, kick: int, call: int) -> None:
        """Starts a queue at fresh rings. Addresses are guest physical."""
        ring = Ring(index, size, desc, driver, device)
        self.backend.start(ring, 0, kick=kick, call=call, error=self._error, log=False)

    def stop(self, index: int) -> None:
        """Stops a queue: it takes no more."""
        self.backend.stop(index, call=self._error)

    def close(self) -> None:
        """Ends the connection."""
        self.backend.close()
        os.close(self._error)
