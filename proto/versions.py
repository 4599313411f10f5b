"""Versions of what crosses process boundaries, and which of them this code still speaks."""

from __future__ import annotations

PROTOCOL_VERSION = 1
"""Version of control.capnp and boot.capnp that this code speaks best. Raised when an old peer could misread a
message, not when a field that it may ignore is added (Cap'n Proto takes care of that)."""

OLDEST_PROTOCOL_VERSION = 1
"""The oldest version that this code still speaks."""


class VersionMismatch(ValueError):
    """The peer speaks no version of the protocol that we speak."""


def negotiate(offered: int) -> int:
    """The version to use with a peer whose best is ``offered``. Raises VersionMismatch.

    A newer peer is answered with our version; it decides whether it still speaks that.
    """
    if offered < OLDEST_PROTOCOL_VERSION:
        raise VersionMismatch(
            f"the peer speaks protocol version {offered}; "
            f"this side speaks {OLDEST_PROTOCOL_VERSION} to {PROTOCOL_VERSION}"
        )
    return min(offered, PROTOCOL_VERSION)
