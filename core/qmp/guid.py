"""GUIDs as ACPI's VM generation ID has them: sixteen bytes, the first three fields little-endian (as in RFC 4122's COM
variant)."""

from __future__ import annotations

import re

SIZE = 16
_TEXT = re.compile("[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


def _swapped(value: bytes) -> bytes:
    return value[3::-1] + value[5:3:-1] + value[7:5:-1] + value[8:]


def text(value: bytes) -> str:
    """The usual form of 16 bytes in memory."""
    digits = _swapped(value).hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def parse(form: str) -> bytes | None:
    """The 16 bytes of a GUID in its usual form; None where it is none."""
    return _swapped(bytes.fromhex(form.replace("-", ""))) if _TEXT.fullmatch(form) else None
