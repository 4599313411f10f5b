"""A device between its control connection and its data thread: what every sidecar does once it is ready.

Two threads. The main thread polls; it never waits for the backend, so that a ping is answered while a disk is slow.
The data thread (datathread.py) is busy while the driver is ready (or always: ``Device.always_on``), inside one C call,
``Device.run``. Between Quiesce and Resume it is idle, or its loop holds.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

from motorcade.sidecars.datathread import DataThread, State
from motorcade.sidecars.device import Device

if TYPE_CHECKING:
    import socket

    from motorcade.proto.framing import ControlClient
    from motorcade.proto.messages import Activate, Answer, Boot, Command, ConfigWrite, DeviceState, Message

log = logging.getLogger("motorcade.sidecar")

HELLO_TIMEOUT = 30.0  # seconds; the core waits for every sidecar's hello before it runs the guest


def device_id(boot: Boot) -> str:
    """The id in machine.yaml."""
    from motorcade.proto.messages import CoreBoot

    if isinstance(boot.role, CoreBoot):
        raise ValueError("a sidecar was given the Boot of a core")
    return boot.role.device_id


class Refused(Exception):
    """A request that is answered with an error. ``code`` is a member of ErrorCode."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class Sidecar:
    """A device between its control connection and its data thread."""

    def __init__(self, device: Device, boot_socket: socket.socket, client: ControlClient) -> None:
        self.device, self.boot_socket, self.client = device, boot_socket, client
        self.data = DataThread(device)
        device.ask_supervisor = self.ask_supervisor
        self.exit_status: int | None = None
        self._term_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._activated = False
        self._quiesced = device.boot.incoming  # at rest until Resume
        self._broken: set[int] = set()  # queues announced since the activation
        self._pings: list[int] = []  # to be answered when the data loop has shown that it turns
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
            if self._quiesced:
                self.device.quiesce()
            self.data.start()
        register = self._selector.register
        register(self.client.fileno(), selectors.EVENT_READ, self.on_control)
        register(self.boot_socket, selectors.EVENT_READ, self.on_boot_socket)
        register(self.device.event_fd, selectors.EVENT_READ, self.on_device_event)
        register(self.data, selectors.EVENT_READ, self.on_data_done)
        register(self._term_fd, selectors.EVENT_READ, self.on_term)
        for fd, callback in self.device.fileno_events().items():
            register(fd, selectors.EVENT_READ, lambda callback=callback: self.on_kind_event(callback))
        if "debug" in self.device.fds:
            from motorcade.sidecars.prompt import Prompt

            self.prompt = Prompt(self.device.fds["debug"], self, self._selector)
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

    def ask_supervisor(self) -> None:
        """See Device.ask_supervisor. On any thread."""
        from motorcade.proto.boot import send_life
        from motorcade.proto.messages import Reopen

        send_life(self.boot_socket, Reopen())

    def on_boot_socket(self) -> None:
        """The supervisor's answers, and its end."""
        from motorcade.proto.boot import drain_life_fds
        from motorcade.proto.messages import Reopened

        lives, alive = drain_life_fds(self.boot_socket)
        for life, fds in lives:
            if isinstance(life, Reopened) and len(fds) == len(life.labels):
                self.device.reopened(dict(zip(life.labels, fds, strict=True)), life.error)
                continue
            for fd in fds:
                os.close(fd)
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
        if self._pings and self.device.lib.mc_beat_heard(self.device.beat):
            self.answer_pings()
        self.announce()

    def on_data_done(self) -> None:
        """The data thread has returned, which is a sign of life, too."""
        self.answer_pings()
        self.data.on_done()

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
        config = self.device.config
        if self._own(config) != self._own(self._config):
            self.client.notify(ConfigChanged(config))
        self._config = config

    def _own(self, config: bytes) -> bytes:
        """``config`` without what the driver writes, which is no news to the core."""
        from motorcade.proto.messages import CONFIG_DRIVER

        kinds = self.device.config_kinds.ljust(len(config), b"\0")
        return bytes(0 if kind == CONFIG_DRIVER else byte for byte, kind in zip(config, kinds, strict=True))

    def end(self, reason: str) -> None:
        """Flushes, closes and leaves, unasked by the core. Once: one such end brings others with it."""
        if self._ending:
            return
        self._ending = True
        log.warning("ending: %s", reason)

        def close() -> None:
            self.device.close()
            self.exit_status = 0

        self.data.when_idle(close)

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
            whole_memory=device.keeps_memory,
            config_kinds=device.config_kinds,
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
                self.data.when_idle(lambda: self.reset(message.id))
            return None
        elif isinstance(body, m.ConfigWrite):
            self.write_config(body)
        elif isinstance(body, m.StatsRequest):
            return self.device.stats()
        elif isinstance(body, m.Inject):
            try:
                self.device.inject(body)
            except ValueError as e:
                raise Refused("invalid", str(e)) from None
            log.warning("%d requests will be failed or delayed, as was asked: %s", body.count, body)
        elif isinstance(body, m.Command):
            self.command(message.id, body)
            return None
        elif isinstance(body, m.Quiesce):
            return self.quiesce(message.id)
        elif isinstance(body, m.Save):
            if not self._quiesced:
                raise Refused("state", "it is running: quiesce it first")
            return m.Saved(self.device.save())
        elif isinstance(body, m.Load):
            self.load(body.state)
        elif isinstance(body, m.Resume):
            return self.resume(message.id)
        elif isinstance(body, m.Shutdown):
            self.data.when_idle(lambda: self.shutdown(message.id))
            return None
        elif isinstance(body, m.Ping):
            return self.ping(message.id)
        else:
            raise Refused("unknown", f"a sidecar does not know {type(body).__name__}")
        return m.Ok()

    def activate(self, request: Activate) -> None:
        """Bounds what the core passes on of the guest's, and starts the data thread, unless the device is at rest."""
        state = self.data.state
        if self.device.virtio_type == 0 or self._activated or state in (State.STOPPING, State.SETTLING):
            raise Refused("state", f"cannot be activated: {state.value}, virtio type {self.device.virtio_type}")
        if request.restored and not self._quiesced:
            raise Refused("state", "a restored activation of a device that is running")
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
            if (q.last_avail or q.used_idx or q.error) and not request.restored:
                raise Refused("invalid", f"queue {q.index} has positions, but nothing is restored")
        # Of those that were broken before the snapshot the driver was told before it.
        self._broken = {q.index for q in queues if q.error}
        if self.device.config_kinds and request.config:
            if len(request.config) != len(self._config):
                raise Refused("invalid", f"{len(request.config)} bytes of configuration, not {len(self._config)}")
            self.device.adopt_config(request.config)
            self._config = self.device.config
        self._activated = True
        keep = self.device.keep
        keep.begin(request.activation)
        self.device.activate(request.features & self.device.features, queues)
        keep.commit(request.activation)
        how = "taken over" if keep.again else "activated"
        log.info("%s: features %#x, queues %s", how, request.features, [q.index for q in queues])
        if not self.device.always_on and not self._quiesced:
            self.data.start()

    def command(self, request_id: int, request: Command) -> None:
        """Hands it to the kind, which answers when it can."""
        import json

        from motorcade.proto.messages import CommandResult

        def answer(value: object) -> None:
            self.client.answer(request_id, CommandResult(json.dumps(value)))

        try:
            arguments = json.loads(request.arguments)
            if not isinstance(arguments, dict):
                raise ValueError("arguments that are no JSON object")
            self.device.command(request.name, arguments, answer)
        except (ValueError, RecursionError) as e:
            raise Refused("invalid", str(e)) from e

    def ping(self, request_id: int) -> Answer | None:
        """A sign of life from the loop that serves the guest, where it is to turn; else from this one."""
        from motorcade.proto.messages import Ok

        beat = self.device.beat
        if beat is None or self.data.state is not State.ACTIVE:
            return Ok()
        self._pings.append(request_id)
        self.device.lib.mc_beat_ask(beat)
        return None

    def answer_pings(self) -> None:
        """The data loop turns."""
        from motorcade.proto.messages import Ok

        pings, self._pings = self._pings, []
        for request_id in pings:
            self.client.answer(request_id, Ok())

    def reset(self, request_id: int) -> None:
        """Nothing is in flight: the data thread has returned, or is always on and stops its queues itself."""
        from motorcade.proto.messages import Ok

        self.device.reset()
        self._activated = False
        self._broken.clear()
        self.client.answer(request_id, Ok())

    def quiesce(self, request_id: int) -> Answer | None:
        """Comes to rest. Asked again, also while it still comes to rest: answered again."""
        from motorcade.proto.messages import Error, ErrorCode, Ok

        if why := self.device.unrest():
            raise Refused("generic", why)
        if self._quiesced:
            return Ok()
        if self.device.always_on:
            self.device.quiesce()
            self._quiesced = True
            return Ok()

        def stopped() -> None:
            if self._quiesced:
                self.client.answer(request_id, Ok())
            else:
                self.data.settle(settled)

        def settled(error: OSError | None) -> None:
            if error is None:
                self._quiesced = True
                self.client.answer(request_id, Ok())
                return
            log.error("cannot come to rest, goes on: %s", error)
            self.client.answer(request_id, Error(ErrorCode.GENERIC, f"{type(error).__name__}: {error}"))
            if self._activated:
                self.data.start()

        self.data.when_idle(stopped)
        return None

    def load(self, state: DeviceState) -> None:
        """Takes over a saved state. Configuration space that follows from it is no news: the core has it as well."""
        if not self._quiesced or self._activated:
            raise Refused("state", "it was activated already" if self._activated else "it is running")
        indices = [q.index for q in state.queues]
        if len(set(indices)) != len(indices) or any(i >= len(self.device.queue_sizes) for i in indices):
            raise Refused("invalid", f"queues {indices} of {len(self.device.queue_sizes)}")
        try:
            self.device.load(state)
        except ValueError as e:
            raise Refused("invalid", str(e)) from e
        self._config = self.device.config

    def resume(self, request_id: int) -> Answer | None:
        """Goes on; a device that is still coming to rest does so first. One that runs is left alone."""
        from motorcade.proto.messages import Ok

        def go_on() -> None:
            if self._quiesced:
                self._quiesced = False
                self.device.resume()
                if self._activated and not self.device.always_on:
                    self.data.start()
            self.client.answer(request_id, Ok())

        if self.device.always_on or self.data.state in (State.ACTIVE, State.IDLE):
            go_on()
        else:
            self.data.when_idle(go_on)
        return None

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
