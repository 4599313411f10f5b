"""KVM: the system and the VM (Documentation/virt/kvm/api.rst). One vCPU is in vcpustate.py, their threads in vcpu.py.

ioctl numbers and layouts come from the kernel's headers through ``motorcade.core._native``.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable
from typing import Any

from motorcade.core._native import ffi, lib
from motorcade.core.layout import UART_PORT, VIRTIO_MMIO_BASE
from motorcade.core.snapshot.dirty import DirtyPages, words
from motorcade.proto.memory import PAGE, GuestMemory

# Four pages that VT-x needs in real mode, away from RAM and devices (below the firmware's window, as QEMU has it).
_IDENTITY_MAP = 0xFFFB_C000
_TSS = 0xFFFB_D000

# What every path of this program relies on. All are older than the kernels whose headers we build with.
_REQUIRED = (
    "IRQCHIP", "USER_MEMORY", "SET_TSS_ADDR", "SET_IDENTITY_MAP_ADDR", "EXT_CPUID", "MP_STATE", "IRQFD", "IOEVENTFD",
    "VCPU_EVENTS", "DEBUGREGS", "XSAVE", "ADJUST_CLOCK", "TSC_DEADLINE_TIMER", "IMMEDIATE_EXIT",
)  # fmt: skip

# One component's saved state: its name and the kernel's structure as bytes.
Record = tuple[str, bytes]


class KvmError(Exception):
    """A request that KVM refused, or a host whose KVM lacks something."""

    def __init__(self, message: str, number: int = 0) -> None:
        super().__init__(message)
        self.errno = number


def call(what: str, fd: int, request: int, arg: Any = None) -> int:
    """An ioctl with a pointer to a structure (``ffi`` data) or an integer; KvmError names ``what``."""
    if arg is None or isinstance(arg, int):
        result = lib.mc_ioctl_value(fd, request, arg or 0)
    else:
        result = lib.mc_ioctl(fd, request, arg)
    return check(what, result)


def check(what: str, result: int) -> int:
    """``result`` of a C function that gives -errno for failures, as a KvmError."""
    if result < 0:
        raise KvmError(f"{what}: {os.strerror(-result)}", -result)
    return result


class Kvm:
    """/dev/kvm. ``fd`` stays the caller's, and open as long as the VM."""

    def __init__(self, fd: int) -> None:
        """KvmError where it is not KVM, or one that lacks what a VM here needs."""
        self.fd = fd
        version = call("KVM_GET_API_VERSION", fd, lib.KVM_GET_API_VERSION)
        if version != lib.KVM_API_VERSION:
            raise KvmError(f"KVM speaks API version {version}, not {lib.KVM_API_VERSION}")
        missing = [name for name in _REQUIRED if not self.extension(getattr(lib, f"KVM_CAP_{name}"))]
        if missing:
            raise KvmError(f"this host's KVM lacks {', '.join('KVM_CAP_' + name for name in missing)}")

    def extension(self, capability: int) -> int:
        """KVM_CHECK_EXTENSION: 0 where the capability is missing, else 1 or what the API says it counts."""
        return call("KVM_CHECK_EXTENSION", self.fd, lib.KVM_CHECK_EXTENSION, capability)

    @property
    def max_vcpus(self) -> int:
        """The most vCPUs that a VM may have."""
        return self.extension(lib.KVM_CAP_MAX_VCPUS)

    def supported_cpuid(self) -> Any:
        """KVM_GET_SUPPORTED_CPUID: a ``struct kvm_cpuid2``, the caller's to change."""

        def get(room: int) -> Any:
            table = ffi.new("struct kvm_cpuid2 *", {"nent": room, "entries": room})
            call("KVM_GET_SUPPORTED_CPUID", self.fd, lib.KVM_GET_SUPPORTED_CPUID, table)
            return table

        return _grow(get)

    @functools.cached_property
    def msr_indices(self) -> list[int]:
        """The MSRs that hold a vCPU's state: what a snapshot must contain."""

        def get(room: int) -> list[int]:
            table = ffi.new("struct kvm_msr_list *", {"nmsrs": room, "indices": room})
            call("KVM_GET_MSR_INDEX_LIST", self.fd, lib.KVM_GET_MSR_INDEX_LIST, table)
            return list(table.indices[0 : table.nmsrs])

        indices: list[int] = _grow(get)
        return indices


def _grow(get: Callable[[int], Any]) -> Any:
    """The result of ``get(room)`` with as much room as KVM turns out to need (E2BIG: more)."""
    room = 128
    while True:
        try:
            return get(room)
        except KvmError as e:
            if e.errno != errno.E2BIG or room > 1 << 14:
                raise
            room *= 2


class InterruptStatus:
    """A slot's ``struct mc_isr``, shared with its sidecar."""

    def __init__(self, fd: int) -> None:
        """Maps the page; ``fd`` stays the caller's. ValueError unless it is sealed against shrinking."""
        self.pointer = lib.mc_isr_map(fd)
        if self.pointer == ffi.NULL:
            raise ValueError(f"InterruptStatus cannot be mapped: {_map_error()}")

    def replace(self, fd: int) -> None:
        """Goes on with the page of another ``fd``, the caller's, while vCPUs may read it. ValueError as at first."""
        error = lib.mc_isr_replace(self.pointer, fd)
        if error:
            raise ValueError(f"InterruptStatus cannot be mapped: {os.strerror(-error)}")

    def set(self, bits: int) -> None:
        """ORs bits in; write the call eventfd afterwards."""
        lib.mc_isr_raise(self.pointer, bits)

    def clear(self, bits: int = 0xFFFF_FFFF) -> None:
        """Clears bits, all unless told."""
        lib.mc_isr_clear(self.pointer, bits)

    def read(self) -> int:
        """The bits that the guest has not acknowledged."""
        return int(lib.mc_isr_read(self.pointer))

    def unmap(self) -> None:
        """Ends the mapping; only while no vCPU runs."""
        lib.mc_isr_unmap(self.pointer)
        self.pointer = ffi.NULL


def _map_error() -> str:
    if ffi.errno == errno.EPERM:
        return "it is not sealed against shrinking"
    if ffi.errno == errno.EINVAL:
        return "it is too small, or not a memfd"
    return os.strerror(ffi.errno)


class Vm:
    """A VM with an in-kernel interrupt controller. Owns its fd; ``memory`` must outlive it."""

    def __init__(self, kvm: Kvm, memory: GuestMemory, *, pit: bool = False) -> None:
        """Creates it. ``pit``: with an i8254, for guests that know neither kvmclock nor the TSC deadline timer."""
        self.kvm = kvm
        self.memory = memory
        self.fd = call("KVM_CREATE_VM", kvm.fd, lib.KVM_CREATE_VM)
        self._pit = pit
        self._isrs: dict[int, InterruptStatus] = {}  # by slot
        self._dirty_bits: list[Any] = []
        self.platform = ffi.new("struct mc_platform *", {"uart_port": UART_PORT, "mmio_base": VIRTIO_MMIO_BASE})
        try:
            self._set_up()
        except BaseException:
            self.close()
            raise

    def _set_up(self) -> None:
        slots = self.kvm.extension(lib.KVM_CAP_NR_MEMSLOTS)
        if len(self.memory.regions) > slots:
            raise KvmError(f"{len(self.memory.regions)} RAM regions, but KVM has {slots} memory slots")
        call("KVM_SET_IDENTITY_MAP_ADDR", self.fd, lib.KVM_SET_IDENTITY_MAP_ADDR, ffi.new("uint64_t *", _IDENTITY_MAP))
        call("KVM_SET_TSS_ADDR", self.fd, lib.KVM_SET_TSS_ADDR, _TSS)
        # Before the irqchip: a new slot waits for all SRCU callbacks, and the irqchip's I/O ports queue some; 7 ms
        # where bench.restore's floor was measured, against 0.1.
        self._set_memory(0)
        call("KVM_CREATE_IRQCHIP", self.fd, lib.KVM_CREATE_IRQCHIP)
        if self._pit:
            # A speaker that nobody hears answers port 0x61, which calibration loops read.
            config = ffi.new("struct kvm_pit_config *", {"flags": lib.KVM_PIT_SPEAKER_DUMMY})
            call("KVM_CREATE_PIT2", self.fd, lib.KVM_CREATE_PIT2, config)
        check("masking the 8259s", lib.mc_mask_pics(self.fd))
        self._power_on = self.save()

    def _set_memory(self, flags: int) -> None:
        for slot, region in enumerate(self.memory.regions):
            address = self.memory.host_address(slot)
            area = ffi.new("struct kvm_userspace_memory_region *", (slot, flags, region.gpa, region.size, address))
            call(f"RAM at {region.gpa:#x}", self.fd, lib.KVM_SET_USER_MEMORY_REGION, area)

    def close(self) -> None:
        """Closes the VM; its vCPUs must be closed before, their threads gone."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        for isr in self._isrs.values():
            isr.unmap()
        self._isrs.clear()

    # Interrupts and doorbells.

    def irq_line(self, gsi: int, level: bool) -> None:
        """Sets an interrupt line. An edge-triggered one interrupts when it goes from low to high."""
        state = ffi.new("struct kvm_irq_level *", {"irq": gsi, "level": int(level)})
        call(f"KVM_IRQ_LINE {gsi}", self.fd, lib.KVM_IRQ_LINE, state)

    def add_irqfd(self, eventfd: int, gsi: int) -> None:
        """Makes every write to ``eventfd`` pulse line ``gsi``; the fd stays the caller's."""
        self._irqfd(eventfd, gsi, 0)

    def remove_irqfd(self, eventfd: int, gsi: int) -> None:
        """Undoes add_irqfd; when it returns, no more interrupts come from there."""
        self._irqfd(eventfd, gsi, lib.KVM_IRQFD_FLAG_DEASSIGN)

    def _irqfd(self, eventfd: int, gsi: int, flags: int) -> None:
        args = ffi.new("struct kvm_irqfd *", {"fd": eventfd, "gsi": gsi, "flags": flags})
        call(f"KVM_IRQFD of line {gsi}", self.fd, lib.KVM_IRQFD, args)

    def add_ioeventfd(self, eventfd: int, gpa: int, value: int) -> None:
        """Makes the guest's 32-bit writes of ``value`` to ``gpa`` signal ``eventfd``, which stays the caller's."""
        self._ioeventfd(eventfd, gpa, value, 0)

    def remove_ioeventfd(self, eventfd: int, gpa: int, value: int) -> None:
        """Undoes add_ioeventfd: such writes are MMIO exits again."""
        self._ioeventfd(eventfd, gpa, value, lib.KVM_IOEVENTFD_FLAG_DEASSIGN)

    def _ioeventfd(self, eventfd: int, gpa: int, value: int, flags: int) -> None:
        flags |= lib.KVM_IOEVENTFD_FLAG_DATAMATCH
        args = {"datamatch": value, "addr": gpa, "len": 4, "fd": eventfd, "flags": flags}
        call(f"KVM_IOEVENTFD at {gpa:#x}", self.fd, lib.KVM_IOEVENTFD, ffi.new("struct kvm_ioeventfd *", args))

    def map_isr(self, slot: int, fd: int) -> InterruptStatus:
        """Has the C exit loop answer InterruptStatus and InterruptACK of a virtio-mmio slot from this page.

        ``fd``: a memfd of ``struct mc_isr``, the caller's. The mapping lives as long as the VM, since a vCPU may be
        about to use it at any time: a slot that is filled again has its new page at the same address.
        """
        if (isr := self._isrs.get(slot)) is not None:
            isr.replace(fd)
            return isr
        isr = self._isrs[slot] = InterruptStatus(fd)
        check(f"virtio-mmio slot {slot}", lib.mc_platform_set_isr(self.platform, slot, isr.pointer))
        return isr

    # What the guest writes.

    def start_dirty_log(self) -> None:
        """From now on KVM notes each page that the guest, or KVM for it, writes. The vCPUs may run."""
        if any(r.offset % (64 * PAGE) for r in self.memory.regions):
            raise ValueError("a RAM region does not begin at a whole word of the dirty bitmap")
        self._dirty_bits = [ffi.new("uint64_t[]", words(r.size)) for r in self.memory.regions]
        self._set_memory(lib.KVM_MEM_LOG_DIRTY_PAGES)

    def stop_dirty_log(self) -> None:
        """Undoes start_dirty_log: what was not taken is forgotten, and the guest writes at full speed again."""
        self._dirty_bits = []
        self._set_memory(0)

    def take_dirty(self, dirty: DirtyPages) -> None:
        """Moves KVM's log into ``dirty``. A write after this is in the next one.

        It knows nothing of what this or another process writes through its own mapping. Errors: KvmError.
        """
        if not self._dirty_bits:
            raise RuntimeError("the dirty log is not on")
        for slot, (region, bits) in enumerate(zip(self.memory.regions, self._dirty_bits, strict=True)):
            log = ffi.new("struct kvm_dirty_log *", {"slot": slot, "dirty_bitmap": bits})
            call(f"KVM_GET_DIRTY_LOG of slot {slot}", self.fd, lib.KVM_GET_DIRTY_LOG, log)
            dirty.merge(region.offset // PAGE, bits)

    # State.

    def reset(self) -> None:
        """The interrupt controllers (and the PIT) as after power-on; the vCPUs must be parked."""
        self.restore(self._power_on)

    def clock(self) -> int:
        """kvmclock: nanoseconds as the guest sees them."""
        data = ffi.new("struct kvm_clock_data *")
        call("KVM_GET_CLOCK", self.fd, lib.KVM_GET_CLOCK, data)
        return int(data.clock)

    def set_clock(self, nanoseconds: int) -> None:
        """Sets kvmclock; the vCPUs must be parked."""
        data = ffi.new("struct kvm_clock_data *", {"clock": nanoseconds})
        call("KVM_SET_CLOCK", self.fd, lib.KVM_SET_CLOCK, data)

    def save(self) -> list[Record]:
        """The interrupt controllers (and the PIT), for ``restore``; the vCPUs must be parked."""
        records = []
        for name, chip_id in _IRQCHIPS:
            chip = ffi.new("struct kvm_irqchip *", {"chip_id": chip_id})
            call("KVM_GET_IRQCHIP", self.fd, lib.KVM_GET_IRQCHIP, chip)
            records.append((name, bytes(ffi.buffer(chip))))
        if self._pit:
            pit = ffi.new("struct kvm_pit_state2 *")
            call("KVM_GET_PIT2", self.fd, lib.KVM_GET_PIT2, pit)
            records.append(("pit", bytes(ffi.buffer(pit))))
        return records

    def restore(self, records: list[Record]) -> None:
        """Puts back what ``save`` gave; ValueError where a record is not of this VM."""
        for name, data in records:
            chip_id = dict(_IRQCHIPS).get(name)
            if chip_id is not None:
                chip = from_record("struct kvm_irqchip", name, data)
                if chip.chip_id != chip_id:
                    raise ValueError(f"record {name} is of another interrupt controller")
                call("KVM_SET_IRQCHIP", self.fd, lib.KVM_SET_IRQCHIP, chip)
            elif name == "pit" and self._pit:
                call("KVM_SET_PIT2", self.fd, lib.KVM_SET_PIT2, from_record("struct kvm_pit_state2", name, data))
            else:
                raise ValueError(f"record {name} is of no component of this VM")


_IRQCHIPS = (
    ("pic0", lib.KVM_IRQCHIP_PIC_MASTER),
    ("pic1", lib.KVM_IRQCHIP_PIC_SLAVE),
    ("ioapic", lib.KVM_IRQCHIP_IOAPIC),
)


def from_record(ctype: str, name: str, data: bytes) -> Any:
    """A kernel structure from a record's bytes; ValueError where the length is not its own."""
    value = ffi.new(f"{ctype} *")
    if len(data) != ffi.sizeof(value[0]):
        raise ValueError(f"record {name} has {len(data)} bytes, not {ffi.sizeof(value[0])}")
    ffi.buffer(value)[:] = data
    return value
