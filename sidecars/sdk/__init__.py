"""The kit for new sidecars; docs/write-a-sidecar.md builds a device with it. This is its whole public face.
"""

from motorcade.proto.messages import Counter
from motorcade.sidecars.sdk.device import Device
from motorcade.sidecars.sdk.kind import Kind, Options, Place
from motorcade.sidecars.sdk.request import UNTIL_WOKEN, BadRequest, Request

__all__ = ["UNTIL_WOKEN", "BadRequest", "Counter", "Device", "Kind", "Options", "Place", "Request"]
