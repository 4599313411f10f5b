"""``python -m motorcade.sidecars.serial --boot-fd N``."""

from motorcade.sidecars import runtime
from motorcade.sidecars.serial.device import SerialDevice

raise SystemExit(runtime.main(SerialDevice))
