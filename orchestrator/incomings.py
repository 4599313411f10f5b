"""States on their way into a machine that runs already: migrate-incoming and load-devices-state, the supervisor's part.

The core asks by openIncoming, and is given the descriptor of a file. What comes through a command or a client's
descriptor is first written into one without a name. Nothing here waits.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from motorcade.orchestrator import restore
from motorcade.orchestrator.errors import UserError
from motorcade.orchestrator.machine import Machine
from motorcade.orchestrator.resources import Resources
from motorcade.proto import messages

log = logging.getLogger("motorcade.supervisor")

MAX_STATE = 256 << 20  # bytes of a state without memory that come through a pipe
_PIECE = 1 << 20
_TEXT_MAX = 4000  # bytes of an error line (proto/messages.py)

Answer = Callable[[messages.Life, Sequence[int]], None]


@dataclass
class _Spool:
    """A state that comes in piece by piece. Owns its descriptors and the command."""

    ask: messages.OpenIncoming
    source: int
    file: int  # a memfd
    pid: int = -1  # the command's
    pidfd: int = -1
    size: int = 0


class Incomings:
    """What the core asks for. One state at a time; ``close`` at the VM's end."""

    def __init__(
        self,
        machine: Machine,
        config: str,
        resources: Resources,
        selector: selectors.BaseSelector,
        answer: Answer,
        template_opened: Callable[[], None],
    ) -> None:
        """``answer`` sends a Life message with descriptors to the core. ``template_opened``: ``resources`` have what a
        machine needs that was started without a template, and the core is to be answered when its memory is there."""
        self._machine, self._config, self._resources = machine, config, resources
        self._selector, self._answer, self._template_opened = selector, answer, template_opened
        self._spool: _Spool | None = None

    def on(self, ask: messages.OpenIncoming, fds: Sequence[int]) -> None:
        """A question of the core's. ``fds`` stay the caller's."""
        kind, _, rest = ask.uri.partition(":")
        try:
            if self._spool is not None:
                raise UserError("a state is on its way in already")
            if ask.what == "machine" and not self._waits:
                raise UserError("this machine does not wait for a template")
            if kind == "fd" and len(fds) == 1:
                self._begin(_Spool(ask, os.dup(fds[0]), _memfd()))
            elif kind == "exec" and rest:
                source, pid = _run(rest)
                self._begin(_Spool(ask, source, _memfd(), pid, os.pidfd_open(pid)))
            elif kind == "file" and rest.startswith("/") and "\0" not in rest:
                self._open(ask, Path(os.path.normpath(rest)))
            else:
                raise UserError(f"{ask.uri or 'nothing'}: a state is at file:PATH (absolute), exec:COMMAND or fd:NAME")
        except UserError as e:
            self._refuse(e)

    def close(self) -> None:
        """The VM is over."""
        if self._spool is not None:
            self._end_spool()

    @property
    def _waits(self) -> bool:
        """Whether the machine was started without a state, and still has none."""
        return self._resources.incoming is not None and not self._resources.template

    def _refuse(self, error: UserError) -> None:
        log.error("incoming: %s", error)
        self._answer(messages.Incoming(" ".join(str(error).split("\n"))[:_TEXT_MAX]), ())

    def _open(self, ask: messages.OpenIncoming, path: Path) -> None:
        if ask.what == "machine" and not path.is_file():
            self._resources.open_template(restore.named_later(self._machine, self._config, restore.read(path)))
            self._template_opened()
            return
        fd = restore.open_state(path)
        try:
            self._take(ask, fd, path)
        finally:
            os.close(fd)

    def _take(self, ask: messages.OpenIncoming, fd: int, where: Path) -> None:
        """The file of a state is there. ``fd`` stays the caller's. Errors: UserError."""
        if not self._waits:  # its RAM is there
            self._answer(messages.Incoming(""), [fd])
            return
        if ask.what == "devices" and not self._resources.in_place:
            raise UserError("this machine has no memory yet that the state of devices could go with (memory_file)")
        incoming = restore.named_later(self._machine, self._config, restore.of_state(fd, where))
        self._resources.open_template(incoming, state=fd)
        self._template_opened()

    # What comes in piece by piece.

    def _begin(self, spool: _Spool) -> None:
        self._spool = spool
        if stat.S_ISREG(os.fstat(spool.source).st_mode):  # which no selector takes, and which never makes us wait
            while self._spool is spool:
                self._on_piece()
        else:
            self._selector.register(spool.source, selectors.EVENT_READ, self._on_piece)

    def _on_piece(self) -> None:
        spool = self._spool
        assert spool is not None
        try:
            piece = os.read(spool.source, _PIECE)
            spool.size += len(piece)
            if spool.size > MAX_STATE:
                raise UserError(f"{spool.ask.uri}: a state without memory has at most {MAX_STATE >> 20} MiB")
            while piece:
                piece = piece[os.write(spool.file, piece) :]
                if not piece:
                    return
        except BlockingIOError:
            return
        except OSError as e:
            self._end_spool()
            self._refuse(UserError(f"{spool.ask.uri}: {e.strerror}"))
            return
        except UserError as e:
            self._end_spool()
            self._refuse(e)
            return
        self._forget_source(spool)
        if spool.pidfd >= 0:
            self._selector.register(spool.pidfd, selectors.EVENT_READ, self._on_whole)
        else:
            self._on_whole()

    def _on_whole(self) -> None:
        """The state has ended, and the command that gave it."""
        spool = self._spool
        assert spool is not None
        try:
            file = os.dup(spool.file)
            code = self._end_spool()
            try:
                if code:
                    how = f"ended with status {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
                    raise UserError(f"{spool.ask.uri}: {how}")
                self._take(spool.ask, file, Path(spool.ask.uri))
            finally:
                os.close(file)
        except UserError as e:
            self._refuse(e)

    def _forget_source(self, spool: _Spool) -> None:
        if spool.source in self._selector.get_map():
            self._selector.unregister(spool.source)
        os.close(spool.source)
        spool.source = -1

    def _end_spool(self) -> int:
        """Nothing is left of it. The command's exit status."""
        spool, self._spool = self._spool, None
        assert spool is not None
        if spool.source >= 0:
            self._forget_source(spool)
        os.close(spool.file)
        if spool.pid < 0:
            return 0
        if spool.pidfd in self._selector.get_map():
            self._selector.unregister(spool.pidfd)
        signal.pidfd_send_signal(spool.pidfd, signal.SIGKILL)  # a zombie takes it quietly
        code = os.waitstatus_to_exitcode(os.waitpid(spool.pid, 0)[1])
        os.close(spool.pidfd)
        return code


def _memfd() -> int:
    return os.memfd_create("motorcade-state", os.MFD_CLOEXEC)


def _run(command: str) -> tuple[int, int]:
    """What a shell writes to its standard output, with the rights of the VM's user: the reading end, and its pid.

    Errors: UserError.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        pid = os.posix_spawn(
            "/bin/sh",
            ["sh", "-c", command],
            dict(os.environ),
            file_actions=[(os.POSIX_SPAWN_DUP2, null, 0), (os.POSIX_SPAWN_DUP2, writer, 1)],
            setsid=True,
            setsigmask=[],
            setsigdef=[signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGHUP],
        )
    except OSError as e:
        os.close(reader)
        raise UserError(f"exec: {e.strerror}") from None
    finally:
        os.close(writer)
        os.close(null)
    return reader, pid
