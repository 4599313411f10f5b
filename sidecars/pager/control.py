"""The pager's connection to the core, on a thread of its own.

The thread of main.py looks after the supervisor. The two never wait for each other: the core may stand still in a fault
of its own, which the pager can only answer when the supervisor's words are heard.
"""

from __future__ import annotations

import logging
import os
import select
import selectors
import threading
from typing import TYPE_CHECKING

from motorcade.proto import messages as m
from motorcade.proto.versions import PROTOCOL_VERSION
from motorcade.sidecars.sidecar import HELLO_TIMEOUT

if TYPE_CHECKING:
    from motorcade.proto.framing import ControlClient
    from motorcade.sidecars.pager.pager import Pager

log = logging.getLogger("motorcade.pager")


class Control:
    """``start`` runs the thread; ``greet`` says hello, and with that lets the guest run. ``ended_fd`` is readable when
    the connection is over: ``error`` says what went wrong, if anything."""

    def __init__(self, boot: m.Boot, pager: Pager, client: ControlClient) -> None:
        """``client`` is connected; it is the thread's, from ``start`` on."""
        self.boot, self.pager, self.client = boot, pager, client
        self.error: BaseException | None = None
        self.ended_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)
        self._greet = threading.Event()
        self._ended = False
        self._populating: list[int] = []  # ids of the requests that wait for it

    def start(self) -> None:
        """From here on the connection is served."""
        self._thread.start()

    def greet(self) -> None:
        """Lets the hello go out."""
        self._greet.set()

    def stop(self) -> None:
        """Ends the connection, unless it waits for the welcome: that ends with the process."""
        os.eventfd_write(self._stop_fd, 1)
        self._greet.set()
        self._thread.join(2.0)

    def _run(self) -> None:
        try:
            self._talk()
        except BaseException as e:  # handed to the main thread, which ends the process with it
            self.error = e
        os.eventfd_write(self.ended_fd, 1)

    def _talk(self) -> None:
        client = self.client
        hello = m.Hello(
            protocol_version=PROTOCOL_VERSION,
            device_id=self.boot.role.device_id if isinstance(self.boot.role, m.PagerBoot) else "",
            pid=os.getpid(),
            virtio_type=0,
            features=0,
            queue_sizes=(),
            config=b"",
        )
        self._greet.wait()
        if not select.select([self._stop_fd], [], [], 0)[0]:
            client.hello(hello, HELLO_TIMEOUT)
            self._serve(client)
        client.close(linger=1.0)  # the answer to shutdown is still to go out

    def _serve(self, client: ControlClient) -> None:
        log.info("welcomed by the core")
        with selectors.DefaultSelector() as selector:
            for fd in (client.fileno(), self.pager.populated_fd, self._stop_fd):
                selector.register(fd, selectors.EVENT_READ)
            while not self._ended:
                for key, _ in selector.select():
                    if key.fd == self._stop_fd:
                        self._ended = True
                    elif key.fd == self.pager.populated_fd:
                        self._on_populated(client)
                    elif not client.process(lambda message: self._on_message(client, message)):
                        log.warning("the core is gone")
                        self._ended = True

    def _on_message(self, client: ControlClient, message: m.Message) -> None:
        body = message.body
        answer: m.Answer | None = m.Ok()
        if isinstance(body, m.StatsRequest):
            answer = self.pager.stats()
        elif isinstance(body, m.Populate):
            if self.pager.left:
                self._populating.append(message.id)
                self.pager.populate()
                answer = None
        elif isinstance(body, m.Shutdown):
            self._ended = True
        elif not isinstance(body, m.Ping | m.Quiesce | m.Resume):
            # A guest cannot make it do anything that would have to rest.
            answer = m.Error(m.ErrorCode.UNKNOWN, f"a pager does not know {type(body).__name__}")
        if answer is not None:
            client.answer(message.id, answer)

    def _on_populated(self, client: ControlClient) -> None:
        """All is there, or as much as the processes have mapped."""
        os.eventfd_read(self.pager.populated_fd)
        left = self.pager.left
        waiting, self._populating = self._populating, []
        for request_id in waiting:
            text = f"{left} chunks are in no process's mapping"
            client.answer(request_id, m.Error(m.ErrorCode.STATE, text) if left else m.Ok())
