"""The kit for new sidecars; docs/write-a-sidecar.md builds a device with it. This is its whole public face.
"""

from motorcade.proto.messages import Counter
from motorcade.sidecars.sdk.device import Device, Options
from motorcade.sidecars.sdk.request import UNTIL_WOKEN, BadRequest, Request

__all__ = ["UNTIL_WOKEN", "BadRequest", "Counter", "Device", "Options", "Request"]
