"""What a QMP command may fail with."""

from __future__ import annotations


class QmpError(Exception):
    """An error answer: ``{"class": ..., "desc": ...}``. ``desc`` is for a person, who should learn what to do."""

    error_class = "GenericError"

    def __init__(self, desc: str) -> None:
        super().__init__(desc)
        self.desc = desc


class CommandNotFound(QmpError):
    """No such command."""

    error_class = "CommandNotFound"


class DeviceNotFound(QmpError):
    """No device has that id."""

    error_class = "DeviceNotFound"


class DeviceNotActive(QmpError):
    """The device is there but its driver, or the device itself, has not been activated."""

    error_class = "DeviceNotActive"
