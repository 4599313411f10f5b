"""The net sidecar: a virtio-net device (virtio 1.2, section 5.1) before a tap, passt, another VM's NIC, or nothing."""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from motorcade.sidecars import _net
from motorcade.sidecars.device import (
    BrokenQueue,
    Device,
    DeviceState,
    QueueConfig,
    broken,
    init_memory,
    map_isr,
    queue_state,
    queue_stats,
    watched,
)
from motorcade.sidecars.net import state as saved

if TYPE_CHECKING:
    from motorcade.proto.memory import GuestMemory
    from motorcade.proto.messages import Boot, Inject, StatsReport

log = logging.getLogger("motorcade.net")
lib, ffi = _net.lib, _net.ffi

VIRTIO_ID_NET = 1
CONFIG = struct.Struct("<6sHHH")  # struct virtio_net_config up to mtu: mac, status, max_virtqueue_pairs, mtu
BACKENDS = {"tap": lib.MC_NET_TAP, "passt": lib.MC_NET_PASST, "link": lib.MC_NET_LINK, "none": lib.MC_NET_NONE}
FEATURES = [name for name in dir(lib) if name.startswith("VIRTIO_NET_F_")]
GUEST_OFFLOADS = sum(1 << getattr(lib, f"VIRTIO_NET_F_GUEST_{name}") for name in ("CSUM", "TSO4", "TSO6", "ECN", "UFO"))
COUNTERS = [name for name, _ in ffi.typeof("struct mc_net_counters").fields]


class NetDevice(Device):
    """Descriptors: ``tap.0`` to ``tap.N-1``, or ``passt``, or ``link`` (netbackend.py opens each of them), or none;
    ``capture`` (optional); ``kick.0`` to ``kick.2N``, ``call.0``, ``isr``.

    Raises ValueError for a Boot or a capture file that is not ours, KeyError for a missing descriptor, OSError for one
    that is not what its label says.
    """

    ffi, lib = ffi, lib
    sandbox_role = "net"
    virtio_type = VIRTIO_ID_NET

    def __init__(self, boot: Boot, fds: Mapping[str, int], memory: GuestMemory) -> None:
        super().__init__(boot, fds, memory)
        from motorcade.proto.messages import NetBoot

        if not isinstance(boot.role, NetBoot):
            raise ValueError("the net sidecar was given the Boot of another kind")
        self.role = role = boot.role
        if role.backend == "link":
            self.sandbox_role = "net-link"
        if role.backend not in BACKENDS:
            raise ValueError(f"backend {role.backend!r} is none of {', '.join(BACKENDS)}")
        most = 1 if role.backend in ("passt", "link") else lib.MC_NET_MAX_PAIRS
        if not 1 <= role.queue_pairs <= most:
            raise ValueError(f"{role.queue_pairs} queue pairs; a {role.backend} backend has 1 to {most}")
        pairs = range(role.queue_pairs)
        labels = {"tap": [f"tap.{i}" for i in pairs], "none": []}.get(role.backend, [role.backend])
        backend = [fds[label] for label in labels]
        capture = fds.get("capture", -1)
        if capture >= 0:
            check_capture(capture)

        self._mem = ffi.new("struct mc_mem *")
        init_memory(ffi, self._mem, memory, self.dirty)
        self._isr = map_isr(fds["isr"])
        self._isr_at = ffi.cast("struct mc_isr *", ffi.from_buffer(self._isr))
        # All that is allocated is allocated here: a queue pair has its buffers whether the driver uses it or not.
        self._net = lib.mc_net_open(
            self._mem,
            self._isr_at,
            BACKENDS[role.backend],
            ffi.new("int[]", backend),
            role.queue_pairs,
            role.mac,
            role.mtu,
            capture,
            self.keep.kind if self.keep.kind_size else ffi.NULL,
        )
        if self._net == ffi.NULL:
            raise OSError(ffi.errno, f"net {role.device_id}: {role.backend}: {os.strerror(ffi.errno)}")
        lib.mc_net_watch(self._net, watched(ffi, self.watch))
        lib.mc_net_keep_mac(self._net, self.keep.native)
        lib.mc_net_beat(self._net).event_fd = self.event_fd
        self._reported = self._status()
        self._restored: saved.NetState | None = None  # between load and activate
        self._accepted = 0  # feature bits that a loaded driver had accepted before another backend

    @property
    def beat(self) -> Any:
        """Of the C loop."""
        return lib.mc_net_beat(self._net)

    @property
    def features(self) -> int:
        """What the backend can do: offloads for a tap or a link, MQ for a tap of several queues. Before "none" a
        guest may do everything. A restored driver keeps what it was once offered."""
        return int(lib.mc_net_features(self._net)) | self._accepted

    @property
    def queue_sizes(self) -> list[int]:
        """receiveq and transmitq of each pair, then the control queue, which comes earlier for a driver without MQ."""
        pairs = 2 * self.role.queue_pairs
        return [lib.MC_NET_QUEUE_SIZE] * pairs + [lib.MC_NET_CTRL_SIZE]

    @property
    def config(self) -> bytes:
        """``struct virtio_net_config`` without what is not offered behind ``mtu``."""
        status = self._status()
        up = lib.VIRTIO_NET_S_LINK_UP if status.link_up else 0
        return CONFIG.pack(bytes(ffi.buffer(status.mac)), up, self.role.queue_pairs, self.role.mtu)

    def activate(self, features: int, queues: Sequence[QueueConfig]) -> None:
        """OSError: the tap refuses the offloads, though it had offered them."""
        restored, self._restored = self._restored, None
        if (error := lib.mc_net_set_features(self._net, features)) and not self._status().backend_error:
            raise OSError(-error, f"net {self.role.device_id}: offloads: {os.strerror(-error)}")
        call = self.fds["call.0"]
        for q in queues:
            kick = self.fds[f"kick.{q.index}"]
            rings = (q.index, q.size, q.desc, q.driver, q.device)
            if lib.mc_net_set_queue(self._net, *rings, q.last_avail, q.used_idx, q.error, kick, call) < 0:
                # Legal to set up, never used: without MQ, or without CTRL_VQ, the driver has fewer queues.
                log.warning("queue %d is ready, but has no use with features %#x", q.index, features)
        error = lib.mc_net_keep(self._net, self.keep.native, self.keep.again)
        if error and not self._status().backend_error:
            raise OSError(-error, f"net {self.role.device_id}: what the driver had asked for: {os.strerror(-error)}")
        if restored is not None:
            self._restore(restored)

    def _restore(self, state: saved.NetState) -> None:
        """What the driver had done by its control queue. OSError as for ``activate``."""
        setup = ffi.new("struct mc_net_setup *")
        setup.offloads, setup.pairs = state.offloads, state.active
        if (error := lib.mc_net_restore(self._net, setup)) and not self._status().backend_error:
            raise OSError(-error, f"net {self.role.device_id}: queue pairs or offloads: {os.strerror(-error)}")

    def run(self) -> None:
        """The C loop."""
        if error := lib.mc_net_run(self._net):
            raise OSError(-error, f"net loop: {os.strerror(-error)}")

    def stop(self) -> None:
        """Popped buffers are pushed, or given back to their ring; what the backend has in flight waits."""
        lib.mc_net_stop(self._net)

    def reset(self) -> None:
        """Offloads off, one queue pair, and the MAC of machine.yaml again; a link hangs up."""
        self._restored = None
        lib.mc_net_reset(self._net)

    def save(self) -> DeviceState:
        """Frames that the guest had no buffers for are part of it."""
        queues = tuple(queue_state(vq) for vq in self._queues())
        setup = ffi.new("struct mc_net_setup *")
        lib.mc_net_get_setup(self._net, setup)
        size, frames = saved.room(self.role.queue_pairs), []
        buf = ffi.new("uint8_t[]", size)
        for pair in range(self.role.queue_pairs):
            used = lib.mc_net_save_frames(self._net, pair, buf, size)
            frames.append(bytes(ffi.buffer(buf, used)))
            size -= used
        # A driver without queues has done nothing, whatever it accepted.
        features, offloads = (setup.features, setup.offloads) if queues else (0, 0)
        mac = bytes(ffi.buffer(setup.mac)) if setup.mac_set else None
        state = saved.NetState(features, offloads, self.role.queue_pairs, setup.pairs, mac, frames)
        return DeviceState(saved.VERSION, state.pack(), queues)

    def load(self, state: DeviceState) -> None:
        """ValueError also for a NIC with another number of queues, and where this backend cannot do what the driver was
        offered before another one. The MAC is that of the Boot, unless the driver had chosen one."""
        if state.version != saved.VERSION:
            raise ValueError(f"a NIC's state of version {state.version}; this sidecar knows {saved.VERSION}")
        nic, pairs = saved.NetState.unpack(state.data), self.role.queue_pairs
        if nic.pairs != pairs:
            raise ValueError(f"the saved NIC has {nic.pairs} queue pairs, this one {pairs}")
        if not 1 <= nic.active <= pairs:
            raise ValueError(f"{nic.active} of {pairs} queue pairs are active")
        if nic.offloads & ~(nic.features & GUEST_OFFLOADS):
            raise ValueError(f"offloads {nic.offloads:#x} of features {nic.features:#x}")
        if lacking := lib.mc_net_unservable(self._net, nic.features):
            names = ", ".join(name for name in FEATURES if lacking >> getattr(lib, name) & 1) or f"bits {lacking:#x}"
            raise ValueError(f"the guest's driver uses what a NIC with backend {self.role.backend} cannot do: {names}")
        for pair, frames in enumerate(nic.frames):
            if error := lib.mc_net_load_frames(self._net, pair, nic.features, frames, len(frames)):
                for loaded in range(pair):
                    lib.mc_net_load_frames(self._net, loaded, 0, b"", 0)
                raise ValueError(f"the frames saved for queue pair {pair}: {os.strerror(-error)}")
        lib.mc_net_set_mac(self._net, ffi.NULL if nic.mac is None else nic.mac)
        self._accepted = nic.features
        self._restored = nic if state.queues else None

    def broken_queues(self) -> list[BrokenQueue]:
        """Queues without MQ are numbered as the driver numbers them."""
        return broken(ffi, lib, self._queues())

    def inject(self, what: Inject) -> None:
        """Frames are lost on the way, as a network loses them."""
        if what.operation not in ("any", "rx", "tx"):
            raise ValueError(f"a NIC has no {what.operation} requests (any, rx, tx)")
        if what.delay_ms or (what.count and what.status != "drop"):
            raise ValueError("a NIC can drop frames, and nothing else (status drop, no delay)")
        rx, tx = (what.count if what.operation in ("any", way) else 0 for way in ("rx", "tx"))
        lib.mc_net_inject(self._net, rx, tx)

    def stats(self) -> StatsReport:
        """The details are ``struct mc_net_counters``: packets, but for ``rx_starved`` and ``tx_blocked`` (times)."""
        from motorcade.proto.messages import Counter, StatsReport

        counters = self._status().counters
        detail = tuple(Counter(name, getattr(counters, name)) for name in COUNTERS)
        return StatsReport(tuple(queue_stats(self.watch, vq.index) for vq in self._queues()), detail)

    def close(self) -> None:
        """OSError when the last records of a capture could not be written."""
        if self._net != ffi.NULL:
            self._reported = self._status()  # what config and stats say from now on
        net, self._net = self._net, ffi.NULL
        if net != ffi.NULL and (error := lib.mc_net_close(net)):
            raise OSError(-error, f"packets are missing from the capture: {os.strerror(-error)}")

    def fileno_events(self) -> Mapping[int, Callable[[], None]]:
        """The C loop's own event: link, MAC, errors, broken queues."""
        return {lib.mc_net_event_fd(self._net): self._on_event}

    def _queues(self) -> list[Any]:
        if self._net == ffi.NULL:
            return []
        found = (lib.mc_net_queue(self._net, i) for i in range(2 * self.role.queue_pairs + 1))
        return [vq for vq in found if vq != ffi.NULL]

    def _status(self) -> Any:
        if self._net == ffi.NULL:
            return self._reported
        status = ffi.new("struct mc_net_status *")
        lib.mc_net_get_status(self._net, status)
        return status

    def _on_event(self) -> None:
        """Says in the log what changed; the runtime tells the core of broken queues and of configuration space."""
        os.eventfd_read(lib.mc_net_event_fd(self._net))
        old, new = self._reported, self._status()
        self._reported = new
        if new.backend_error and not old.backend_error:
            why = os.strerror(new.backend_error)
            log.error("the %s is gone (%s): the link is down for good", self.role.backend, why)
        if new.link_error and new.link_error != old.link_error:
            log.error("the link cannot be made: %s; trying on", os.strerror(new.link_error))
        if new.counters.link_refused != old.counters.link_refused:
            log.warning("a third VM was turned away from the link")
        if new.link_up != old.link_up:
            log.info("link %s", "up" if new.link_up else "down")
        if new.capture_error and not old.capture_error:
            log.warning("the capture stops, the traffic goes on: %s", os.strerror(new.capture_error))
        if bytes(ffi.buffer(new.mac)) != bytes(ffi.buffer(old.mac)):
            log.info("the guest changed the MAC to %s", bytes(ffi.buffer(new.mac)).hex(":"))


def check_capture(fd: int) -> None:
    """ValueError: the file holds something that is not a capture of ours. OSError: it cannot be read."""
    ours = lib.mc_pcap_check(fd)
    if ours < 0:
        raise OSError(-ours, f"capture: {os.strerror(-ours)}")
    if not ours:
        raise ValueError("capture: the file is not empty, and no pcap file with nanoseconds to append to")
