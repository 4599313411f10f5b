"""How fast this CPU's time-stamp counter ticks.

QEMU's software emulation passes the host's counter through, and the box's kernel, on a machine without PM
timer and HPET, has nothing to calibrate it against but an emulated PIT: on a busy host that fails one time in
ten, and the boot hangs. So it is told (``tsc_early_khz=``).
"""

import ctypes
import mmap
import platform
import time

# rdtsc; shl $32,%rdx; or %rdx,%rax; ret
_READ_TSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")
_WRITE_AND_RUN = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
_INTERVAL = 0.02
"""Seconds between the two samples: what is measured, not a wait for anything."""


def tsc_khz() -> int | None:
    """Kilohertz, to a few parts in a million; None on other architectures. Takes 20 ms.

    Raises OSError where the host forbids memory that is executable (SELinux' execmem).
    """
    if platform.machine() != "x86_64":
        return None
    code = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, _WRITE_AND_RUN)
    code.write(_READ_TSC)
    anchor = ctypes.c_char.from_buffer(code)
    read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(anchor))

    def sample() -> tuple[int, int]:
        """A moment by both clocks: the closest pair of a few, since we may be preempted between them."""
        best = None
        for _ in range(8):
            before = time.monotonic_ns()
            ticks = read()
            width = time.monotonic_ns() - before
            if best is None or width < best[0]:
                best = (width, ticks, before + width // 2)
        assert best is not None
        return best[1], best[2]

    ticks, begun = sample()
    time.sleep(_INTERVAL)
    later_ticks, ended = sample()
    del anchor  # an export of the mapping: close() would refuse
    code.close()
    return round((later_ticks - ticks) * 1_000_000 / (ended - begun))


if __name__ == "__main__":
    import sys

    sys.stdout.write(f"{tsc_khz()}\n")
