"""``python -m motorcade.sidecars.blk --boot-fd N``."""

from motorcade.sidecars import runtime
from motorcade.sidecars.blk.device import BlkDevice

raise SystemExit(runtime.main(BlkDevice))
