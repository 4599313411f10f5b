"""Errors that a person at a terminal can act on."""

from __future__ import annotations

EXIT_OK = 0  # the guest powered off, or did what was asked
EXIT_ERROR = 1  # something failed; the message says what
EXIT_USAGE = 2  # the command line or machine.yaml is wrong
EXIT_NOT_FOUND = 3  # no such VM, or it is not running
EXIT_TIMEOUT = 4  # the guest did not do in time what it was asked to


class UserError(Exception):
    """``str()`` is one clear line (or one a problem); ``status`` is vmmctl's exit status."""

    def __init__(self, message: str, status: int = EXIT_ERROR) -> None:
        super().__init__(message)
        self.status = status
