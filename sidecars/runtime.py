"""The main of every sidecar: its process's story, its side of the control plane, its data thread.

Two threads. The main thread polls; it never waits for the backend, so that a ping is answered while a disk is slow.
The data thread exists while the driver is ready (or always: ``Device.always_on``), inside one C call, ``Device.run``.
"""

from __future__ import annotations

import argparse
import enum
import logging
import os
import selectors
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from motorcade.sidecars import sandbox
from motorcade.sidecars.device import Device

if TYPE_CHECKING:
    from motorcade.proto.framing import ControlClient
    from motorcade.proto.messages import Activate, Answer, Boot, ConfigWrite, Message

log = logging.getLogger("motorcade.sidecar")

HELLO_TIMEOUT = 30.0  # seconds; the core waits for every sidecar's hello before it runs the guest


def main(device_class: type[Device], argv: Sequence[str] | None = None) -> int:
    """``python -m motorcade.sidecars.KIND --boot-fd N``. Returns the exit status."""
    parser = argparse.ArgumentParser(description="A Motorcade device backend; started by the supervisor.")
    parser.add_argument("--boot-fd", type=int, required=True, help="descriptor of the SOCK_SEQPACKET boot socket")
    options = parser.parse_args(argv)
    from motorcade.proto import boot

    try:
        boot_socket = boot.from_fd(options.boot_fd)
    except boot.BootError as e:
        parser.error(str(e))
    return run(device_class, boot_socket)


def run(device_class: type[Device], boot_socket: socket.socket) -> int:
    """The story of a sidecar process, which owns ``boot_socket`` and has no other thread yet. Returns its exit status:
    0 after an orderly end, 1 after a failure, which is in the log and, for the supervisor, in a Life message."""
    from motorcade.proto import boot as boot_proto
    from motorcade.proto.messages import Failed, Ready
    from motorcade.proto.versions import negotiate

    try:
        boot, fds = boot_proto.recv_boot(boot_socket)
        open_log(fds.get("log"), boot)
        negotiate(boot.protocol_version)
        device = open_device(device_class, boot, fds)
        sandbox.enter(device.ffi, device.lib)
        boot_proto.send_life(boot_socket, Ready())
        return Sidecar(device, boot_socket, connect(boot)).loop()
    except Exception as e:
        log.exception("the sidecar ends")
        boot_proto.send_life(boot_socket, Failed(f"{type(e).__name__}: {e}"[:2000]))
        return 1


def open_log(fd: int | None, boot: Boot) -> None:
    """Makes ``fd`` stderr, for the logging module, for Python's and C's last words, one JSON object a line."""
    import faulthandler

    from motorcade.sidecars import log as logs

    if fd is not None:
        os.dup2(fd, 2)
        os.close(fd)
    faulthandler.enable()
    logs.start(device_id(boot), boot.log_level)


def open_device(device_class: type[Device], boot: Boot, fds: dict[str, int]) -> Device:
    """Maps guest memory and opens the backend."""
    from motorcade.proto.memory import GuestMemory

    fd = fds.pop("memory")
    memory = GuestMemory(fd, boot.regions)
    os.close(fd)
    return device_class(boot, fds, memory)


def connect(boot: Boot) -> ControlClient:
    """The control connection to the core, which has bound its socket already."""
    from motorcade.proto.framing import ControlClient

    return ControlClient(boot.control_socket, device_id(boot))


def device_id(boot: Boot) -> str:
    """The id in machine.yaml."""
    from motorcade.proto.messages import CoreBoot

    if isinstance(boot.role, CoreBoot):
        raise ValueError("a sidecar was given the Boot of a core")
    return boot.role.device_id


class State(enum.Enum):
    """Of the data thread."""

    IDLE = "idle"
    ACTIVE = "active"  # in Device.run
    STOPPING = "stopping"  # asked to return; a reset or shutdown is answered when it has


class Refused(Exception):
    """A request that is answered with an error. ``code`` is a member of ErrorCode."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class Sidecar:
    """A device between its control connection and its data thread."""

    def __init__(self, device: Device, boot_socket: socket.socket, client: ControlClient) -> None:
        self.device, self.boot_socket, self.client = device, boot_socket, client
        self.state = State.IDLE
        self.exit_status: int | None = None
        self._crash: BaseException | None = None
        self._go = threading.Semaphore(0)
        threading.Thread(target=self.run_device, name="data", daemon=True).start()
        self._done_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  # the data thread has left Device.run
        self._term_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._when_stopped: list[Callable[[], None]] = []
        self._activated = False
        self._broken: set[int] = set()  # queues announced since the activation
        self._config = device.config
        self._ending = False
        self._selector = selectors.DefaultSelector()

    def loop(self) -> int:
        """Until shutdown, SIGTERM, or the supervisor's death. Returns the exit status."""
        # The terminal's Ctrl-C is vmmctl's business. SIGTERM ends in good order, at the next poll.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: os.eventfd_write(self._term_fd, 1))
        self.say_hello()
        log.info("welcomed by the core")
        if self.device.always_on:
            self.start()
        register = self._selector.register
        register(self.client.fileno(), selectors.EVENT_READ, self.on_control)
        register(self.boot_socket, selectors.EVENT_READ, self.on_boot_socket)
        register(self.device.event_fd, selectors.EVENT_READ, self.on_device_event)
        register(self._done_fd, selectors.EVENT_READ, self.on_stopped)
        register(self._term_fd, selectors.EVENT_READ, self.on_term)
        for fd, callback in self.device.fileno_events().items():
            register(fd, selectors.EVENT_READ, lambda callback=callback: self.on_kind_event(callback))
        while self.exit_status is None:
            for key, _ in self._selector.select():
                key.data()
                if self.exit_status is not None:
                    break
        self.client.close(linger=1.0)  # the answer to shutdown is still to go out
        return self.exit_status

    # Events of the main loop.

    def on_control(self) -> None:
        """Messages of the core, whose end is this sidecar's."""
        if not self.client.process(self.on_message) and self.exit_status is None:
            self.end("the core is gone")

    def on_boot_socket(self) -> None:
        """The supervisor has nothing to say to a sidecar but its own end."""
        from motorcade.proto.boot import drain_life

        _, alive = drain_life(self.boot_socket)
        if not alive:
            self._selector.unregister(self.boot_socket)  # its end of file would be news again and again
            self.end("the supervisor is gone")

    def on_term(self) -> None:
        """SIGTERM."""
        os.eventfd_read(self._term_fd)
        self.end("SIGTERM")

    def on_device_event(self) -> None:
        """The C loop has something to announce."""
        os.eventfd_read(self.device.event_fd)
        self.announce()

    def on_kind_event(self, callback: Callable[[], None]) -> None:
        """A descriptor of the kind's own."""
        callback()
        self.announce()

    def announce(self) -> None:
        """Tells the core of queues that broke and of configuration space that changed."""
        from motorcade.proto.messages import ConfigChanged, NeedsReset

        for queue in self.device.broken_queues():
            if queue.index not in self._broken:
                self._broken.add(queue.index)
                log.warning("queue %d needs a reset: %s", queue.index, queue.reason)
                self.client.notify(NeedsReset(queue.index, queue.reason))
        if (config := self.device.config) != self._config:
            self._config = config
            self.client.notify(ConfigChanged(config))

    # The data thread.

    def start(self) -> None:
        """Lets the data thread into the C loop."""
        self.state = State.ACTIVE
        self._go.release()

    def run_device(self) -> None:
        """The data thread. Not joined: it is idle when the process ends in good order, and else must not delay that."""
        while self._crash is None:
            self._go.acquire()
            try:
                self.device.run()
            except BaseException as e:  # handed to the main thread, which ends the process with it
                self._crash = e
            os.eventfd_write(self._done_fd, 1)

    def stop(self, then: Callable[[], None]) -> None:
        """Calls ``then`` when nothing touches guest memory any more: at once, or when the data thread has returned."""
        if self.state is State.IDLE:
            then()
            return
        self._when_stopped.append(then)
        if self.state is State.ACTIVE:
            self.state = State.STOPPING
            self.device.stop()

    def on_stopped(self) -> None:
        """The data thread has left ``Device.run``. What that raised ends the process."""
        os.eventfd_read(self._done_fd)
        if self._crash is not None:
            raise self._crash
        if self.state is not State.STOPPING:
            raise RuntimeError("the data loop returned, though nobody asked it to")
        self.state = State.IDLE
        then, self._when_stopped = self._when_stopped, []
        for callback in then:
            callback()

    def end(self, reason: str) -> None:
        """Flushes, closes and leaves, unasked by the core. Once: one such end brings others with it."""
        if self._ending:
            return
        self._ending = True
        log.warning("ending: %s", reason)

        def close() -> None:
            self.device.close()
            self.exit_status = 0

        self.stop(close)

    # Requests of the core.

    def say_hello(self) -> None:
        """Introduces the device."""
        from motorcade.proto.messages import Hello
        from motorcade.proto.versions import PROTOCOL_VERSION

        device = self.device
        hello = Hello(
            protocol_version=PROTOCOL_VERSION,
            device_id=device_id(device.boot),
            pid=os.getpid(),
            virtio_type=device.virtio_type,
            features=device.features,
            queue_sizes=tuple(device.queue_sizes),
            config=self._config,
        )
        self.client.hello(hello, HELLO_TIMEOUT)

    def on_message(self, message: Message) -> None:
        """A request of the core's. Whatever it asks, a refusal is the worst that comes of it."""
        from motorcade.proto.messages import Error, ErrorCode

        try:
            answer = self.handle(message)
        except Refused as e:
            log.warning("%s refused: %s", type(message.body).__name__, e)
            answer = Error(ErrorCode(e.code), str(e))
        if answer is not None:
            self.client.answer(message.id, answer)
        # After the answer: an activation may have found queues that are broken from the start.
        self.announce()

    def handle(self, message: Message) -> Answer | None:
        """The answer, or None when there is none, or not yet."""
        from motorcade.proto import messages as m

        body = message.body
        if isinstance(body, m.Activate):
            self.activate(body)
        elif isinstance(body, m.Reset):
            if self.device.always_on:
                self.reset(message.id)
            else:
                self.stop(lambda: self.reset(message.id))
            return None
        elif isinstance(body, m.ConfigWrite):
            self.write_config(body)
        elif isinstance(body, m.StatsRequest):
            return self.device.stats()
        elif isinstance(body, m.Shutdown):
            self.stop(lambda: self.shutdown(message.id))
            return None
        elif not isinstance(body, m.Ping):
            raise Refused("unknown", f"a sidecar does not know {type(body).__name__}")
        return m.Ok()

    def activate(self, request: Activate) -> None:
        """Bounds what the core passes on of the guest's, and starts the data thread."""
        if self.device.virtio_type == 0 or self._activated or self.state is State.STOPPING:
            raise Refused("state", f"cannot be activated: {self.state.value}, virtio type {self.device.virtio_type}")
        if unknown := request.features & ~(self.device.features | TRANSPORT_FEATURES):
            raise Refused("invalid", f"feature bits {unknown:#x} were not offered")
        sizes = self.device.queue_sizes
        queues = request.queues
        if len({q.index for q in queues}) != len(queues):
            raise Refused("invalid", "a queue is named twice")
        for q in queues:
            if q.index >= len(sizes):
                raise Refused("invalid", f"there is no queue {q.index}")
            if not 0 < q.size <= sizes[q.index] or q.size & (q.size - 1):
                raise Refused("invalid", f"queue {q.index}: size {q.size} is not a power of two up to {sizes[q.index]}")
        self._broken.clear()
        self._activated = True
        self.device.activate(request.features & self.device.features, queues)
        log.info("activated: features %#x, queues %s", request.features, [q.index for q in queues])
        if not self.device.always_on:
            self.start()

    def reset(self, request_id: int) -> None:
        """Nothing is in flight: the data thread has returned, or is always on and stops its queues itself."""
        from motorcade.proto.messages import Ok

        self.device.reset()
        self._activated = False
        self._broken.clear()
        self.client.answer(request_id, Ok())

    def write_config(self, request: ConfigWrite) -> None:
        """The driver wrote to configuration space."""
        if request.offset + len(request.data) > len(self._config):
            raise Refused("invalid", f"a write of {len(request.data)} bytes at {request.offset} of the configuration")
        self.device.write_config(request.offset, request.data)

    def shutdown(self, request_id: int) -> None:
        """The data thread has returned. A disk that cannot be flushed is an error answer and exit status 1."""
        from motorcade.proto.messages import Error, ErrorCode, Ok

        try:
            self.device.close()
        except OSError as e:
            log.exception("the backend could not be closed in good order")
            self.client.answer(request_id, Error(ErrorCode.GENERIC, f"{type(e).__name__}: {e}"))
            self.exit_status = 1
        else:
            self.client.answer(request_id, Ok())
            self.exit_status = 0


# Bits that belong to the transport: the core accepts them for the device (virtio 1.2, section 6).
TRANSPORT_FEATURES = 1 << 32 | 1 << 33  # VERSION_1, ACCESS_PLATFORM


def run_and_exit(device_class: type[Device], boot_socket: socket.socket) -> None:
    """For a forked child: ``run`` and leave without the parent's clean-up (exit handlers, buffers)."""
    status = 1
    try:
        status = run(device_class, boot_socket)
    finally:
        logging.shutdown()
        sys.stdout.flush()
        os._exit(status)
