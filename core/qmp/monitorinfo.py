"""What ``info`` says at the monitor: answers of QMP's commands in QEMU's words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from motorcade.core.layout import VIRTIO_MMIO_SIZE, slot_address
from motorcade.core.qmp.errors import QmpError
from motorcade.core.qmp.registry import Context


@dataclass(frozen=True)
class Info:
    """Either a ``command`` of QMP's and how to ``show`` its answer, or ``special``, which gets the vCPU and what
    follows the name."""

    what: str
    command: str = ""
    show: Callable[[Any], str] | None = None
    special: Callable[[Context, int, Sequence[str]], str] | None = None


def _version(v: Any) -> str:
    return f"{v.qemu.major}.{v.qemu.minor}.{v.qemu.micro} ({v.package})\n"


def _status(s: Any) -> str:
    detail = "" if s.status in ("running", "paused") else f" ({s.status})"
    return f"VM status: {'running' if s.running else 'paused'}{detail}\n"


def _kvm(k: Any) -> str:
    return f"kvm support: {'enabled' if k.enabled else 'disabled'}\n"


def _block(disks: Any) -> str:
    lines = []
    for disk in disks:
        image = disk.inserted
        access = ", read-only" if image.ro else ""
        lines.append(f"{disk.device} ({image.node_name}): {image.file} ({image.drv}{access})")
        lines.append(f"    Attached to:      {disk.qdev}")
        lines.append(f"    Cache mode:       writeback{', direct' if image.cache.direct else ''}")
        if image.backing_file:
            lines.append(f"    Backing file:     {image.backing_file} (chain depth: {image.backing_file_depth})")
    return _joined(lines)


def _blockstats(disks: Any) -> str:
    names = ("rd_bytes", "wr_bytes", "rd_operations", "wr_operations", "flush_operations")
    return _joined([f"{d.device}: {' '.join(f'{n}={getattr(d.stats, n)}' for n in names)}" for d in disks])


def _chardev(chardevs: Any) -> str:
    return _joined([f"{c.label}: filename={c.filename}" for c in chardevs])


def _migrate(m: Any) -> str:
    lines = [f"Migration status: {m.status}"]
    if m.error_desc:
        lines[0] += f" ({m.error_desc})"
    lines += [
        f"{name}: {value} ms"
        for name, value in (("total time", m.total_time), ("setup", m.setup_time), ("downtime", m.downtime))
        if value is not None
    ]
    if m.ram is not None:
        lines += [f"{name} ram: {getattr(m.ram, name) >> 10} kbytes" for name in ("transferred", "remaining", "total")]
    return _joined(lines)


def _capabilities(wishes: Any) -> str:
    return _joined([f"{w.capability}: {'on' if w.state else 'off'}" for w in wishes])


def _memory(m: Any) -> str:
    return f"base memory: {m.base_memory}\nplugged memory: {m.plugged_memory}\n"


def _hotpluggable(cpus: Any) -> str:
    lines = ["Hotpluggable CPUs:"]
    for cpu in cpus:
        lines += [f'  type: "{cpu.type}"', f'  vcpus_count: "{cpu.vcpus_count}"', f'  qom_path: "{cpu.qom_path}"']
    return _joined(lines)


def _sidecars(sidecars: Any) -> str:
    return _joined([f"{s.id}: {s.kind}, pid {s.pid}, {s.state}" for s in sidecars])


def _dump(d: Any) -> str:
    return f"Status: {d.status}\n" + (f"Finished: {d.completed / d.total:.2%}\n" if d.total else "")


def _joined(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _nothing_more(rest: Sequence[str]) -> None:
    if rest:
        raise QmpError(f"'{rest[0]}' is not expected there")


def _cpus(ctx: Context, current: int, rest: Sequence[str]) -> str:
    _nothing_more(rest)
    return _joined(
        [f"{'*' if v.index == current else ' '} CPU #{v.index}: thread_id={v.tid}" for v in ctx.machine.vcpus()]
    )


def _registers(ctx: Context, current: int, rest: Sequence[str]) -> str:
    if rest not in ([], ["-a"]):
        _nothing_more(rest)
    cpus = [v.index for v in ctx.machine.vcpus()] if rest else [current]
    return "".join(f"\nCPU#{n}\n{ctx.machine.debugger.registers(n)}\n" for n in cpus)


def _network(ctx: Context, _current: int, rest: Sequence[str]) -> str:
    _nothing_more(rest)
    lines = []
    for nic in ctx.machine.net_devices():
        lines.append(f"{nic.device_id}: index=0,type=nic,model=virtio-net-device,macaddr={nic.mac}")
        lines.append(f" \\ {nic.device_id}: index=0,type={nic.backend}")
    return _joined(lines)


def _qtree(ctx: Context, _current: int, rest: Sequence[str]) -> str:
    _nothing_more(rest)
    lines = ["bus: main-system-bus", "  type System"]
    for sidecar in ctx.machine.sidecars():
        if sidecar.slot is None:
            if sidecar.kind == "serial":
                lines.append(f'  dev: isa-serial, id "{sidecar.device_id}"')
            continue
        lines += [
            '  dev: virtio-mmio, id ""',
            f"    mmio {slot_address(sidecar.slot):016x}/{VIRTIO_MMIO_SIZE:016x}",
            f"    bus: virtio-mmio-bus.{sidecar.slot}",
            "      type virtio-mmio-bus",
            f'      dev: virtio-{sidecar.kind}-device, id "{sidecar.device_id}"',
        ]
    return _joined(lines)


INFO: Mapping[str, Info] = {
    "balloon": Info("how much memory the guest has", "query-balloon", lambda b: f"balloon: actual={b.actual >> 20}\n"),
    "block": Info("the disks", "query-block", _block),
    "blockstats": Info("what the disks have done", "query-blockstats", _blockstats),
    "chardev": Info("the consoles", "query-chardev", _chardev),
    "cpus": Info("the vCPUs and their host threads", special=_cpus),
    "dump": Info("how a dump is going", "query-dump", _dump),
    "hotpluggable-cpus": Info("the places of vCPUs", "query-hotpluggable-cpus", _hotpluggable),
    "iothreads": Info("none here", "query-iothreads", lambda threads: _joined([f"{t.id}:" for t in threads])),
    "kvm": Info("whether KVM is in use", "query-kvm", _kvm),
    "memory_size_summary": Info("how much RAM there is", "query-memory-size-summary", _memory),
    "migrate": Info("how a snapshot is going", "query-migrate", _migrate),
    "migrate_capabilities": Info("what snapshots do", "query-migrate-capabilities", _capabilities),
    "name": Info("the VM's name", "query-name", lambda n: f"{n.name}\n"),
    "network": Info("the NICs", special=_network),
    "qtree": Info("the devices and where they are", special=_qtree),
    "registers": Info("a vCPU's registers (-a: all vCPUs')", special=_registers),
    "sidecars": Info("the backend processes", "x-motorcade-sidecars", _sidecars),
    "status": Info("whether the VM runs", "query-status", _status),
    "uuid": Info("the VM's UUID", "query-uuid", lambda u: f"{u.uuid}\n"),
    "version": Info("this VMM's version", "query-version", _version),
}
