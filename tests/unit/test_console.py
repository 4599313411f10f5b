"""The console client against a server in the test: as a library on pipes, and as a process on a pty."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import time
import tty
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from motorcade.orchestrator import console
from motorcade.orchestrator.errors import EXIT_NOT_FOUND, UserError

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 60.0
BIG = b"".join(b"%07d\n" % i for i in range(1 << 17))  # 1 MiB


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """A listening socket in the sidecar's place; ``getsockname()`` is its path."""
    directory = tempfile.mkdtemp(prefix="mc-")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"{directory}/c.sock")
        sock.listen()
        sock.settimeout(TIMEOUT)
        yield sock
    shutil.rmtree(directory)


def accept(server: socket.socket) -> socket.socket:
    peer, _ = server.accept()
    peer.settimeout(TIMEOUT)
    return peer


class Attached:
    """``attach`` on a thread, with a pipe for input and one for output."""

    def __init__(self, server: socket.socket, **options: Any) -> None:
        self.stdin_read, self.stdin = os.pipe()
        self.stdout, self.stdout_write = os.pipe()
        self.reason: str | None = None
        self.error: BaseException | None = None

        def run() -> None:
            try:
                path = server.getsockname()
                self.reason = console.attach(path, stdin=self.stdin_read, stdout=self.stdout_write, **options)
            except BaseException as e:
                self.error = e

        self.thread = threading.Thread(target=run)
        self.thread.start()
        self.peer = accept(server)

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.peer.close()
        self.thread.join(TIMEOUT)
        assert not self.thread.is_alive()
        for fd in {self.stdin_read, self.stdin, self.stdout, self.stdout_write} - {-1}:
            os.close(fd)

    def close(self, name: str) -> None:
        os.close(getattr(self, name))
        setattr(self, name, -1)

    def ended(self) -> str | None:
        self.thread.join(TIMEOUT)
        assert not self.thread.is_alive()
        if self.error is not None:
            raise self.error
        return self.reason


def read_exactly(fd: int, n: int) -> bytes:
    deadline = time.monotonic() + TIMEOUT
    data = b""
    while len(data) < n:
        if not select.select([fd], [], [], max(0, deadline - time.monotonic()))[0]:
            raise TimeoutError(f"{len(data)} of {n} bytes: {data[-100:]!r}")
        piece = os.read(fd, n - len(data))
        assert piece, f"end of file after {data[-100:]!r}"
        data += piece
    return data


def read_until(fd: int, end: bytes) -> bytes:
    data = b""
    while end not in data:
        data += read_exactly(fd, 1)
    return data


def recv_exactly(sock: socket.socket, n: int) -> bytes:
    return read_exactly(sock.fileno(), n)


@pytest.mark.parametrize(
    ("text", "key"), [("^]", b"\x1d"), ("^a", b"\x01"), ("^A", b"\x01"), ("^@", b"\0"), ("^_", b"\x1f"), ("~", b"~")]
)
def test_leave_keys(text: str, key: bytes) -> None:
    assert console.parse_key(text) == key


def test_no_leave_key() -> None:
    assert console.parse_key("none") is None


@pytest.mark.parametrize("text", ["", "ctrl-a", "^1", "é", "^]]"])
def test_leave_keys_that_cannot_be(text: str) -> None:
    with pytest.raises(UserError, match="leave key"):
        console.parse_key(text)


def test_no_such_console(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not running") as e:
        console.attach(tmp_path / "none", stdin=None)
    assert e.value.status == EXIT_NOT_FOUND


def test_console_that_nobody_serves(server: socket.socket) -> None:
    path = server.getsockname()
    server.close()
    with pytest.raises(UserError, match="not running"):
        console.attach(path, stdin=None)


def test_both_ways_unchanged_and_closed_by_the_vm(server: socket.socket) -> None:
    with Attached(server) as a:
        everything = bytes(range(256)) * 4
        os.write(a.stdin, everything)
        assert recv_exactly(a.peer, 1024) == everything  # the leave key's byte among them
        a.peer.sendall(everything)
        assert read_exactly(a.stdout, 1024) == everything
        a.peer.sendall(b"last words")
        a.peer.close()
        assert a.ended() == console.CLOSED
        assert read_exactly(a.stdout, 10) == b"last words"


def test_end_of_input_is_not_the_end_of_output(server: socket.socket) -> None:
    with Attached(server) as a:
        os.write(a.stdin, b"uptime\n")
        a.close("stdin")
        assert recv_exactly(a.peer, 7) == b"uptime\n"
        assert a.peer.recv(1) == b"", "the sidecar sees the end of the input"
        a.peer.sendall(b"up 3 days\n")
        assert read_exactly(a.stdout, 10) == b"up 3 days\n"
        a.peer.close()
        assert a.ended() == console.CLOSED


def test_leave_at_the_end_of_input_when_asked(server: socket.socket) -> None:
    with Attached(server, leave_at_eof=True) as a:
        os.write(a.stdin, b"poweroff\n")
        a.close("stdin")
        assert a.ended() == console.INPUT_ENDED
        assert recv_exactly(a.peer, 9) == b"poweroff\n"


def test_output_that_nobody_reads_any_more(server: socket.socket) -> None:
    """As in ``vmmctl console web | head -1``: ends without the guest having to say another word."""
    with Attached(server) as a:
        a.peer.sendall(b"one line\n")
        assert read_exactly(a.stdout, 9) == b"one line\n"
        a.close("stdout")
        assert a.ended() == console.OUTPUT_CLOSED


def test_much_in_both_directions_at_once(server: socket.socket) -> None:
    with Attached(server) as a:
        got: dict[str, bytes] = {}
        threads = [
            threading.Thread(target=lambda: a.peer.sendall(BIG)),
            threading.Thread(target=lambda: got.update(out=read_exactly(a.stdout, len(BIG)))),
            threading.Thread(target=lambda: got.update(into=recv_exactly(a.peer, len(BIG)))),
        ]
        for t in threads:
            t.start()
        view = memoryview(BIG)
        while view:
            view = view[os.write(a.stdin, view) :]
        for t in threads:
            t.join(TIMEOUT)
        assert got == {"out": BIG, "into": BIG}


def test_descriptors_keep_their_flags(server: socket.socket) -> None:
    with Attached(server) as a:
        a.peer.sendall(b"x")
        assert read_exactly(a.stdout, 1) == b"x"
        assert os.get_blocking(a.stdin_read)
        assert os.get_blocking(a.stdout_write)


def test_output_to_a_file_goes_behind_what_is_there(server: socket.socket, tmp_path: Path) -> None:
    with open(tmp_path / "out", "w+b", buffering=0) as f:
        f.write(b"before ")
        thread = threading.Thread(target=lambda: console.attach(server.getsockname(), stdin=None, stdout=f.fileno()))
        thread.start()
        with accept(server) as peer:
            peer.sendall(b"during")
        thread.join(TIMEOUT)
        f.write(b" after")
    assert (tmp_path / "out").read_bytes() == b"before during after"


def test_input_from_a_file(server: socket.socket, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(BIG[:5000])
    with open(tmp_path / "in", "rb") as f, open(tmp_path / "out", "wb") as out:
        reasons: list[str] = []
        thread = threading.Thread(
            target=lambda: reasons.append(
                console.attach(server.getsockname(), stdin=f.fileno(), stdout=out.fileno(), leave_at_eof=True)
            )
        )
        thread.start()
        with accept(server) as peer:
            assert recv_exactly(peer, 5000) == BIG[:5000]
            thread.join(TIMEOUT)
        assert reasons == [console.INPUT_ENDED]


# On a terminal: a process of its own, for its signals.

SCRIPT = """
import sys
from motorcade.orchestrator import console
{before}
reason = console.attach(sys.argv[1], {options})
sys.stderr.write(reason)
"""


class Terminal:
    """A pty with the client as a process on it. ``master`` is what a person sees and types."""

    def __init__(
        self,
        server: socket.socket,
        *,
        options: str = "",
        before: str = "",
        stdout: int | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        self.master, self.slave = os.openpty()
        self.modes = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT.format(options=options, before=before), server.getsockname()],
            stdin=self.slave,
            stdout=self.slave if stdout is None else stdout,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        )
        self.peer = accept(server)
        if stdout is None and "hint=False" not in options:
            self.hint = read_until(self.master, b"]\r\n")

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()
        self.peer.close()
        os.close(self.master)
        os.close(self.slave)

    def type(self, data: bytes) -> None:
        os.write(self.master, data)

    def wait_raw(self) -> None:
        """A byte without a newline goes through a raw terminal only."""
        self.type(b"r")
        assert recv_exactly(self.peer, 1) == b"r"

    def ended(self) -> tuple[int, str]:
        """Exit status, and the reason that the script wrote."""
        _, err = self.process.communicate(timeout=TIMEOUT)
        return self.process.returncode, err.decode()

    @property
    def restored(self) -> bool:
        return termios.tcgetattr(self.slave) == self.modes


def test_terminal_is_raw_and_the_leave_key_leaves(server: socket.socket) -> None:
    with Terminal(server) as t:
        assert t.hint == b"[attached to the console; Ctrl-] leaves]\r\n"
        typed = b"\x03\x04\x1a\x11\x13\r\n\x7f\x00\xff"
        t.type(typed)
        assert recv_exactly(t.peer, len(typed)) == typed
        t.peer.sendall(b"a\nb")
        assert read_exactly(t.master, 3) == b"a\nb"
        assert not t.restored
        t.type(b"bye\x1dnot this")
        assert t.ended() == (0, console.LEFT)
        assert t.restored
        assert recv_exactly(t.peer, 3) == b"bye"
        assert t.peer.recv(1) == b""


def test_vm_ends(server: socket.socket) -> None:
    with Terminal(server) as t:
        t.peer.sendall(b"Power down\r\n")
        t.peer.close()
        assert t.ended() == (0, console.CLOSED)
        assert t.restored
        assert read_until(t.master, b"\x1b[m").startswith(b"Power down\r\n")


def test_leave_key_of_ones_own(server: socket.socket) -> None:
    with Terminal(server, options="leave_key='^A'") as t:
        assert b"Ctrl-A leaves" in t.hint
        t.type(b"\x1d")
        assert recv_exactly(t.peer, 1) == b"\x1d"
        t.type(b"\x01")
        assert t.ended() == (0, console.LEFT)


def test_leave_key_by_the_environment(server: socket.socket) -> None:
    with Terminal(server, env={console.LEAVE_KEY_VARIABLE: "none"}) as t:
        assert b"no leave key" in t.hint
        t.type(b"\x1d")
        assert recv_exactly(t.peer, 1) == b"\x1d"
        t.peer.close()
        assert t.ended() == (0, console.CLOSED)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_signals_restore_the_terminal_and_still_kill(server: socket.socket, number: signal.Signals) -> None:
    with Terminal(server) as t:
        t.wait_raw()
        t.process.send_signal(number)
        status, _ = t.ended()
        assert status == -number
        assert t.restored


def test_sigint_restores_the_terminal_and_is_a_keyboard_interrupt(server: socket.socket) -> None:
    with Terminal(server) as t:
        t.wait_raw()
        t.process.send_signal(signal.SIGINT)
        status, err = t.ended()
        assert status == -signal.SIGINT
        assert "KeyboardInterrupt" in err
        assert t.restored


def test_handler_of_the_caller_is_called_and_what_it_raises_restores_the_terminal(server: socket.socket) -> None:
    before = "import signal\ndef h(*_): raise SystemExit(7)\nsignal.signal(signal.SIGTERM, h)"
    with Terminal(server, before=before) as t:
        t.wait_raw()
        t.process.send_signal(signal.SIGTERM)
        assert t.ended()[0] == 7
        assert t.restored


def test_stopped_and_continued(server: socket.socket) -> None:
    with Terminal(server) as t:
        t.wait_raw()
        t.process.send_signal(signal.SIGTSTP)
        pid, status = os.waitpid(t.process.pid, os.WUNTRACED)
        assert (pid, os.WIFSTOPPED(status)) == (t.process.pid, True)
        assert t.restored
        t.process.send_signal(signal.SIGCONT)
        t.wait_raw()
        assert not t.restored
        t.type(b"\x1d")
        assert t.ended() == (0, console.LEFT)
        assert t.restored


def test_window_changes_change_nothing(server: socket.socket) -> None:
    with Terminal(server) as t:
        t.wait_raw()
        for _ in range(5):
            t.process.send_signal(signal.SIGWINCH)
        t.wait_raw()
        t.type(b"\x1d")
        assert t.ended() == (0, console.LEFT)


def test_leave_key_while_nobody_reads_the_output(server: socket.socket) -> None:
    """``vmmctl console | less``, and less waits: the output is stuck, the key must still work."""
    read, write = os.pipe()
    with Terminal(server, stdout=write) as t:
        t.peer.setblocking(False)
        sent = 0
        while True:
            # Until pipe, client and socket are full, which a stop in the middle cannot be told from; the client takes
            # more only while the pipe takes it.
            try:
                sent += t.peer.send(BIG)
            except BlockingIOError:
                if select.select([], [t.peer], [], 0.5)[1]:
                    continue
                break
        assert sent > 65536
        t.type(b"\x1d")
        assert t.ended() == (0, console.LEFT)
        assert t.restored
    os.close(read)
    os.close(write)


def test_leave_key_while_the_guest_takes_no_input(server: socket.socket) -> None:
    with Terminal(server) as t:
        t.wait_raw()
        os.set_blocking(t.master, False)
        left = 4 << 20
        # The client keeps what is typed up to a bound, then rings the bell, and reads on all the same.
        while left > 0:
            if select.select([t.master], [], [], 0)[0]:
                os.read(t.master, 4096)
            if not select.select([], [t.master], [], TIMEOUT)[1]:
                raise TimeoutError("the client stopped reading its terminal")
            with contextlib.suppress(BlockingIOError):
                left -= os.write(t.master, b"x" * min(4096, left))
        while True:
            with contextlib.suppress(BlockingIOError):
                os.write(t.master, b"\x1d")
                break
            select.select([], [t.master], [], TIMEOUT)
        drain = threading.Thread(target=_drain, args=(t.master, t.process))
        drain.start()
        assert t.ended() == (0, console.LEFT)
        drain.join(TIMEOUT)
        assert t.restored


def _drain(fd: int, process: subprocess.Popen[bytes]) -> None:
    """The person's screen goes on showing what comes, until the client has ended."""
    while process.poll() is None:
        if select.select([fd], [], [], 0.05)[0]:
            with contextlib.suppress(BlockingIOError):
                os.read(fd, 65536)


def test_terminal_that_hangs_up(server: socket.socket) -> None:
    """Without a controlling terminal there is no SIGHUP: reading says it."""
    with Terminal(server) as t:
        t.wait_raw()
        os.close(t.slave)
        os.close(t.master)
        t.master, t.slave = os.openpty()  # for __exit__
        assert t.ended() == (0, console.LEFT)


def test_raw_terminal_stays_raw_for_a_caller_who_had_it_so(server: socket.socket) -> None:
    with Terminal(server, before="import tty; tty.setraw(0)") as t:
        t.wait_raw()
        t.type(b"\x1d")
        assert t.ended() == (0, console.LEFT)
        expected = list(t.modes)
        other_master, other = os.openpty()
        tty.setraw(other)
        expected = termios.tcgetattr(other)
        os.close(other)
        os.close(other_master)
        assert termios.tcgetattr(t.slave)[:4] == expected[:4]


def test_import_is_light() -> None:
    """`vmmctl console` should be there at once: none of the heavy imports."""
    code = "import sys, motorcade.orchestrator.console; print(*sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert not {"asyncio", "zmq", "capnp", "msgspec", "yaml", "psutil", "subprocess"} & set(done.stdout.split())
