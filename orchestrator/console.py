"""The terminal's side of a console: `vmmctl console`, and `vmmctl up` once the VM runs.

Bytes go through unchanged both ways; nothing here knows about terminals' escape sequences. A terminal as input is raw
meanwhile and has one key of its own, the leave key. Pipes and files work as well, for scripts: their end is the end of
the input only, and the leave key is a byte like any other there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import stat
import struct
import termios
import threading
import tty
from collections.abc import Iterator
from types import FrameType
from typing import Final, Literal

from motorcade.orchestrator.errors import EXIT_NOT_FOUND, UserError

Reason = Literal["left", "closed", "input-ended", "output-closed"]
LEFT: Final = "left"  # the leave key, or the terminal is gone; the VM goes on
CLOSED: Final = "closed"  # the VM, or its console, has ended
INPUT_ENDED: Final = "input-ended"  # end of the input, where the caller asked to leave at it
OUTPUT_CLOSED: Final = "output-closed"  # nobody reads our output any more

LEAVE_KEY = "^]"
LEAVE_KEY_VARIABLE = "MOTORCADE_LEAVE_KEY"

_CHUNK = 65536
_TYPED_AHEAD = 65536  # bytes kept for a guest that does not read; more than anybody types
_CONNECT_TIMEOUT = struct.pack("ll", 5, 0)  # struct timeval
# Ends colours and shows the cursor, whatever the guest left behind.
_TIDY = b"\x1b[m\x1b[?25h\r\n"


def attach(
    path: str | os.PathLike[str],
    *,
    stdin: int | None = 0,
    stdout: int = 1,
    leave_key: str | None = None,
    leave_at_eof: bool = False,
    hint: bool = True,
) -> Reason:
    """Joins the console socket at ``path`` to two descriptors until one side ends; says which.

    ``stdin`` None: output only. ``leave_key`` is ^X, one ASCII character, or "none" (default: $MOTORCADE_LEAVE_KEY, or
    ^]). The terminal's modes are restored however this ends, by signals too (SIGTSTP and SIGCONT included), but for
    SIGKILL. The descriptors stay the caller's, and their flags are not touched. Raises UserError: no such console, or
    a leave key that cannot be.
    """
    key = parse_key(os.environ.get(LEAVE_KEY_VARIABLE, LEAVE_KEY) if leave_key is None else leave_key)
    from_tty = stdin is not None and os.isatty(stdin)
    to_tty = os.isatty(stdout)
    signalled: int | None = None
    reason: Reason = CLOSED
    with connect(path) as sock, _own_description(stdout) as out:
        try:
            with _signals(), _raw(stdin if from_tty else None):
                pump = _Pump(sock, stdin, out, key if from_tty else None, leave_at_eof)
                if hint and from_tty and to_tty:
                    leave = f"{_shown(key)} leaves" if key is not None else "there is no leave key"
                    pump.to_stdout += f"[attached to the console; {leave}]\r\n".encode()
                reason = pump.run()
        except _Signalled as e:
            signalled = e.number
        finally:
            if from_tty and to_tty:
                # A terminal that is stuck or gone gets no tidying.
                with contextlib.suppress(OSError):
                    os.write(out, _TIDY)
    if signalled is not None:
        # Everything is as it was: die, or whatever the caller's handler does.
        os.kill(os.getpid(), signalled)
    return reason


def parse_key(text: str) -> bytes | None:
    """The byte of a leave key; None for "none". UserError for anything else."""
    if text == "none":
        return None
    if len(text) == 1 and text.isascii():
        return text.encode()
    if len(text) == 2 and text[0] == "^" and "@" <= text[1].upper() <= "_":
        return bytes([ord(text[1].upper()) ^ 0x40])
    raise UserError(f"leave key {text!r} is neither ^ and a letter (or @ [ \\ ] ^ _), one character, nor none")


def _shown(key: bytes) -> str:
    return f"Ctrl-{chr(key[0] ^ 0x40)}" if key[0] < 0x20 else key.decode()


def connect(path: str | os.PathLike[str]) -> socket.socket:
    """A connected, non-blocking socket, the caller's. UserError says why there is none."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # A sidecar that is being replaced leaves us in the backlog, and a backlog that is full makes connect wait.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _CONNECT_TIMEOUT)
        sock.connect(os.fspath(path))
    except OSError as e:
        sock.close()
        if e.errno in (errno.ENOENT, errno.ECONNREFUSED):
            raise UserError(f"no console at {os.fspath(path)}: the VM is not running", EXIT_NOT_FOUND) from None
        why = "too many others are waiting for it" if e.errno == errno.EAGAIN else e.strerror or e
        raise UserError(f"console {os.fspath(path)}: {why}") from None
    sock.setblocking(False)
    return sock


class _Pump:
    """The loop, with what is under way in each direction."""

    def __init__(
        self, sock: socket.socket, stdin: int | None, stdout: int, key: bytes | None, leave_at_eof: bool
    ) -> None:
        self.sock, self.stdin, self.stdout, self.key = sock, stdin, stdout, key
        self.leave_at_eof = leave_at_eof and stdin is not None
        self.from_tty = stdin is not None and os.isatty(stdin)
        self.to_guest = bytearray()
        self.to_stdout = bytearray()
        self.sock_open = True

    def run(self) -> Reason:
        """Until one side ends. What the guest said before its end is written first."""
        while True:
            # Only what is wanted is polled: a hang-up cannot be masked, and would be reported for ever.
            wanted = {self.stdout: select.POLLOUT if self.to_stdout else 0}
            if self.sock_open and (self.to_guest or not self.to_stdout):
                wanted[self.sock.fileno()] = select.POLLOUT if self.to_guest else 0
                wanted[self.sock.fileno()] |= 0 if self.to_stdout else select.POLLIN
            # A terminal is read even while the guest takes nothing, or the leave key would not be seen.
            if self.stdin is not None and (self.from_tty or not self.to_guest):
                wanted[self.stdin] = wanted.get(self.stdin, 0) | select.POLLIN
            poller = select.poll()
            for fd, events in wanted.items():
                poller.register(fd, events)
            ready = dict(poller.poll())

            if self.stdin is not None and ready.get(self.stdin) and (reason := self._read_stdin()):
                return reason
            events = ready.get(self.sock.fileno(), 0) if self.sock_open else 0
            if events & (select.POLLIN | select.POLLHUP | select.POLLERR) and not self.to_stdout:
                self._read_guest()
            if self.sock_open and self.to_guest:
                self._write_guest()
            if self.to_stdout and not self._write_stdout():
                return OUTPUT_CLOSED
            if not self.to_stdout and ready.get(self.stdout, 0) & (select.POLLERR | select.POLLHUP | select.POLLNVAL):
                return LEFT if os.isatty(self.stdout) else OUTPUT_CLOSED
            if not self.sock_open and not self.to_stdout:
                return CLOSED
            if self.stdin is None and self.leave_at_eof and not self.to_guest:
                return INPUT_ENDED

    def _read_stdin(self) -> Reason | None:
        assert self.stdin is not None
        try:
            data = os.read(self.stdin, _CHUNK)
        except BlockingIOError:
            return None
        except OSError as e:
            if e.errno != errno.EIO:
                raise
            data = b""  # a terminal that hung up
        if not data:
            if self.from_tty:
                return LEFT
            self.stdin = None
            self._end_input()
            return None
        if self.key is not None and (at := data.find(self.key)) >= 0:
            self.to_guest += data[:at]
            if self.sock_open:
                self._write_guest()
            return LEFT
        if len(self.to_guest) + len(data) <= _TYPED_AHEAD or not self.from_tty:
            self.to_guest += data
        else:
            self.to_stdout += b"\a"  # as a terminal does when its input buffer is full
        return None

    def _end_input(self) -> None:
        """The guest's output goes on; the sidecar learns that no input will follow."""
        if self.stdin is None and not self.to_guest and self.sock_open:
            with contextlib.suppress(OSError):  # it has gone, which the next read says
                self.sock.shutdown(socket.SHUT_WR)

    def _read_guest(self) -> None:
        try:
            data = self.sock.recv(_CHUNK)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        self.sock_open = bool(data)
        self.to_stdout += data

    def _write_guest(self) -> None:
        try:
            del self.to_guest[: self.sock.send(self.to_guest, socket.MSG_NOSIGNAL)]
        except BlockingIOError:
            return
        except (BrokenPipeError, ConnectionResetError):
            self.to_guest.clear()  # the end of file, behind what is left to read, says the rest
        self._end_input()

    def _write_stdout(self) -> bool:
        try:
            del self.to_stdout[: os.write(self.stdout, self.to_stdout)]
        except BlockingIOError:
            pass
        except OSError as e:
            if e.errno not in (errno.EPIPE, errno.EIO):
                raise
            return False
        return True


@contextlib.contextmanager
def _own_description(fd: int) -> Iterator[int]:
    """A terminal or pipe opened anew, non-blocking, so that a reader that stops leaves us the leave key. O_NONBLOCK on
    ``fd`` itself would be set for the shell and everybody else who shares it."""
    try:
        if not os.isatty(fd) and not stat.S_ISFIFO(os.fstat(fd).st_mode):
            # A file's position belongs to its description, and must go on moving for those who share it.
            yield fd
            return
        own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        # Another user's terminal, no /proc: then writes may block.
        yield fd
        return
    try:
        yield own
    finally:
        os.close(own)


class _Signalled(BaseException):
    """A signal whose default is to end the process."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Turns the signals that would end the process at once into exceptions, so that the terminal is restored. A handler
    of the caller's stays: what it raises restores the terminal just as well."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise _Signalled(number)

    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGINT)
    ours = [n for n in numbers if signal.getsignal(n) is signal.SIG_DFL]
    try:
        for number in ours:
            signal.signal(number, end)
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def _raw(fd: int | None) -> Iterator[None]:
    """cfmakeraw(3) on a terminal; its modes back at the end and while stopped (SIGTSTP), raw again after SIGCONT."""
    if fd is None:
        yield
        return
    before = termios.tcgetattr(fd)
    main = threading.current_thread() is threading.main_thread()

    def stop(number: int, frame: FrameType | None) -> None:
        termios.tcsetattr(fd, termios.TCSANOW, before)
        os.kill(os.getpid(), signal.SIGSTOP)

    def resume(number: int, frame: FrameType | None) -> None:
        tty.setraw(fd, termios.TCSANOW)

    old: dict[signal.Signals, signal._HANDLER] = {}
    try:
        if main and signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL:
            old = {signal.SIGTSTP: signal.SIG_DFL, signal.SIGCONT: signal.getsignal(signal.SIGCONT)}
            signal.signal(signal.SIGTSTP, stop)
            signal.signal(signal.SIGCONT, resume)
        # Not TCSAFLUSH: what was typed ahead is for the guest. Not TCSADRAIN: it waits for a terminal that is stuck.
        tty.setraw(fd, termios.TCSANOW)
        yield
    finally:
        # No second signal may come between the first and the terminal's modes.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            for number, handler in old.items():
                signal.signal(number, handler)
            with contextlib.suppress(termios.error):  # the terminal is gone
                termios.tcsetattr(fd, termios.TCSANOW, before)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
