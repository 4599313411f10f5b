"""Boot loading: kernel images, initrd, the boot protocols.

``load`` puts a kernel into guest memory and says how to enter it; ``motorcade.core.boot.unpack.prepare_kernel``
is what the supervisor calls beforehand, so that a bzImage is decompressed once and not at every start.
"""

from motorcade.core.boot.entry import Entry, Mode
from motorcade.core.boot.error import BootError
from motorcade.core.boot.loader import load

__all__ = ["BootError", "Entry", "Mode", "load"]
