"""One vCPU: its creation, what it is set to before the first instruction, and its whole state as records.

``save`` and ``restore`` serve both the guest's reset (back to what KVM created) and snapshots. KVM wants a vCPU's
ioctls while no thread is inside of KVM_RUN for it: before the start, or with the vCPUs parked.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import Any

from motorcade.core import cpuid
from motorcade.core._native import ffi, lib
from motorcade.core.boot.entry import Entry, Mode
from motorcade.core.kvm import KvmError, Record, Vm, call, check, from_record

_CR0_PE, _CR0_ET, _CR0_PG = 1 << 0, 1 << 4, 1 << 31
_CR4_PAE = 1 << 5
_EFER_LME, _EFER_LMA = 1 << 8, 1 << 10
_FAST_STRINGS = 1  # IA32_MISC_ENABLE bit 0
_MTRR_ENABLED_WB = 1 << 11 | 6  # IA32_MTRR_DEF_TYPE: enabled, write-back (Intel SDM volume 3, 12.11.2.1)
_LINT_EXTINT, _LINT_NMI = 7 << 8, 4 << 8  # delivery modes of a local vector table entry

# State that KVM_GET_MSR_INDEX_LIST does not name: the MTRRs (Intel SDM volume 4, table 2-2), variable and fixed.
MTRRS = [*range(0x200, 0x210), 0x250, 0x258, 0x259, *range(0x268, 0x270), lib.MC_MSR_IA32_MTRR_DEF_TYPE]

# In the order in which they are put back: the MSRs need the segment registers' EFER and APIC base, the APIC its base,
# the deadline timer the APIC (and follows below), events and the runnable state come last.
_FIXED = ("sregs", "regs", "xcrs", "debugregs", "lapic", "events", "mp_state")
_TYPES = {
    "regs": ("struct kvm_regs", lib.KVM_GET_REGS, lib.KVM_SET_REGS),
    "sregs": ("struct kvm_sregs", lib.KVM_GET_SREGS, lib.KVM_SET_SREGS),
    "xcrs": ("struct kvm_xcrs", lib.KVM_GET_XCRS, lib.KVM_SET_XCRS),
    "debugregs": ("struct kvm_debugregs", lib.KVM_GET_DEBUGREGS, lib.KVM_SET_DEBUGREGS),
    "lapic": ("struct kvm_lapic_state", lib.KVM_GET_LAPIC, lib.KVM_SET_LAPIC),
    "events": ("struct kvm_vcpu_events", lib.KVM_GET_VCPU_EVENTS, lib.KVM_SET_VCPU_EVENTS),
    "mp_state": ("struct kvm_mp_state", lib.KVM_GET_MP_STATE, lib.KVM_SET_MP_STATE),
}

_TSC_APART = 1 << 44  # ticks: hours, where KVM takes two values less than a second apart for one (Vcpu.start_time)


@dataclass(frozen=True)
class _StoppedTime:
    """What of a saved vCPU goes on by itself: kept aside until the vCPU first runs."""

    tsc: int
    deadline: int | None  # IA32_TSC_DEADLINE, where there is one
    initial_count: int  # APIC timer
    current_count: int


class Vcpu:
    """A vCPU of a VM. Owns its fd and the mapping of its run page."""

    def __init__(self, vm: Vm, index: int, cpus: int, supported: Any) -> None:
        """Creates vCPU ``index`` (also its APIC id) of ``cpus``; ``supported`` is Kvm.supported_cpuid()'s table."""
        self.index = index
        self._vm = vm
        self.fd = call(f"creating vCPU {index}", vm.fd, lib.KVM_CREATE_VCPU, index)
        self.native = ffi.new("struct mc_vcpu *")
        self._stopped: _StoppedTime | None = None
        try:
            size = call("KVM_GET_VCPU_MMAP_SIZE", vm.kvm.fd, lib.KVM_GET_VCPU_MMAP_SIZE)
            check(f"mapping vCPU {index}", lib.mc_vcpu_init(self.native, self.fd, size, vm.platform))
            self.set_cpuid(cpuid.make(supported, index, cpus))
            # What KVM made is what a reset goes back to.
            self._power_on = self.save()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes it; its thread must be gone."""
        lib.mc_vcpu_deinit(self.native)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _call(self, what: str, request: int, arg: Any = None) -> int:
        return call(f"vCPU {self.index}: {what}", self.fd, request, arg)

    def _get(self, name: str) -> Any:
        ctype, get, _ = _TYPES[name]
        value = ffi.new(f"{ctype} *")
        self._call(f"reading {name}", get, value)
        return value

    def read(self, name: str) -> Any:
        """A struct of KVM's, pointed to: regs, sregs, debugregs and so on. A copy."""
        return self._get(name)

    def _set(self, name: str, value: Any) -> None:
        self._call(f"setting {name}", _TYPES[name][2], value)

    def set_cpuid(self, table: Any) -> None:
        """What CPUID says (``struct kvm_cpuid2``); before the first instruction, and before ``restore``."""
        self._call("CPUID", lib.KVM_SET_CPUID2, table)
        self.cpuid = cpuid.to_bytes(table)

    @property
    def msrs(self) -> list[int]:
        """Those that this vCPU has, and ``save`` saves."""
        return list(msr_values(dict(self._power_on)["msrs"]))

    # Starting.

    def reset(self, entry: Entry | None) -> None:
        """The state after power-on, and then the boot processor's at ``entry``, or waiting for SIPI (None)."""
        lib.mc_vcpu_forget_exit(self.native)
        self._stopped = None
        self.restore([r for r in self._power_on if r[0] != "msrs"] + self._reset_msrs())
        self.prepare(entry)

    def _reset_msrs(self) -> list[Record]:
        # The time stamp counter goes on: guests tell time by it, and KVM keeps those of all vCPUs in step.
        msrs = {i: v for i, v in msr_values(dict(self._power_on)["msrs"]).items() if i != lib.MC_MSR_IA32_TSC}
        return [("msrs", _msr_record(msrs))]

    def prepare(self, entry: Entry | None) -> None:
        """What firmware leaves, on a vCPU as KVM creates it; then as ``reset``."""
        self.set_msrs({lib.MC_MSR_IA32_MISC_ENABLE: _FAST_STRINGS, lib.MC_MSR_IA32_MTRR_DEF_TYPE: _MTRR_ENABLED_WB})
        lapic = self._get("lapic")
        # Virtual wire: the 8259s reach the boot processor through LINT0, NMI is LINT1 of all of them.
        regs = _apic_registers(lapic)
        if entry is not None:
            regs[lib.MC_APIC_LVT_LINT0 // 4] = _LINT_EXTINT
        regs[lib.MC_APIC_LVT_LINT1 // 4] = _LINT_NMI
        self._set("lapic", lapic)
        if entry is not None:
            self._enter(entry)
        # KVM calls vCPU 0 the boot processor; the others wait for INIT and SIPI.
        state = lib.KVM_MP_STATE_RUNNABLE if entry is not None else lib.KVM_MP_STATE_UNINITIALIZED
        self._set("mp_state", ffi.new("struct kvm_mp_state *", {"mp_state": state}))

    def _enter(self, entry: Entry) -> None:
        long_mode = entry.mode is Mode.LONG64
        sregs = self._get("sregs")
        flat = {"base": 0, "limit": 0xFFFF_FFFF, "present": 1, "s": 1, "g": 1, "dpl": 0, "unusable": 0}
        sregs.cs = {**flat, "selector": 0x10, "type": 0xB, "db": not long_mode, "l": long_mode}
        for name in ("ds", "es", "ss"):
            setattr(sregs, name, {**flat, "selector": 0x18, "type": 0x3, "db": 1})
        for name in ("fs", "gs", "ldt"):
            setattr(sregs, name, {"unusable": 1})
        sregs.tr = {"base": 0, "limit": 0x67, "selector": 0x20, "type": 0xB, "present": 1}
        sregs.gdt = {"base": entry.gdt, "limit": entry.gdt_limit}
        sregs.idt = {"base": 0, "limit": 0}
        sregs.cr0 = _CR0_PE | _CR0_ET
        sregs.cr4 = sregs.cr3 = sregs.efer = 0
        if long_mode:
            sregs.cr0 |= _CR0_PG
            sregs.cr3 = entry.cr3
            sregs.cr4 = _CR4_PAE
            sregs.efer = _EFER_LME | _EFER_LMA
        self._set("sregs", sregs)
        registers = {"rip": entry.rip, "rsi": entry.rsi, "rbx": entry.rbx, "rsp": entry.rsp, "rflags": 2}
        self._set("regs", ffi.new("struct kvm_regs *", registers))

    # State.

    def save(self) -> list[Record]:
        """Everything that KVM keeps of this vCPU; time as it stood still, if ``restore_stopped`` has stopped it."""
        records = self._save()
        return records if self._stopped is None else _with_time(records, self._stopped)

    def _save(self) -> list[Record]:
        # A processor without XSAVE has no XCR0 (and KVM no request for it); its FXSAVE state is in "xsave" too.
        has_xcrs = call("KVM_CHECK_EXTENSION", self._vm.fd, lib.KVM_CHECK_EXTENSION, lib.KVM_CAP_XCRS)
        fixed = [name for name in _FIXED if name != "xcrs" or has_xcrs]
        records = [(name, bytes(ffi.buffer(self._get(name)))) for name in fixed]
        records.append(("xsave", bytes(ffi.buffer(self._xsave(read=True)))))
        records.append(("msrs", _msr_record(self.get_msrs(sorted({*self._vm.kvm.msr_indices, *MTRRS})))))
        return records

    def restore(self, records: list[Record]) -> None:
        """Puts back what ``save`` gave; ValueError where a record is not a vCPU's."""
        by_name = dict(records)
        if unknown := by_name.keys() - {*_FIXED, "xsave", "msrs"}:
            raise ValueError(f"records {', '.join(sorted(unknown))} are of no part of a vCPU")
        msrs = msr_values(by_name["msrs"]) if "msrs" in by_name else {}
        deadline = {i: msrs.pop(i) for i in (lib.MC_MSR_IA32_TSC_DEADLINE,) if i in msrs}
        for name in _FIXED:
            if name == "events":
                self.set_msrs(msrs)
                if "xsave" in by_name:
                    self._xsave(read=False, data=by_name["xsave"])
            if name in by_name:
                self._set(name, from_record(_TYPES[name][0], name, by_name[name]))
        self.set_msrs(deadline)

    def restore_stopped(self, records: list[Record]) -> None:
        """As ``restore``, from a snapshot: its time stamp counter and timers wait for ``start_time``. ValueError where
        one of the records that every vCPU has is missing or damaged, KvmError where KVM does not take them."""
        by_name = dict(records)
        if missing := {name for name, _ in self._power_on} - by_name.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        msrs = msr_values(by_name["msrs"])
        if lib.MC_MSR_IA32_TSC not in msrs:
            raise ValueError("it lacks the time stamp counter")
        regs = _apic_registers(from_record("struct kvm_lapic_state", "lapic", by_name["lapic"]))
        stopped = _StoppedTime(
            tsc=msrs[lib.MC_MSR_IA32_TSC],
            deadline=msrs.get(lib.MC_MSR_IA32_TSC_DEADLINE),
            initial_count=regs[lib.MC_APIC_TMICT // 4],
            current_count=regs[lib.MC_APIC_TMCCT // 4],
        )
        lib.mc_vcpu_forget_exit(self.native)
        # The counter itself is left as it is: nothing reads it before start_time.
        still = _with_time(records, _StoppedTime(0, None if stopped.deadline is None else 0, 0, 0))
        still_msrs = {i: v for i, v in msr_values(dict(still)["msrs"]).items() if i != lib.MC_MSR_IA32_TSC}
        self.restore([r for r in still if r[0] != "msrs"] + [("msrs", _msr_record(still_msrs))])
        self._stopped = stopped

    def start_time(self, elapsed_ns: int, tsc_khz: int) -> None:
        """Sets what ``restore_stopped`` kept aside, ``elapsed_ns`` later. vCPU 0 first; all before any of them runs.

        Nothing where no time was kept aside. A KVM that gives guests the host's counter (pvm) ignores ours.
        """
        stopped, self._stopped = self._stopped, None
        if stopped is None:
            return
        tsc = (stopped.tsc + elapsed_ns * tsc_khz // 1_000_000) & (1 << 64) - 1
        if self.index == 0:
            # KVM takes a value that is within a second of the counter for an attempt to keep the vCPUs in step, and
            # leaves the counter alone (kvm_synchronize_tsc). So vCPU 0 goes elsewhere first; the others then are
            # such an attempt, and rightly so.
            self.set_msrs({lib.MC_MSR_IA32_TSC: tsc ^ _TSC_APART})
        self.set_msrs({lib.MC_MSR_IA32_TSC: tsc})
        lapic = self._get("lapic")  # not the saved one: an interrupt may have come in since
        regs = _apic_registers(lapic)
        regs[lib.MC_APIC_TMICT // 4] = stopped.initial_count
        regs[lib.MC_APIC_TMCCT // 4] = _count_later(stopped.current_count, regs[lib.MC_APIC_TDCR // 4], elapsed_ns)
        if stopped.initial_count:
            self._set("lapic", lapic)
        if stopped.deadline:
            self.set_msrs({lib.MC_MSR_IA32_TSC_DEADLINE: stopped.deadline})

    def lose_time(self, ns: int) -> None:
        """Tells a guest that asked for it that this vCPU has not run for ``ns``, during which its clocks went on. Else
        its scheduler takes that for the work of the task that was running, with which the others then catch up.

        Parked. KVM adds to the same counter (kernel, Documentation/virt/kvm/x86/msr.rst: MSR_KVM_STEAL_TIME).
        """
        value = self.get_msrs([lib.MC_MSR_KVM_STEAL_TIME]).get(lib.MC_MSR_KVM_STEAL_TIME, 0)
        if not value & 1:
            return
        try:
            counter = self._vm.memory.view(value & ~0x3F, 8)  # struct kvm_steal_time begins with it
        except ValueError:
            return  # no RAM: KVM leaves it alone, too
        stolen = int.from_bytes(counter, "little") + ns
        counter[:] = (stolen & (1 << 64) - 1).to_bytes(8, "little")

    def scale_tsc(self, khz: int) -> None:
        """Has the time stamp counter run at ``khz``; KvmError where this host cannot do that."""
        self._call("KVM_SET_TSC_KHZ", lib.KVM_SET_TSC_KHZ, khz)

    @property
    def tsc_khz(self) -> int:
        """Of the guest's time stamp counter."""
        return self._call("KVM_GET_TSC_KHZ", lib.KVM_GET_TSC_KHZ)

    def _xsave(self, *, read: bool, data: bytes = b"") -> Any:
        # KVM_CAP_XSAVE2 counts the bytes where a feature (AMX) makes the area larger than the classic 4 KiB.
        size = call("KVM_CHECK_EXTENSION", self._vm.fd, lib.KVM_CHECK_EXTENSION, lib.KVM_CAP_XSAVE2)
        area = ffi.new("char[]", max(size, ffi.sizeof("struct kvm_xsave")))
        if read:
            self._call("reading xsave", lib.KVM_GET_XSAVE2 if size else lib.KVM_GET_XSAVE, area)
        else:
            if len(data) != len(area):
                raise ValueError(f"record xsave has {len(data)} bytes, not {len(area)}")
            ffi.buffer(area)[:] = data
            self._call("setting xsave", lib.KVM_SET_XSAVE, area)
        return area

    def get_msrs(self, indices: list[int]) -> dict[int, int]:
        """The values of those of the MSRs that this vCPU has."""
        found: dict[int, int] = {}
        while indices:
            table = _msr_table(dict.fromkeys(indices, 0))
            # KVM stops at the first that it cannot read: one that this vCPU's CPUID does not have.
            done = self._call("KVM_GET_MSRS", lib.KVM_GET_MSRS, table)
            found.update((e.index, e.data) for e in table.entries[0:done])
            indices = indices[done + 1 :]
        return found

    def set_msrs(self, values: dict[int, int]) -> None:
        """Sets MSRs. One that refuses the value which it has already (a read-only one) is passed over."""
        items = list(values.items())
        while items:
            done = self._call("KVM_SET_MSRS", lib.KVM_SET_MSRS, _msr_table(dict(items)))
            if done == len(items):
                return
            index, value = items[done]
            if self.get_msrs([index]) != {index: value}:
                raise KvmError(f"vCPU {self.index}: KVM refuses {value:#x} in MSR {index:#x}", errno.EINVAL)
            items = items[done + 1 :]

    def dump(self) -> str:
        """The registers, for a person."""
        r, s = self._get("regs"), self._get("sregs")
        lines = []
        names = ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", *(f"r{n}" for n in range(8, 16))]
        for i in range(0, len(names), 4):
            lines.append(" ".join(f"{n:>3}={getattr(r, n):016x}" for n in names[i : i + 4]))
        lines.append(f"rip={r.rip:016x} rflags={r.rflags:08x} cpl={s.ss.dpl} efer={s.efer:x}")
        lines.append(f"cr0={s.cr0:08x} cr2={s.cr2:016x} cr3={s.cr3:016x} cr4={s.cr4:08x} cr8={s.cr8:x}")
        for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"):
            g = getattr(s, name)
            flags = f"type={g.type:x} dpl={g.dpl} p={g.present} s={g.s} l={g.l} db={g.db} g={g.g}"
            lines.append(f"{name:>3}={g.selector:04x} base={g.base:016x} limit={g.limit:08x} {flags}")
        lines.append(f"gdt base={s.gdt.base:016x} limit={s.gdt.limit:04x}")
        lines.append(f"idt base={s.idt.base:016x} limit={s.idt.limit:04x} apic_base={s.apic_base:x}")
        return "\n".join(lines)

    @property
    def rip(self) -> int:
        """The next instruction's address (in its code segment)."""
        return int(self._get("regs").rip)

    @property
    def waits_for_sipi(self) -> bool:
        """Whether the guest has not started this processor."""
        return int(self._get("mp_state").mp_state) == lib.KVM_MP_STATE_UNINITIALIZED


def _apic_registers(lapic: Any) -> Any:
    return ffi.cast("uint32_t *", lapic.regs)


def _count_later(count: int, divide: int, elapsed_ns: int) -> int:
    """An APIC timer's current count after ``elapsed_ns``: at least 1, so that an interrupt which is due comes at once,
    and 0 only where it was. KVM's APIC bus has a cycle of 1 ns; ``divide`` is the divide configuration register
    (Intel SDM volume 3, figure 11-10)."""
    if count == 0:
        return 0
    shift = ((divide & 3 | (divide & 8) >> 1) + 1) & 7
    return max(1, count - (elapsed_ns >> shift))


def _with_time(records: list[Record], time: _StoppedTime) -> list[Record]:
    """``records`` of a vCPU with these values of what goes on by itself."""

    def replaced(name: str, data: bytes) -> bytes:
        if name == "lapic":
            lapic = from_record("struct kvm_lapic_state", name, data)
            regs = _apic_registers(lapic)
            regs[lib.MC_APIC_TMICT // 4], regs[lib.MC_APIC_TMCCT // 4] = time.initial_count, time.current_count
            return bytes(ffi.buffer(lapic))
        if name == "msrs":
            msrs = msr_values(data) | {lib.MC_MSR_IA32_TSC: time.tsc}
            if time.deadline is not None:
                msrs[lib.MC_MSR_IA32_TSC_DEADLINE] = time.deadline
            return _msr_record(dict(sorted(msrs.items())))
        return data

    return [(name, replaced(name, data)) for name, data in records]


def _msr_table(values: dict[int, int]) -> Any:
    table = ffi.new("struct kvm_msrs *", {"nmsrs": len(values), "entries": len(values)})
    for entry, (index, value) in zip(table.entries[0 : len(values)], values.items(), strict=True):
        entry.index, entry.data = index, value
    return table


def _msr_record(values: dict[int, int]) -> bytes:
    return bytes(ffi.buffer(_msr_table(values)))


def msr_values(record: bytes) -> dict[int, int]:
    """Index to value of an "msrs" record; ValueError where its length and its count differ."""
    header = ffi.sizeof("struct kvm_msrs")
    count, rest = divmod(len(record) - header, ffi.sizeof("struct kvm_msr_entry"))
    if count < 0 or rest:
        raise ValueError(f"record msrs has {len(record)} bytes, no whole number of entries")
    table = ffi.new("struct kvm_msrs *", {"entries": count})
    ffi.buffer(table, len(record))[:] = record
    if table.nmsrs != count:
        raise ValueError(f"record msrs names {table.nmsrs} entries and has {count}")
    return {e.index: e.data for e in table.entries[0:count]}
