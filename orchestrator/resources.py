"""Everything a VM needs that a descriptor can stand for, opened before any process of it exists.

The supervisor keeps a copy of every descriptor, so that a replacement for a dead sidecar gets the same rights.
Labels are those of docs/internals.md.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import logging
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from motorcade.orchestrator import (
    ahead,
    charbackend,
    frozendisks,
    keeps,
    kitplace,
    memoryfile,
    netbackend,
    pagers,
    rundir,
)
from motorcade.orchestrator.errors import UserError
from motorcade.orchestrator.kitplace import Connection, KitPlace
from motorcade.orchestrator.machine import Console, Disk, Kernel, Kit, Mac, Machine, Net, Removed, To
from motorcade.proto import memory, watch
from motorcade.proto.memory import PAGE
from motorcade.proto.messages import BlkBoot, KitBoot, NetBoot, Role, SerialBoot
from motorcade.sidecars import lazymem
from motorcade.sidecars.blk.overlay import OverlayError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from motorcade.orchestrator.disks import OpenDisk
    from motorcade.orchestrator.frozendisks import Incoming

log = logging.getLogger("motorcade.supervisor")

FIRST_SLOT = {"blk": 0, "net": 16, "serial": 32}
KIT_SLOT = 40  # of the first device of another kind
NO_SLOT = 0xFFFF  # of the sidecar behind the 16550
_ISR_SIZE = 4096
_BACKLOG = 16


@dataclass
class Device:
    """One device: what its sidecar gets of its own, and what it shares with the core."""

    id: str
    kind: str  # blk, net, serial, or a kind of the kit's
    boot: Role
    fds: dict[str, int]  # the sidecar's own, by label
    queues: int = 0
    slot: int | None = None  # None: the 16550, which is not on virtio-mmio
    kicks: list[int] = field(default_factory=list)
    call: int = -1
    isr: int = -1
    watch: int = -1  # counters and events, for whoever looks
    debug: bool = False  # a prompt in its sidecar
    backend: str = ""  # for a person
    info: dict[str, Any] = field(default_factory=dict)  # for QMP's query-block and the like
    locks: tuple[dict[str, Any], ...] = ()
    connection: Connection | None = None  # of a kind that connects

    def let_go(self) -> None:
        """The sidecar has been given its connection: nobody else keeps it open."""
        if self.connection is not None:
            self.connection.let_go()

    @property
    def role(self) -> str:
        """Of its sidecar: blk-root."""
        return f"{self.kind}-{self.id}"


class Resources:
    """Owns every descriptor in it, and what has to be removed at the end, until ``close``."""

    def __init__(
        self,
        machine: Machine,
        run: rundir.RunDir,
        on_helper: Callable[..., None],
        incoming: Incoming | None = None,
    ) -> None:
        """Opens nothing yet. ``on_helper`` is told the role and pid of each program that a backend needs (passt): a
        child of this process, and the supervisor's to watch and to end. ``incoming``: the machine is restored."""
        self.machine, self.run, self.on_helper, self.incoming = machine, run, on_helper, incoming
        self.lazy = False  # guest memory is filled on demand
        self.template: dict[str, int] = {}  # the pager's, by label; the core gets its "state"
        self.discarded: dict[str, int] = {}  # what the pager and the balloon share
        self.disks: dict[str, OpenDisk] = {}
        self.devices: list[Device] = []
        self.regions = memory.layout(int(machine.memory))
        self.memory = -1
        self.core: dict[str, int] = {}  # only the core's, by label
        self.shared: dict[str, int] = {}  # the core's and the uart sidecar's
        self.everyone: dict[str, int] = {}  # the core's and every sidecar's
        self.kernel_path = machine.kernel.image
        self._backends: list[charbackend.CharBackend] = []
        self._opened: list[int] = []

    def open(self, progress: Callable[[str], None]) -> None:
        """Opens all; what was opened before an error is ``close``'s to let go. Errors: UserError, one clear line."""
        machine = self.machine
        self.core["kvm"] = self._own(open_kvm(machine.cpus))
        self.lazy = self._can_be_lazy()
        self._open_memory()
        # A bit a page, in words of 64.
        self.everyone["dirty"] = self._own(sealed_memfd("dirty-log", -(-(machine.memory // PAGE) // 64) * 8))
        if self.incoming is not None and self.incoming.template:
            self.open_template(self.incoming)
        self._open_kernel(progress)
        self.core["watch"] = self._own(watch.make("core"))  # control messages, for whoever looks
        for disk in machine.disks:
            self._add(self.open_disk(disk), None if disk.slot is None else FIRST_SLOT["blk"] + disk.slot)
        for net in machine.nets:
            self._add(self.open_net(net), None if net.slot is None else FIRST_SLOT["net"] + net.slot)
        for removed in machine.removed:
            slot = FIRST_SLOT[removed.kind] + removed.slot
            self._add(self.nothing(removed, f"~{slot}"), slot)
        for console in machine.consoles:
            self._add(self._serial(console))
        for kit in machine.devices:
            self._add(self._kit(kit))
        if machine.the_balloon is not None:
            self._add(self._balloon(machine.the_balloon.kit))
        # By us, so that sidecars can connect while the core is still making its machine: from there, since they have no
        # other way to it.
        self.core["control"] = self._listen(self.run.path / "core.sock")
        self.run_fd = self._own(os.open(self.run.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        self._listen_qmp()

    @property
    def in_place(self) -> bool:
        """The machine goes on with the memory that it left behind: nothing has to be filled."""
        return self.incoming is not None and self.machine.memory_file is not None and self.machine.memory_share

    def _open_memory(self) -> None:
        """The RAM: what waiting processes have mapped already, where it fits."""
        machine, size = self.machine, int(self.machine.memory)
        in_file = machine.memory_file is not None and machine.memory_share
        ready = ahead.take(0 if in_file else size, lazy=self.lazy)
        if in_file:
            assert machine.memory_file is not None
            opener = memoryfile.open_in_place if self.in_place else memoryfile.open_fresh
            self.memory = self._own(opener(Path(machine.memory_file), size))
        else:
            self.memory = self._own(sealed_memfd("guest-memory", size) if ready is None else ready.memory)
        if machine.memory_prealloc and self.incoming is None:
            try:
                os.posix_fallocate(self.memory, 0, size)
            except OSError as e:
                raise UserError(f"memory_prealloc: the host cannot set aside {size >> 20}M: {e.strerror}") from None
        self.everyone["memory"] = self.memory
        if self.lazy:
            device = lazymem.open_device() if ready is None else ready.userfaultfd
            if device is not None:  # else each process uses the system call
                self.everyone["userfaultfd"] = self._own(device)

    def close(self) -> None:
        """Closes every descriptor and removes sockets and links outside the run directory."""
        for fd in self._opened:
            os.close(fd)
        for device in self.devices:
            if device.connection is not None:
                device.connection.close()
        self._opened.clear()
        for backend in self._backends:
            backend.close()
        self._backends.clear()

    def core_fds(self) -> dict[str, int]:
        """What the core gets."""
        fds = {**self.everyone, **self.core, **self.shared}
        if "state" in self.template:
            fds["state"] = self.template["state"]
        for device in self.devices:
            fds[f"watch.{device.id}"] = device.watch
            if device.slot is not None:
                fds |= {f"kick.{device.id}.{n}": fd for n, fd in enumerate(device.kicks)}
                fds |= {f"call.{device.id}.0": device.call, f"isr.{device.id}": device.isr}
        return fds

    def sidecar_fds(self, device: Device) -> dict[str, int]:
        """What a device's sidecar gets."""
        fds = {**self.everyone, **device.fds, "watch": device.watch, "run": self.run_fd}
        if device.connection is not None:
            try:
                fds |= device.connection.hand_over()
            except OSError as e:
                log.error("%s: %s", device.role, e.strerror or e)  # its sidecar will say so, too, and end
        if device.slot is None:
            return fds | self.shared
        fds |= {f"kick.{n}": fd for n, fd in enumerate(device.kicks)}
        return fds | {"call.0": device.call, "isr": device.isr}

    def _own(self, fd: int) -> int:
        self._opened.append(fd)
        return fd

    def _chosen_slots(self) -> set[int]:
        """Those that machine.yaml, or a template's machine, names."""
        machine = self.machine
        chosen = {FIRST_SLOT["blk"] + d.slot for d in machine.disks if d.slot is not None}
        chosen |= {FIRST_SLOT["net"] + n.slot for n in machine.nets if n.slot is not None}
        return chosen | {FIRST_SLOT[r.kind] + r.slot for r in machine.removed}

    def _add(self, device: Device, chosen: int | None = None, replaces: Device | None = None) -> None:
        """Gives a device what its sidecar is watched through, and one on virtio its slot, doorbells and interrupt;
        those of ``replaces`` where it takes over from that one."""
        device.watch = self._own(watch.make(device.id))
        if device.debug:
            device.fds["debug"] = self._listen(self.run.path / f"debug-{device.id}.sock")
        if replaces is not None:
            device.kicks, device.call, device.isr = replaces.kicks, replaces.call, replaces.isr
        elif device.slot is not None:
            first = FIRST_SLOT.get(device.kind, KIT_SLOT)
            taken = {d.slot for d in self.devices} | self._chosen_slots()
            device.slot = chosen if chosen is not None else next(n for n in itertools.count(first) if n not in taken)
            device.kicks = [self._own(eventfd()) for _ in range(device.queues)]
            device.call = self._own(eventfd())
            device.isr = self._own(sealed_memfd(f"isr-{device.id}", _ISR_SIZE))
        # Before its sidecar exists, and after any of them.
        try:
            kept = keeps.size(device.boot, device.queues if device.slot is not None else 0, device.fds)
        except (OverlayError, OSError) as e:
            raise UserError(f"{device.kind} {device.id}: {e}") from None
        device.fds["inflight"] = self._own(sealed_memfd(f"inflight-{device.id}", kept))
        self.devices.append(device)

    def pager_fds(self) -> dict[str, int]:
        """What the pager gets."""
        return {"memory": self.memory, "run": self.run_fd, **self.template, **self.discarded}

    def open_disks(self) -> list[frozendisks.Open]:
        """The disks as they are, for a template."""
        return [
            frozendisks.Open(disk.id, disk.readonly, opened.files, opened.overlay, opened.unnamed, opened.written)
            for disk in self.machine.disks
            if (opened := self.disks.get(disk.id)) is not None
        ]

    def open_template(self, incoming: Incoming, state: int | None = None) -> None:
        """The template's files. ``state``: that of a state, open already, and the caller's. Errors: UserError."""
        fds = pagers.open_template(incoming, state)
        self.incoming = incoming
        self.template = {label: self._own(fd) for label, fd in fds.items()}

    def _can_be_lazy(self) -> bool:
        if self.incoming is None or self.in_place:
            return False
        if reason := lazymem.permitted():
            log.warning("all of the memory is copied before the guest goes on: %s", reason)
        return not reason

    def _open_kernel(self, progress: Callable[[str], None]) -> None:
        kernel = self.machine.kernel
        if self.incoming is not None:
            self._open_kernel_again(kernel)
            return
        progress(f"unpacking {kernel.image}")
        self.core["kernel"] = self._own(_open(unpacked_kernel(kernel.image), os.O_RDONLY, "kernel"))
        if kernel.initrd is not None:
            self.core["initrd"] = self._own(_open(kernel.initrd, os.O_RDONLY, "initrd"))

    def _open_kernel_again(self, kernel: Kernel) -> None:
        """For a restored guest's reboot. Its images may be gone: then it cannot."""
        for label, path in (("kernel", kernel.image), ("initrd", kernel.initrd)):
            if path is not None:
                try:
                    image = unpacked_kernel(path) if label == "kernel" else path
                    self.core[label] = self._own(_open(image, os.O_RDONLY, label))
                except (UserError, OSError) as e:
                    log.warning("the guest will not be able to reboot: %s", e)

    def wire(self, device: Device, replaces: Device | None) -> None:
        """Doorbells and an interrupt for a device that comes later, whose slot is known: its own, or those of the one
        that it takes over from."""
        self._add(device, device.slot, replaces)

    def let_go(self, fds: Iterable[int]) -> None:
        """Closes descriptors before the end."""
        for fd in fds:
            if fd in self._opened:
                self._opened.remove(fd)
                os.close(fd)
                continue
            backend = next(b for b in self._backends if b.fd == fd)
            self._backends.remove(backend)
            backend.close()

    def nothing(self, removed: Removed, device_id: str) -> Device:
        """What stands in for a device that was taken away: a disk of size 0, or a NIC without a link."""
        queues = removed.queues
        if removed.kind == "net":
            mac = removed.mac if removed.mac is not None else Mac(6)
            role: Role = NetBoot(device_id, bytes(mac), queues, "none", removed.mtu or 0)
            info: dict[str, Any] = {"mac": str(mac), "backend": "none", "ifname": None}
            return Device(device_id, "net", role, {}, 2 * queues + 1, 0, backend="removed", info=info)
        role = BlkBoot(
            device_id=device_id,
            path="(removed)",
            readonly=removed.readonly,
            direct=False,
            overlay=False,
            serial="",
            queues=queues,
            discard=removed.discard,
            io_engine="auto",
            layers=0,
            removed=True,
        )
        fds = {"disk": self._own(sealed_memfd("removed", 0))}
        info = {"file": "", "driver": "raw", "ro": removed.readonly, "direct": False, "backing-file": None}
        return Device(device_id, "blk", role, fds, queues, 0, backend="removed", info=info)

    def open_disk(self, disk: Disk) -> Device:
        """Opens and locks a disk; it has no slot yet. Errors: UserError, DiskInUse."""
        from motorcade.orchestrator.disks import open_disk

        restored = {r.disk.id: r for r in self.incoming.disks} if self.incoming is not None else {}
        opened = open_disk(disk, restored.get(disk.id))
        self.disks[disk.id] = opened
        fds = {"disk": self._own(opened.disk)}
        fds |= {f"layer.{n}": self._own(layer.fd) for n, layer in enumerate(opened.files[1:])}
        if opened.overlay is not None:
            fds["overlay"] = self._own(opened.overlay)
        boot = BlkBoot(
            device_id=disk.id,
            path=disk.path,
            readonly=disk.readonly,
            direct=opened.direct,
            overlay=opened.overlay is not None,
            serial=disk.serial or "",
            queues=disk.queues,
            discard=disk.discard,
            io_engine=disk.engine,
            layers=len(opened.files) - 1,
        )
        info = {
            "file": opened.written,
            "driver": "raw",
            "ro": disk.readonly,
            "direct": opened.direct,
            "backing-file": opened.files[-1].path if opened.overlay is not None else None,
        }
        shown = " + ".join(file.path for file in opened.files)
        shown += " (read-only)" if disk.readonly else ""
        if opened.overlay is not None:
            shown += " + what this run writes" if opened.unnamed else f" + overlay {opened.written}"
        return Device(disk.id, "blk", boot, fds, disk.queues, 0, backend=shown, info=info,
                      locks=opened.locks, debug=disk.debug)  # fmt: skip

    def open_net(self, net: Net, taps: Sequence[int] = ()) -> Device:
        """Opens a NIC's other side; it has no slot yet. ``taps``: queues of the tap, open already; taken.
        Errors: UserError."""
        assert net.mac is not None
        fds: dict[str, int] = {}
        if taps:
            fds = {f"tap.{n}": self._own(fd) for n, fd in enumerate(taps)}
            backend, shown = "tap", f"tap {net.tap}"
        elif net.tap is not None:
            taps = netbackend.open_tap(net.tap, net.queues)
            fds = {f"tap.{n}": self._own(fd) for n, fd in enumerate(taps)}
            backend, shown = "tap", f"tap {net.tap}"
        elif net.unplugged:
            backend, shown = "none", "unplugged"
        elif net.link is not None:
            fds["link"] = self._own(netbackend.link(net.link))
            backend, shown = "link", f"link {net.link}"
        else:
            fds["passt"] = self._own(self._passt(net))
            backend, shown = "passt", "user (passt)" + "".join(f" {rule}" for rule in net.forward)
        if net.capture is not None:
            fds["capture"] = self._own(netbackend.open_capture(net.capture))
        boot = NetBoot(net.id, bytes(net.mac), net.queues, backend, net.mtu or 0)
        info = {"mac": str(net.mac), "backend": backend, "ifname": net.tap}
        # A pair a queue pair, and the control queue (virtio 1.2, 5.1.2).
        return Device(
            net.id, "net", boot, fds, 2 * net.queues + 1, 0, backend=shown, info=info, debug=net.debug
        )

    def _passt(self, net: Net) -> int:
        """A new one, connected; the caller's."""
        role = f"passt-{net.id}"
        log_fd = self.run.open_log(role)
        try:
            fd, pid = netbackend.spawn_passt(net.forward, mtu=net.mtu, log_fd=log_fd)
        finally:
            os.close(log_fd)
        self.on_helper(role, pid)
        return fd

    def renew(self, device: Device, end_helper: Callable[[str], None]) -> None:
        """Before a successor starts: another backend for a device whose last process was killed in the middle of a step
        with it (keeps.py), so that its connections end. ``end_helper`` ends the program of a role, and waits for
        that."""
        if not keeps.lost_its_place(device.boot, device.queues, device.fds["inflight"]):
            return
        net = next(n for n in self.machine.nets if n.id == device.id)
        log.warning("%s: its passt's stream was cut in a frame: another passt", device.role)
        end_helper(f"passt-{net.id}")
        try:
            fd = self._passt(net)
        except UserError as e:
            log.error("%s: %s", device.role, e)
            return
        os.dup2(fd, device.fds["passt"], inheritable=False)
        os.close(fd)

    def _serial(self, console: Console) -> Device:
        path = self.run.path / f"console-{console.id}.sock"
        fds = {"console": self._listen(path)}
        backend, shown = "none", f"vmmctl console {self.machine.name} {console.id}"
        if console.backend == "pty":
            opened = self._backend(lambda: charbackend.open_pty(self.run.path / f"pty-{console.id}"))
            backend, fds["backend"], shown = "pty", opened.fd, f"pty {opened.path}"
            fds["pty-opened"] = opened.watch
        elif isinstance(console.backend, To) and console.backend.socket:
            backend, shown = "socket", f"socket {console.backend.socket}"
            fds["backend"] = self._listen(Path(console.backend.socket))
        elif isinstance(console.backend, To) and console.backend.file:
            name = Path(console.backend.file)
            backend, shown = "file", f"file {name}"
            fds["backend"] = self._backend(lambda: charbackend.open_file(name)).fd
        boot = SerialBoot(console.id, console.type, backend, int(console.scrollback))
        info = {"label": console.id, "filename": shown, "frontend-open": True}
        if console.type == "virtio":
            return Device(console.id, "serial", boot, fds, 2, 0, backend=shown, info=info, debug=console.debug)
        self.shared["uart.ring"] = self._own(sealed_memfd("uart-ring", uart_ring_size()))
        self.shared["uart.tx"] = self._own(eventfd())
        self.shared["uart.rx"] = self._own(eventfd())
        return Device(console.id, "serial", boot, fds, backend=shown, info=info, debug=console.debug)

    def _kit(self, kit: Kit) -> Device:
        from motorcade.sidecars import kinds

        place = KitPlace(kit.id, self.run, self.on_helper)
        try:
            kind = kinds.find(kit.kind)
            given = msgspec.convert(kit.options, kind.Options)
            opened, queues = dict(kind.open_at(given, place)), kind.count_queues(given)
            kitplace.check_labels(opened)
        except (kinds.UnknownKind, msgspec.ValidationError, OSError, ValueError) as e:
            words = kitplace.last_words(self.run, place.role)
            raise UserError(f"{kit.kind} {kit.id}: {getattr(e, 'strerror', None) or e}{words}") from None
        except Exception as e:  # of somebody else's package
            log.exception("%s %s: a bug in its open()", kit.kind, kit.id)
            raise UserError(f"{kit.kind} {kit.id}: its open() failed: {type(e).__name__}: {e}") from None
        connection = Connection(place, lambda: kind.open_at(given, place, again=True)) if kind.connects else None
        if connection is not None:
            connection.fds = opened
        fds = {label: self._own(fd) for label, fd in opened.items()} if connection is None else {}
        options = msgspec.json.encode(kit.options, order="sorted").decode()
        shown = " ".join([kit.kind, *(f"{key}={value}" for key, value in kit.options.items())])
        boot = KitBoot(kit.id, kit.kind, options)
        info = {"options": kit.options}
        return Device(
            kit.id, kit.kind, boot, fds, queues, 0, backend=shown, info=info, connection=connection, debug=kit.debug
        )

    def _balloon(self, kit: Kit) -> Device:
        device = self._kit(kit)
        if self.lazy:
            # Which pages are the template's no more: a bit a page, in words of 64.
            bits = self._own(sealed_memfd("discarded", -(-(self.machine.memory // PAGE) // 64) * 8))
            device.fds["discarded"] = self.discarded["discarded"] = bits
        return device

    def _listen_qmp(self) -> None:
        self.core["qmp.0"] = self._listen(self.run.path / "qmp.sock")
        for n, address in enumerate(self.machine.qmp, 1):
            kind, _, rest = address.partition(":")
            self.core[f"qmp.{n}"] = self._listen(Path(rest)) if kind == "unix" else self._own(_listen_tcp(rest))

    def _listen(self, path: Path) -> int:
        """A listening unix socket of mode 0600, removed at the end."""
        return self._backend(lambda: charbackend.open_socket(path)).fd

    def _backend(self, opener: Callable[[], charbackend.CharBackend]) -> charbackend.CharBackend:
        try:
            opened = opener()
        except charbackend.CharBackendError as e:
            raise UserError(str(e)) from None
        self._backends.append(opened)
        return opened


def sealed_memfd(name: str, size: int) -> int:
    """A memfd of ``size`` bytes (rounded up to pages) that nobody can resize: a mapping of it never faults past its
    end, whatever another process does. The caller owns it."""
    fd = os.memfd_create(f"motorcade-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, -(-size // 4096) * 4096)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError as e:
        os.close(fd)
        raise UserError(f"cannot set aside {size >> 20}M for {name}: {e.strerror}") from None
    return fd


def eventfd() -> int:
    """Non-blocking and CLOEXEC; the caller owns it."""
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def uart_ring_size() -> int:
    """Bytes of ``struct mc_uart_ring``."""
    from motorcade.core._native import ffi

    return int(ffi.sizeof("struct mc_uart_ring"))


def unpacked_kernel(image: str) -> Path:
    """``image``, or its unpacked kernel in the cache. Errors: UserError for one that is damaged; OSError."""
    from motorcade.core.boot.error import BootError
    from motorcade.core.boot.unpack import prepare_kernel

    try:
        return prepare_kernel(Path(image), cache_dir())
    except BootError as e:
        raise UserError(f"kernel: {e}") from None


def cache_dir() -> Path:
    """Where unpacked kernels are kept: $XDG_CACHE_HOME/motorcade, or ~/.cache/motorcade."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "motorcade" / "kernels"


def open_kvm(cpus: int) -> int:
    """/dev/kvm, which the caller owns. Errors: UserError where it is missing, not permitted, or too small."""
    try:
        fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise UserError("there is no /dev/kvm: no virtualization here, or the kvm module is not loaded "
                        "(accel: box needs none; vmmctl doctor says more)") from None  # fmt: skip
    except OSError as e:
        hint = " (join the group kvm?)" if isinstance(e, PermissionError) else ""
        raise UserError(f"/dev/kvm: {e.strerror}{hint}") from None
    from motorcade.core.kvm import Kvm, KvmError

    try:
        most = Kvm(fd).max_vcpus
    except KvmError as e:
        os.close(fd)
        raise UserError(f"/dev/kvm: {e}") from None
    if cpus > most:
        os.close(fd)
        raise UserError(f"cpus: {cpus} is more than this host's KVM allows ({most})")
    return fd


def _open(path: str | Path, flags: int, what: str) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC, 0o600)
    except OSError as e:
        raise UserError(f"{what}: {path}: {e.strerror}") from None


def _listen_tcp(address: str) -> int:
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, int(port)), family=family, backlog=_BACKLOG) as sock:
            sock.setblocking(False)
            return sock.detach()
    except OSError as e:
        raise UserError(f"qmp tcp:{address}: {e.strerror or e}") from None


def slot_number(device: Device) -> int:
    """``Slot.index`` of the core's Boot."""
    return NO_SLOT if device.slot is None else device.slot


def slot_info(device: Device) -> str:
    """``Slot.info`` of the core's Boot."""
    return json.dumps(device.info)
