"""What is wrong with a kernel, an initrd or a command line, said so that its owner can act on it."""

from __future__ import annotations


class BootError(Exception):
    """The machine cannot be booted from what it was given. The message names the file."""


def mib(size: int) -> str:
    """``size`` bytes in MiB for a message, rounded up so that what does not fit never reads as if it did."""
    return f"{-(-size * 10 // (1 << 20)) / 10:g} MiB"
