"""``python -m motorcade.sidecars.net --boot-fd N``."""

from motorcade.sidecars import runtime
from motorcade.sidecars.net.device import NetDevice

if __name__ == "__main__":
    raise SystemExit(runtime.main(NetDevice))
