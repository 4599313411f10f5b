"""A terminal that is drawn over again and again, and given back as it was, however that ends (but for kill -9)."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import termios
import tty
from types import FrameType
from typing import Any

_ENTER = "\x1b[?1049h\x1b[?25l"  # the other screen, no cursor
_LEAVE = "\x1b[?25h\x1b[?1049l"


class Screen:
    """Standard input and output, which are a terminal. Use as a context manager."""

    def __enter__(self) -> Screen:
        self._before = termios.tcgetattr(sys.stdin)
        # Signals wake up whoever waits for ``signals``: a new size is seen at once.
        self.signals, self._sender = socket.socketpair()
        self.signals.setblocking(False)
        self._sender.setblocking(False)
        self._old_wakeup = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._handlers: dict[int, Any] = {}
        for number, handler in (
            (signal.SIGWINCH, lambda *_: None),
            (signal.SIGTSTP, self._stop),
            (signal.SIGTERM, self._end),
            (signal.SIGHUP, self._end),
        ):
            self._handlers[number] = signal.signal(number, handler)
        self._enter()
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        self.signals.close()
        self._sender.close()

    def _enter(self) -> None:
        tty.setcbreak(sys.stdin)
        self._write(_ENTER)

    def _leave(self) -> None:
        with contextlib.suppress(OSError, termios.error):  # the terminal may be gone
            self._write(_LEAVE)
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._before)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        """Ctrl-Z: the terminal is the shell's until fg."""
        self._leave()
        os.kill(os.getpid(), signal.SIGSTOP)
        self._enter()

    def _end(self, number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def draw(self, lines: list[str]) -> None:
        """Replaces what is there; each line is cut off by its writer. One write: nothing flickers."""
        self._write("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines[:-1]) + lines[-1] + "\x1b[K\x1b[J")

    def key(self) -> str:
        """What was typed; Ctrl-D where the terminal is gone."""
        data = os.read(sys.stdin.fileno(), 64)
        return data.decode(errors="replace")[:1] if data else "\x04"

    def settle(self) -> None:
        """The signals until now have been seen to."""
        with contextlib.suppress(BlockingIOError):
            while self.signals.recv(64):
                pass
