"""The supervisor's part in a snapshot: it opens, names and removes files, and copies disks, for the core that writes.

One snapshot at a time. Every question of the core's is answered, with the reason where the answer is no. Nothing here
waits: the disks are copied, and a checkpoint's memory is written, by a forked process, and a command that reads the
state may take its time to end.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from motorcade.orchestrator import frozendisks, savefile, templates
from motorcade.orchestrator.errors import UserError
from motorcade.orchestrator.machine import Machine, describe
from motorcade.orchestrator.resources import Resources
from motorcade.proto import messages

log = logging.getLogger("motorcade.supervisor")

_TEXT_MAX = 4000  # bytes of an error line (proto/messages.py)
_JSON_MAX = 16 << 10

Answer = Callable[[messages.Life, Sequence[int]], None]


@dataclass
class _Copier:
    """The process that copies the disks. Owns its descriptors."""

    pid: int
    pidfd: int
    words: socket.socket  # its answer: one packet


class Snapshots:
    """What the core asks for a snapshot. ``close`` at the VM's end."""

    def __init__(
        self,
        machine: Machine,
        resources: Resources,
        selector: selectors.BaseSelector,
        answer: Answer,
    ) -> None:
        """``answer`` sends a Life message with descriptors to the core."""
        self._machine, self._resources, self._selector, self._answer = machine, resources, selector, answer
        self._target: templates.Target | None = None
        self._keep = False
        self._copier: _Copier | None = None

    def on(self, life: messages.OpenTarget | messages.CopyDisks | messages.CloseTarget) -> None:
        """A question of the core's."""
        if isinstance(life, messages.OpenTarget):
            self._open(life)
        elif isinstance(life, messages.CopyDisks):
            self._copy()
        else:
            self._close(life.keep)

    def close(self) -> None:
        """The VM is over: what is not whole is removed."""
        self._end_copier()
        if self._target is not None:
            self._finish(keep=False)

    def _open(self, ask: messages.OpenTarget) -> None:
        base: list[int] = []
        try:
            if self._target is not None:
                raise UserError("a snapshot is being made already")
            labels, base = _open_base(ask.base) if ask.base else ([], [])
            self._target, description = self._make(ask)
            target = self._target
        except UserError as e:
            log.error("snapshot: %s", e)
            self._answer(messages.Target(_line(e)), ())
        else:
            log.info("snapshot to %s", ask.uri)
            self._answer(messages.Target("", (*target.fds, *labels), description), (*target.fds.values(), *base))
        finally:
            for fd in base:
                os.close(fd)

    def _make(self, ask: messages.OpenTarget) -> tuple[templates.Target, str]:
        """The target, and what is to be remembered of the machine. Errors: UserError."""
        machine = self._machine
        if ask.what == "state" and (machine.memory_file is None or not machine.memory_share):
            raise UserError(
                "x-ignore-shared leaves RAM where it is; this machine's has no name: it needs a memory_file of its own"
            )
        if ask.what == "save":
            machine = savefile.described(machine, self._resources.open_disks())
        description = describe(machine)
        if len(description.encode()) > _JSON_MAX:
            raise UserError(f"the machine's description is longer than {_JSON_MAX} bytes")
        if ask.what == "save":
            place = templates.place_of(ask.uri)
            return savefile.SaveFile(place, description, int(machine.memory)), description
        return templates.open_target(ask.uri, ask.what), description

    def _copy(self) -> None:
        target, disks = self._target, self._resources.open_disks()
        fds = [fd for disk in disks for fd in _descriptors(disk)]
        if self._copier is None and isinstance(target, savefile.SaveFile):
            memfd = self._resources.memory

            def save() -> str:
                target.write_memory(memfd)
                return frozendisks.encode([frozendisks.named(disk) for disk in disks])

            self._start(save, [*fds, *target.fds.values(), memfd])
        elif self._copier is None and isinstance(target, templates.Folder) and disks:
            folder = target.part
            self._start(lambda: frozendisks.encode([frozendisks.freeze(disk, folder) for disk in disks]), fds)
        elif isinstance(target, templates.Folder) and not disks:
            self._answer(messages.DisksCopied("", "[]"), ())
        else:
            self._answer(messages.DisksCopied("there is no template that disks could be copied to"), ())

    def _start(self, work: Callable[[], str], fds: Sequence[int]) -> None:
        self._copier = copier = _start_copier(work, fds)
        self._selector.register(copier.pidfd, selectors.EVENT_READ, self._on_copied)

    def _on_copied(self) -> None:
        """The copier has ended; its answer, if it gave one, has arrived before."""
        assert self._copier is not None
        try:
            said = self._copier.words.recv(2 * _JSON_MAX, socket.MSG_DONTWAIT)
        except BlockingIOError:
            said = b""
        how = self._end_copier()
        answer = messages.DisksCopied("")
        if not said:
            answer = messages.DisksCopied(f"the process that copies the disks {how}")
        elif said[:1] == b"!":
            answer = messages.DisksCopied(said[1:].decode(errors="replace"))
        elif len(said) > _JSON_MAX:
            answer = messages.DisksCopied(f"what there is to say of the disks is longer than {_JSON_MAX} bytes")
        else:
            answer = messages.DisksCopied("", said.decode())
        if answer.error:
            log.error("snapshot: %s", answer.error)
        self._answer(answer, ())

    def _end_copier(self) -> str:
        """Ends it, if it has not ended. How it did."""
        if self._copier is None:
            return ""
        copier, self._copier = self._copier, None
        self._selector.unregister(copier.pidfd)
        signal.pidfd_send_signal(copier.pidfd, signal.SIGKILL)  # a zombie takes it quietly
        code = os.waitstatus_to_exitcode(os.waitpid(copier.pid, 0)[1])
        os.close(copier.pidfd)
        copier.words.close()
        return f"ended with status {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"

    def _close(self, keep: bool) -> None:
        self._end_copier()
        if self._target is None:
            self._answer(messages.TargetClosed("there is no snapshot" if keep else ""), ())
        elif (error := self._finish(keep=keep)) is not None:
            self._answer(messages.TargetClosed(error), ())

    def _finish(self, *, keep: bool) -> str | None:
        """Ends the target. Its error, or empty; None: not yet, its ``pending`` is watched."""
        assert self._target is not None
        target, self._keep = self._target, keep
        pending = target.pending
        if pending >= 0 and pending in self._selector.get_map():
            self._selector.unregister(pending)
        try:
            if not target.finish(keep=keep):
                self._selector.register(pending, selectors.EVENT_READ, self._on_pending)
                return None
        except UserError as e:
            self._target = None
            log.error("snapshot: %s", e)
            return _line(e)
        self._target = None
        log.info("snapshot %s", "complete" if keep else "given up")
        return ""

    def _on_pending(self) -> None:
        """The target is worth another try."""
        if (error := self._finish(keep=self._keep)) is not None:
            self._answer(messages.TargetClosed(error), ())


def _line(error: UserError) -> str:
    return " ".join(str(error).split("\n"))[:_TEXT_MAX]


def _open_base(base: str) -> tuple[list[str], list[int]]:
    """Labels and descriptors of a template to differ from: its state, its memory, and its ancestors'. The caller's."""
    from motorcade.orchestrator import restore

    plan = restore.read(base)
    paths = [plan.path / "state", *plan.memory]
    labels = ["base.state", *(f"base.{n}" for n in range(len(plan.memory)))]
    fds: list[int] = []
    try:
        for path in paths:
            fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as e:
        for fd in fds:
            os.close(fd)
        raise UserError(f"{e.filename}: {e.strerror}") from None
    return labels, fds


def _start_copier(work: Callable[[], str], fds: Sequence[int]) -> _Copier:
    """A process that does ``work``, with these descriptors and no other."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    supervisor = os.getpid()
    pid = os.fork()
    if pid == 0:
        _copy_and_exit(work, fds, theirs, supervisor)
    theirs.close()
    return _Copier(pid, os.pidfd_open(pid), ours)


def _copy_and_exit(work: Callable[[], str], fds: Sequence[int], words: socket.socket, supervisor: int) -> NoReturn:
    """The copier's life. It answers with JSON, or with ! and an error."""
    from motorcade.orchestrator import spawn

    status = 1
    try:
        spawn.die_with(supervisor)
        spawn.default_signals()
        # Rights that copying does not need, and ends of sockets that others wait to see closed.
        low = 3
        for fd in sorted({words.fileno(), *fds}):
            if low < fd:  # an empty range would close everything (CPython passes high - 1 to close_range)
                os.closerange(low, fd)
            low = fd + 1
        os.closerange(low, (1 << 31) - 1)
        try:
            text = work()
        except UserError as e:
            text = "!" + _line(e)
        words.send(text.encode())
        status = 0
    except BaseException:
        log.exception("copying the disks failed")
    finally:
        os._exit(status)


def _descriptors(disk: frozendisks.Open) -> list[int]:
    return [source.fd for source in disk.files] + ([disk.overlay] if disk.overlay is not None else [])
