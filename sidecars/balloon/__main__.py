"""``python -m motorcade.sidecars.balloon --boot-fd N``."""

from motorcade.sidecars import runtime
from motorcade.sidecars.balloon.device import BalloonDevice

raise SystemExit(runtime.main(BalloonDevice))
