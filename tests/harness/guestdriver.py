"""A virtio driver that runs inside a micro-guest: Python writes its program, tests/guests/main.c executes it.

Every register write, ring entry and notification comes from real guest code on /dev/kvm and takes the way of any
other guest's. The program is too long for a command line: it goes into the initrd.
"""

from __future__ import annotations

from pathlib import Path

from motorcade.core.virtio_mmio import Reg

RINGS = 0x800000  # guest physical, above the micro-guest itself
NEEDS_RESET = 64
F_FLUSH = 1 << 9  # a disk whose driver lacks it turns its cache off, and tells by a configuration change
QUEUE_SIZE = 8
POWER_OFF = "out=1540:52"  # to the ACPI sleep control register (core/pm.py)


class Script:
    """The words a micro-guest is to do, and the lines it will print if all is well."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.expected: list[str] = []

    def say(self, text: str) -> None:
        """Prints a line of its own, without blanks: what a failure came after."""
        self.words.append(f"print={text}")
        self.expected.append(text)

    def store(self, gpa: int, *values: int) -> None:
        """Writes 32-bit words of memory."""
        self.words += [f"store={gpa + 4 * n}:{value & 0xFFFFFFFF}" for n, value in enumerate(values)]

    def load(self, gpa: int, expected: int) -> None:
        """Prints a 32-bit word of memory."""
        self.words.append(f"load={gpa}")
        self.expected.append(f"{expected:x}")

    def until(self, gpa: int, value: int) -> None:
        """Waits until a 32-bit word of memory, or of a device's registers, is that."""
        self.words.append(f"until={gpa}:{value}")

    def write(self, folder: Path) -> Path:
        """The program as an initrd file."""
        path = folder / "script"
        path.write_bytes("\n".join(self.words).encode() + b"\0")
        return path


class GuestDriver:
    """The driver of one virtio-mmio slot, in a Script. Its rings have QUEUE_SIZE entries, without EVENT_IDX."""

    def __init__(self, script: Script, slot: int, features: int = 0) -> None:
        """``features``: the low 32 bits that it accepts."""
        self.script, self.slot, self.features = script, slot, features
        # Where queue 0's parts are, and memory for one request.
        base = RINGS + slot * 0x10000
        self.desc, self.avail, self.used = base, base + 0x1000, base + 0x2000
        self.header, self.status_byte, self.data = base + 0x3000, base + 0x3010, base + 0x4000
        self._avail_idx = 0

    def poke(self, register: int, value: int) -> None:
        """Writes a register."""
        self.script.words += [f"slot={self.slot}", f"poke={register}:{value}"]

    def peek(self, register: int, expected: int) -> None:
        """Prints a register."""
        self.script.words += [f"slot={self.slot}", f"peek={register}"]
        self.script.expected.append(f"{expected:x}")

    def reset(self) -> None:
        """Device reset (virtio 1.2, 2.4), and rings as they are at first."""
        self.poke(Reg.STATUS, 0)
        self.peek(Reg.STATUS, 0)
        self.script.store(self.avail, 0)
        self.script.store(self.used, 0)
        self._avail_idx = 0

    def negotiate(self) -> None:
        """Up to FEATURES_OK."""
        self.poke(Reg.STATUS, 1)
        self.poke(Reg.STATUS, 3)
        self.poke(Reg.DRIVER_FEATURES_SEL, 0)
        self.poke(Reg.DRIVER_FEATURES, self.features)
        self.poke(Reg.DRIVER_FEATURES_SEL, 1)
        self.poke(Reg.DRIVER_FEATURES, 1)  # VERSION_1
        self.poke(Reg.STATUS, 11)
        self.peek(Reg.STATUS, 11)

    def queue(self, *, size: int = QUEUE_SIZE, desc: int | None = None, used: int | None = None) -> None:
        """Sets queue 0 up and makes it ready."""
        self.poke(Reg.QUEUE_SEL, 0)
        self.poke(Reg.QUEUE_NUM, size)
        places = {
            Reg.QUEUE_DESC_LOW: self.desc if desc is None else desc,
            Reg.QUEUE_DRIVER_LOW: self.avail,
            Reg.QUEUE_DEVICE_LOW: self.used if used is None else used,
        }
        for low, address in places.items():
            self.poke(low, address & 0xFFFFFFFF)
            self.poke(low + 4, address >> 32)
        self.poke(Reg.QUEUE_READY, 1)

    def driver_ok(self) -> None:
        """Starts the device."""
        self.poke(Reg.STATUS, 15)

    def start(self) -> None:
        """From reset to a running device."""
        self.reset()
        self.negotiate()
        self.queue()
        self.driver_ok()

    def descriptor(self, index: int, address: int, length: int, flags: int, following: int) -> None:
        """Writes an entry of queue 0's table as it is."""
        self.script.store(self.desc + 16 * index, address, address >> 32, length, flags | following << 16)

    def offer(self, head: int = 0, *, ahead: int = 1) -> None:
        """Makes a chain available, moves the index on by ``ahead``, and notifies."""
        at = self.avail + 4 + 2 * (self._avail_idx % QUEUE_SIZE)
        assert at % 4 == 0, "two requests of one start: give each a start of its own"
        self._avail_idx += ahead
        self.script.store(at, head)
        self.script.store(self.avail, self._avail_idx << 16)
        self.notify(0)

    def notify(self, queue: int) -> None:
        """QueueNotify."""
        self.poke(Reg.QUEUE_NOTIFY, queue)

    def expect_needs_reset(self) -> None:
        """The configuration change interrupt, and NEEDS_RESET in the status of a running device (2.1.2)."""
        self.script.words += [f"slot={self.slot}", "isr"]
        self.script.expected.append("isr 2 then 0")
        self.peek(Reg.STATUS, 15 | NEEDS_RESET)

    def request(self, kind: int, sector: int, status: int, size: int = 512, gpa: int | None = None) -> None:
        """A block request of one buffer (5.2.6) on a freshly started device, and its outcome."""
        self.start()
        self.script.store(self.header, kind, 0, sector, 0)
        self.script.store(self.status_byte, 0xA5A5A5FF)
        self.descriptor(0, self.header, 16, 1, 1)
        if size:
            writable = 2 if kind == 0 else 0
            self.descriptor(1, self.data if gpa is None else gpa, size, 1 | writable, 2)
        self.descriptor(2 if size else 1, self.status_byte, 1, 2, 0)
        self.offer()
        self.script.words += [f"slot={self.slot}", "isr"]
        self.script.expected.append("isr 1 then 0")
        self.script.load(self.status_byte, 0xA5A5A500 | status)  # and nothing behind it
