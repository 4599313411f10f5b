"""The serial sidecar: one console's bytes between the guest and whoever reads and types.

Two flavours, by ``SerialBoot.flavour``: ``uart`` is the far end of the core's 16550 (rings in ``uart.ring``),
``virtio`` is a virtio-console with one port (virtio 1.2, section 5.3). Behind either stands the same C loop
(native/serial.h).
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
import termios
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from motorcade.sidecars import _serial
from motorcade.sidecars.device import (
    RING_FEATURES,
    BrokenQueue,
    Device,
    DeviceState,
    QueueConfig,
    broken,
    init_memory,
    init_queue,
    map_isr,
    queue_state,
    queue_stats,
    watched,
)
from motorcade.sidecars.serial import state as saved

if TYPE_CHECKING:
    from motorcade.proto.memory import GuestMemory
    from motorcade.proto.messages import Boot, StatsReport

log = logging.getLogger("motorcade.serial")
lib, ffi = _serial.lib, _serial.ffi

VIRTIO_ID_CONSOLE = 3
F_SIZE = 1 << 0  # virtio 1.2, section 5.3.3
F_EMERG_WRITE = 1 << 2
CONFIG = struct.Struct("<HHII")  # struct virtio_console_config: cols, rows, max_nr_ports, emerg_wr
EMERG_WR_OFFSET = 8
QUEUE_SIZE = 256
RX, TX = 0, 1  # receiveq and transmitq of port 0

BACKENDS = {
    "none": lib.MC_SERIAL_NONE,
    "pty": lib.MC_SERIAL_PTY,
    "socket": lib.MC_SERIAL_SOCKET,
    "file": lib.MC_SERIAL_FILE,
}


class SerialDevice(Device):
    """Descriptors: ``console`` (a listening unix stream socket, optional), ``backend`` (unless the backend is none),
    and ``uart.ring``, ``uart.tx``, ``uart.rx`` or ``kick.0``, ``kick.1``, ``call.0``, ``isr``.

    Raises ValueError for a Boot that names no flavour or backend of ours, KeyError for a missing descriptor,
    OSError for one that is not what its label says.
    """

    ffi, lib = ffi, lib
    sandbox_role = "serial"

    def __init__(self, boot: Boot, fds: Mapping[str, int], memory: GuestMemory) -> None:
        super().__init__(boot, fds, memory)
        from motorcade.proto.messages import SerialBoot

        if not isinstance(boot.role, SerialBoot):
            raise ValueError("the serial sidecar was given the Boot of another kind")
        self.role = role = boot.role
        if role.flavour not in ("uart", "virtio"):
            raise ValueError(f"flavour {role.flavour!r} is neither uart nor virtio")
        if role.backend not in BACKENDS:
            raise ValueError(f"backend {role.backend!r} is none of {', '.join(BACKENDS)}")
        self._uart = role.flavour == "uart"
        self.virtio_type = 0 if self._uart else VIRTIO_ID_CONSOLE
        self._size = (0, 0)
        self._features = 0  # that the driver accepted
        self._restored = 0  # that a loaded driver had accepted before another terminal
        backend = fds["backend"] if role.backend != "none" else -1
        console = fds.get("console", -1)
        for fd in (backend, console):
            if fd >= 0 and role.backend != "file":
                os.set_blocking(fd, False)
        if role.backend == "pty":
            self._size = window_size(backend)

        config = ffi.new("struct mc_serial_config *")
        config.backend = BACKENDS[role.backend]
        config.backend_fd = backend
        config.watch_fd = fds["pty-opened"] if role.backend == "pty" else -1
        config.console_fd = console
        config.event_fd = self.event_fd
        config.scrollback = role.scrollback
        config.ring_fd = fds["uart.ring"] if self._uart else -1
        config.uart_tx_fd = fds["uart.tx"] if self._uart else -1
        config.uart_rx_fd = fds["uart.rx"] if self._uart else -1
        config.keep = self.keep.kind if self.keep.kind_size else ffi.NULL
        config.keep_size = self.keep.kind_size
        self._serial = lib.mc_serial_new(config)
        if self._serial == ffi.NULL:
            raise OSError(ffi.errno, f"serial {role.device_id}: {os.strerror(ffi.errno)}")
        if not self._uart:
            self._mem = ffi.new("struct mc_mem *")
            init_memory(ffi, self._mem, memory, self.dirty)
            self._isr = map_isr(fds["isr"])

    @property
    def always_on(self) -> bool:
        """Consoles are read and typed at while no driver is there."""
        return True

    @property
    def beat(self) -> Any:
        """Of the C loop."""
        return lib.mc_serial_beat(self._serial)

    @property
    def features(self) -> int:
        """A terminal whose size is known offers it. A restored driver keeps what it was once offered."""
        if self._uart:
            return 0
        return RING_FEATURES | F_EMERG_WRITE | (F_SIZE if all(self._size) else 0) | self._restored

    @property
    def queue_sizes(self) -> list[int]:
        """receiveq and transmitq."""
        return [] if self._uart else [QUEUE_SIZE, QUEUE_SIZE]

    @property
    def config(self) -> bytes:
        """``struct virtio_console_config``; emerg_wr reads as 0."""
        return b"" if self._uart else CONFIG.pack(*self._size, 1, 0)

    def activate(self, features: int, queues: Sequence[QueueConfig]) -> None:
        """A queue that the driver did not make ready stays unused: a console that only prints is legal."""
        vqs: list[Any] = [ffi.NULL, ffi.NULL]
        for queue in queues:
            vq = vqs[queue.index] = ffi.new("struct mc_vq *")
            vq.mem = self._mem
            vq.isr = ffi.cast("struct mc_isr *", ffi.from_buffer(self._isr))
            vq.watch = watched(ffi, self.watch)
            kick, call = self.fds[f"kick.{queue.index}"], self.fds["call.0"]
            init_queue(lib, vq, queue, features, kick_fd=kick, call_fd=call, keep=self.keep)
        self._features = features
        lib.mc_serial_attach(self._serial, vqs[RX], vqs[TX])

    def run(self) -> None:
        """The C loop, for the life of the process."""
        if error := lib.mc_serial_run(self._serial):
            raise OSError(error, f"serial loop: {os.strerror(error)}")

    def stop(self) -> None:
        """The loop drains the guest's last output and offers it to everybody who still reads."""
        lib.mc_serial_stop(self._serial)

    def reset(self) -> None:
        """Consoles stay attached, the scrollback is kept, and so is input that no driver has taken."""
        self._features = 0
        if not self._uart:
            lib.mc_serial_detach(self._serial)

    def quiesce(self) -> None:
        """What the guest has printed is in the scrollback, and consoles are still shown it; nobody's typing is read."""
        lib.mc_serial_quiesce(self._serial)

    def resume(self) -> None:
        """The loop looks at both queues or rings, and reads who typed meanwhile."""
        lib.mc_serial_resume(self._serial)

    def save(self) -> DeviceState:
        """Input on its way to the guest, and the end of the scrollback. Who is attached is no part of it."""
        state = ffi.new("struct mc_serial_state *")
        lib.mc_serial_save(self._serial, state)
        pending = bytes(ffi.buffer(state.input, state.input_len))
        history = bytes(ffi.buffer(state.history, state.history_len))
        queues = () if self._uart else (lib.mc_serial_queue(self._serial, i) for i in (RX, TX))
        # One that the driver never made ready has no size, unless that was what is wrong with it.
        positions = tuple(queue_state(vq) for vq in queues if vq.size or vq.error)
        # A driver without queues has done nothing, whatever it accepted.
        data = saved.SerialState(self._features if positions else 0, pending, history).pack()
        return DeviceState(saved.VERSION, data, positions)

    def load(self, state: DeviceState) -> None:
        """The input is the next that the guest gets, in place of what it has not taken. The output is history, which
        consoles are shown, if they have none of their own."""
        if state.version != saved.VERSION:
            raise ValueError(f"a console's state of version {state.version}; this sidecar knows {saved.VERSION}")
        console = saved.SerialState.unpack(state.data)
        if unknown := console.features & ~(0 if self._uart else RING_FEATURES | F_EMERG_WRITE | F_SIZE):
            raise ValueError(f"the saved driver accepted feature bits {unknown:#x}, which no console of ours has")
        if len(console.pending) > lib.MC_SERIAL_INPUT or len(console.history) > lib.MC_SERIAL_HISTORY:
            raise ValueError(f"{len(console.pending)} bytes of input, {len(console.history)} of output are too many")
        native = ffi.new("struct mc_serial_state *")
        native.input_len, native.history_len = len(console.pending), len(console.history)
        ffi.buffer(native.input)[: native.input_len] = console.pending
        ffi.buffer(native.history)[: native.history_len] = console.history
        if error := lib.mc_serial_load(self._serial, native):
            raise ValueError(f"this console cannot be loaded: {os.strerror(error)}")
        self._restored = console.features

    def broken_queues(self) -> list[BrokenQueue]:
        """Also says in the log what else the loop noticed."""
        self._report(lib.mc_serial_notices(self._serial))
        if self._uart:
            return []
        return broken(ffi, lib, [lib.mc_serial_queue(self._serial, i) for i in (RX, TX)])

    def write_config(self, offset: int, data: bytes) -> None:
        """An early driver's emergency write: one character in the low byte of emerg_wr (virtio 1.2, 5.3.4)."""
        if not self._uart and offset == EMERG_WR_OFFSET and data:
            lib.mc_serial_emergency(self._serial, data[0])

    def stats(self) -> StatsReport:
        """``guest_out``, ``guest_in``, ``file_written`` and ``skipped`` (what slow readers lost) are bytes."""
        from motorcade.proto.messages import Counter, StatsReport

        s = self._stats()
        names = (
            "guest_out",
            "guest_in",
            "clients",
            "clients_total",
            "clients_refused",
            "hostile",
            "file_written",
            "file_errors",
        )
        detail = [Counter(name, getattr(s, name)) for name in names]
        detail.append(Counter("skipped", s.skipped + s.file_skipped))
        queues = () if self._uart else tuple(queue_stats(self.watch, i) for i in (RX, TX))
        return StatsReport(queues, tuple(detail))

    def close(self) -> None:
        """OSError when the last bytes of a log file could not be written."""
        serial, self._serial = self._serial, ffi.NULL
        if serial != ffi.NULL and (error := lib.mc_serial_free(serial)):
            raise OSError(error, f"console output is missing from the file: {os.strerror(error)}")

    def _stats(self) -> Any:
        stats = ffi.new("struct mc_serial_stats *")
        lib.mc_serial_get_stats(self._serial, stats)
        return stats

    def _report(self, notices: int) -> None:
        if not notices:
            return
        stats = self._stats()
        if notices & lib.MC_SERIAL_FILE_FAILED:
            # Failed and recovered since may both be set; the errno says which came last.
            why = os.strerror(stats.file_errno) if stats.file_errno else "for a moment"
            log.error("the console's file cannot be written: %s; tried again when the guest prints more", why)
        if notices & lib.MC_SERIAL_FILE_RECOVERED and not stats.file_errno:
            log.warning("the console's file can be written again; %d bytes were skipped", stats.file_skipped)
        if notices & lib.MC_SERIAL_BACKEND_OPENED:
            log.info("the %s backend was opened", self.role.backend)
        if notices & lib.MC_SERIAL_BACKEND_CLOSED:
            log.info("nobody has the %s backend open", self.role.backend)
        if notices & lib.MC_SERIAL_RING_HOSTILE:
            log.error("the core's ring positions cannot be; they count as an empty or a full ring")
        if notices & lib.MC_SERIAL_CLIENTS_FULL:
            log.warning("a console was turned away: %d are attached", lib.MC_SERIAL_CLIENTS)
        if notices & lib.MC_SERIAL_ACCEPT_FAILED:
            log.error("a console could not be attached: %s", os.strerror(stats.accept_errno))


def window_size(fd: int) -> tuple[int, int]:
    """Columns and rows of a terminal; 0, 0 when nobody has set them. OSError: ``fd`` is not a terminal."""
    rows, cols, _, _ = struct.unpack("HHHH", fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8)))
    return cols, rows
