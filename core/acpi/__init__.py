"""The ACPI tables by which an unmodified kernel finds its CPUs, interrupt controller and devices."""

from motorcade.core.acpi.tables import build

__all__ = ["build"]
