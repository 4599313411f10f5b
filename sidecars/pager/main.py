"""The pager process.

Three threads: this one, with the supervisor; the loop in C, which answers faults; the one that talks to the core
(control.py). The core waits for the hello of every sidecar before it runs the guest, so the pager's comes when the
working set is there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import socket
import threading

from motorcade.proto import boot as bootlink
from motorcade.proto import messages as m
from motorcade.proto import template
from motorcade.proto.framing import ControlClient
from motorcade.proto.versions import negotiate
from motorcade.sidecars import runtime, sandbox
from motorcade.sidecars._pager import ffi, lib
from motorcade.sidecars.pager import workingset
from motorcade.sidecars.pager.control import Control
from motorcade.sidecars.pager.pager import Damage, Notice, Pager

log = logging.getLogger("motorcade.pager")


def prepare() -> ControlClient:
    """What the pager has before its Boot, for ``main``; the process has one thread, and drops its privileges."""
    sandbox.load("pager")
    sandbox.enter(ffi, lib, "pager")
    return ControlClient()


def main(boot_socket: socket.socket, client: ControlClient | None = None) -> int:
    """The story of the process, which owns ``boot_socket`` and has no other thread yet, but ZeroMQ's where it has been
    prepared. Returns its exit status: 0 after an orderly end, 1 after a failure, which is in the log and, for the
    supervisor, in a Life message."""
    try:
        boot, fds = bootlink.recv_boot(boot_socket)
        runtime.open_log(fds.get("log"), boot)
        negotiate(boot.protocol_version)
        pager, eager = open_pager(boot, fds)
        client = client or prepare()
        if not eager:
            # Now, so that the core goes on meanwhile: it waits for the hello, which comes from inside the sandbox.
            bootlink.send_life(boot_socket, m.Ready())
        control = None
        # Without a socket: a replacement, which the core does not wait for and could not tell from an impostor.
        if boot.control_socket:
            runtime.reach(client, boot, fds)
            control = Control(boot, pager, client)
        sandbox.close(ffi, lib, "pager", "pager", boot_socket.fileno())
        if eager:
            pager.copy_all()
            bootlink.send_life(boot_socket, m.Ready())
        return Process(boot_socket, pager, control, eager=eager).loop()
    except Exception as e:
        log.exception("the pager ends")
        if isinstance(e, Damage):
            bootlink.send_life(boot_socket, m.Damaged(str(e)))
        bootlink.send_life(boot_socket, m.Failed(f"{type(e).__name__}: {e}"[:2000]))
        return 1


def open_pager(boot: m.Boot, fds: dict[str, int]) -> tuple[Pager, bool]:
    """The data path over the descriptors of the Boot, and whether it is to copy everything at once.

    Errors: Damage; ValueError and KeyError for a Boot that is not one for a pager.
    """
    role = boot.role
    if not isinstance(role, m.PagerBoot):
        raise ValueError("the pager was given the Boot of another process")
    try:
        state = template.read(fds["state"])
    except template.TemplateError as e:
        raise Damage(f"the template's state: {e}") from None
    if state.memory_size != role.size:
        raise ValueError(f"the template has {state.memory_size} bytes of memory, the machine {role.size}")
    layers = [fds[f"template.{n}"] for n in range(role.parents + 1)]
    ahead = read_working_set(fds["working-set"], len(state.layers)) if "working-set" in fds else None
    record = ahead is None and not role.eager
    discarded = fds.get("discarded", -1)
    pager = Pager(
        state, fds["memory"], layers, start=role.start, ahead=ahead or (), record=record, discarded=discarded
    )
    return pager, role.eager


def read_working_set(fd: int, memory_chunks: int) -> list[int] | None:
    """None where it is not one of this machine: it is then recorded anew."""
    try:
        return workingset.read(fd, memory_chunks)
    except (workingset.WorkingSetError, OSError) as e:
        log.warning("the working set is left out: %s", e)
        return None


class Process:
    """The loop's side of the supervisor."""

    def __init__(self, boot_socket: socket.socket, pager: Pager, control: Control | None, *, eager: bool) -> None:
        self.boot_socket, self.pager, self.control, self.eager = boot_socket, pager, control, eager
        self.ended = False
        self._crash: BaseException | None = None
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        self._crash_fd, self._term_fd = os.eventfd(0, flags), os.eventfd(0, flags)
        self._data = threading.Thread(target=self._run, name="data", daemon=True)

    def loop(self) -> int:
        """Until SIGTERM or the end of the supervisor; where nobody needs it, of the core. Returns the exit status."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is vmmctl's business
        signal.signal(signal.SIGTERM, lambda *_: os.eventfd_write(self._term_fd, 1))
        if not self.eager:
            self._data.start()
        with selectors.DefaultSelector() as selector:
            for fd, callback in (
                (self.boot_socket.fileno(), self.on_boot_socket),
                (self.pager.event_fd, self.on_notice),
                (self._crash_fd, self.on_crash),
                (self._term_fd, self.on_term),
            ):
                selector.register(fd, selectors.EVENT_READ, callback)
            if self.control is not None:
                selector.register(self.control.ended_fd, selectors.EVENT_READ, self.on_control_ended)
                self.control.start()
                if self.eager:
                    self.control.greet()
            while not self.ended:
                for key, _ in selector.select():
                    key.data()
                    if self.ended:
                        break
        if self.control is not None:
            self.control.stop()
        if not self.eager:
            self.pager.stop()
            self._data.join()
        return 0

    def _run(self) -> None:
        """The data thread."""
        try:
            self.pager.run()
        except BaseException as e:  # handed to the main thread, which ends the process with it
            self._crash = e
            os.eventfd_write(self._crash_fd, 1)

    def on_boot_socket(self) -> None:
        """Processes that are to be served, or the supervisor's end."""
        messages, alive = bootlink.drain_life_fds(self.boot_socket)
        for life, fds in messages:
            self.on_life(life, fds)
        if not alive:
            log.warning("ending: the supervisor is gone")
            self.ended = True

    def on_life(self, life: m.Life, fds: list[int]) -> None:
        """One message of the supervisor's."""
        if isinstance(life, m.Serve) and len(fds) == 1 and not self.eager:
            try:
                self.pager.serve(life.process, fds[0], life.mappings)
            except ValueError as e:
                # What it says of itself is wrong. The others are none the worse for it.
                log.error("%s", e)
            else:
                log.info("serving %s: %d mappings", life.process, len(life.mappings))
            return
        log.warning("ignored: %s with %d descriptors", type(life).__name__, len(fds))
        for fd in fds:
            with contextlib.suppress(OSError):
                os.close(fd)

    def on_notice(self) -> None:
        """The loop has something to tell."""
        os.eventfd_read(self.pager.event_fd)
        notices = self.pager.notices()
        if Notice.DAMAGED in notices:
            damage = self.pager.damage()
            log.error("nothing is filled any more: %s", damage)
            bootlink.send_life(self.boot_socket, m.Damaged(str(damage)))
        if Notice.AHEAD_DONE in notices and self.control is not None:
            self.control.greet()
        if Notice.RECORDED in notices:
            chunks = self.pager.recorded()
            log.info("recorded a working set of %d chunks", len(chunks) // 4)
            bootlink.send_life(self.boot_socket, m.WorkingSet(chunks))
        if Notice.SOURCE_LOST in notices:
            log.error("a process cannot be served any more; see the counter lost")

    def on_control_ended(self) -> None:
        """The core asked for the end, or is gone; or it was never there.

        The others may still touch memory while they flush, so faults are answered until the supervisor says enough.
        """
        assert self.control is not None
        os.eventfd_read(self.control.ended_fd)
        if self.control.error is not None:
            raise self.control.error
        self.ended = self.eager

    def on_crash(self) -> None:
        """The data thread could not go on."""
        os.eventfd_read(self._crash_fd)
        if self._crash is not None:
            raise self._crash

    def on_term(self) -> None:
        """SIGTERM."""
        os.eventfd_read(self._term_fd)
        log.warning("ending: SIGTERM")
        self.ended = True
