"""``python -m motorcade.sidecars.rng --boot-fd N``."""

from motorcade.sidecars import runtime
from motorcade.sidecars.rng.device import RngDevice

raise SystemExit(runtime.main(RngDevice))
