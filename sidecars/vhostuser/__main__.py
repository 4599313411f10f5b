"""``python -m motorcade.sidecars.vhostuser --boot-fd N``."""

from motorcade.sidecars import runtime
from motorcade.sidecars.vhostuser.device import VhostUserDevice

raise SystemExit(runtime.main(VhostUserDevice))
