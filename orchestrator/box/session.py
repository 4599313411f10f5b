"""Running a command in the box as if it ran here: directory, environment, terminal, signals, exit status.

Two ssh sessions over the box's one connection: the command's, and a leash. The leash carries signals (ssh
itself does not), and its end tells the box when this process is gone, so that a command never outlives a
killed ``vmmctl box run``.
"""

import contextlib
import os
import selectors
import shlex
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from motorcade.orchestrator.box.vm import Box, BoxError, find_box

CARRIED = ("CI", "COLUMNS", "HOME", "LANG", "LINES", "PATH", "TERM", "TZ", "USER", "VIRTUAL_ENV")
CARRIED_PREFIXES = ("LC_", "MOTORCADE_", "PYTHON", "PYTEST_", "HYPOTHESIS_")
NOT_CARRIED = ("MOTORCADE_RUN_DIR", "MOTORCADE_BOX_DIR", "PYTEST_CURRENT_TEST")
"""Places on the host, where the box has its own; and what is true of this process only."""

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)

Sink = Callable[[bytes], object]


def carried_environment(extra: Iterable[str] = ()) -> dict[str, str]:
    """The part of this process's environment that a command in the box gets.

    ``extra``: further ``NAME=VALUE``, or ``NAME`` for the value it has here. MOTORCADE_BOX=1 tells a program
    that it runs in the box.
    """
    chosen = {
        name: value
        for name, value in os.environ.items()
        if (name in CARRIED or name.startswith(CARRIED_PREFIXES)) and name not in NOT_CARRIED
    }
    for item in extra:
        name, given, value = item.partition("=")
        if given:
            chosen[name] = value
        elif name in os.environ:
            chosen[name] = os.environ[name]
    chosen["MOTORCADE_BOX"] = "1"
    return chosen


def working_tree(directory: Path) -> Path:
    """The tree that a command in ``directory`` works on: the enclosing git checkout, or the directory."""
    for candidate in [directory, *directory.parents]:
        if (candidate / ".git").exists():
            return candidate
    return directory


def fresh_trees(cwd: Path) -> list[Path]:
    """What a command in ``cwd`` must see as it is now: the tree it works on, and this program itself."""
    trees = dict.fromkeys([working_tree(Path(__file__).resolve().parents[2]), working_tree(cwd)])
    own = {Path(path) for path in ("/", "/proc", "/sys", "/dev", "/run", "/dev/shm")}  # of the box itself
    return [path for path in trees if path not in own]


def remote_command(
    run_id: str,
    argv: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    shares: Iterable[Path] = (),
    fresh: Iterable[Path] = (),
) -> str:
    """The shell command that sshd runs for ``argv`` (see enter.sh)."""
    words = ["exec", "/run/box/busybox", "unshare", "-m", "/run/box/enter", run_id, str(cwd)]
    words += [f"fresh:{path}" for path in fresh]
    words += [f"share:{path}" for path in shares]
    words += [f"{name}={value}" for name, value in env.items() if name.isidentifier()]
    return shlex.join([*words, "--", *argv])


class Leash:
    """The second session of one run: forwards signals, and lets go in order when the run is over."""

    def __init__(self, box: Box, run_id: str) -> None:
        self._process = subprocess.Popen(
            [*box.ssh, "box", f"exec /run/box/leash {run_id}"],
            stdin=subprocess.PIPE,
            start_new_session=True,
            bufsize=0,  # what a box that is gone did not take must not be in the way of close()
        )

    def signal(self, number: int) -> None:
        """Sends a signal to the run's process group in the box."""
        self._write(signal.Signals(number).name.removeprefix("SIG"))

    def release(self) -> None:
        """The command has ended by itself: what it left in the background may stay."""
        self._write("done")
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _write(self, word: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the box is gone, and the run with it
            self._process.stdin.write(f"{word}\n".encode())


def run(
    box: Box,
    argv: Sequence[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    shares: Iterable[Path] = (),
    tty: bool = False,
    stdin: int | None = None,
    out: Sink | None = None,
    err: Sink | None = None,
    forward_signals: bool = True,
) -> int:
    """Runs ``argv`` in the box and returns its exit status, 128 + N where signal N killed it.

    ``shares``: paths that the box may write on the host. All else it writes stays in the box. ``tty``: give it
    this process's terminal. ``out``, ``err``: take its output instead of this process's own. SIGINT, SIGTERM
    and so on that arrive here meanwhile go to the command (main thread only).
    Raises BoxError where the box goes away.
    """
    cwd = (cwd or Path.cwd()).resolve()
    run_id = uuid.uuid4().hex[:12]
    shares = [path.resolve() for path in shares]
    command = remote_command(
        run_id,
        argv,
        cwd=cwd,
        env=carried_environment() if env is None else env,
        shares=shares,
        fresh=[path for path in fresh_trees(cwd) if path not in shares],
    )
    if stdin is None:
        stdin = 0
    leash = Leash(box, run_id)
    pipes = None if tty else subprocess.PIPE
    relay_stdin = not tty and os.isatty(stdin)
    with contextlib.ExitStack() as stack:
        stack.callback(leash.release)
        stack.enter_context(_forwarded_signals(leash, forward_signals))
        ssh = stack.enter_context(
            subprocess.Popen(
                [*box.ssh, "-tt" if tty else "-T", "box", command],
                stdin=subprocess.PIPE if relay_stdin else stdin,
                stdout=pipes,
                stderr=pipes,
                # A Ctrl-C in a terminal goes to the whole foreground group; ssh would die of it too early.
                start_new_session=not tty,
            )
        )
        stack.callback(ssh.kill)
        if not tty:
            _pump(ssh, stdin if relay_stdin else None, out or _writer(1), err or _writer(2))
        status = ssh.wait()
    if status == 255 and find_box(box.dir) is None:
        raise BoxError("the box went away while the command ran")
    return status


def _pump(ssh: "subprocess.Popen[bytes]", stdin: int | None, out: Sink, err: Sink) -> None:
    """Copies the command's output until it ends, and ``stdin`` to it where ssh cannot read it itself.

    ssh would make our own descriptors non-blocking, and with them those of everybody who shares our
    terminal or pipe; so it gets pipes. And in a session of its own it may not read our terminal.
    """
    with selectors.DefaultSelector() as selector:
        open_outputs = 2
        for stream, sink in [(ssh.stdout, out), (ssh.stderr, err)]:
            assert stream is not None
            selector.register(stream, selectors.EVENT_READ, sink)
        if stdin is not None:
            selector.register(stdin, selectors.EVENT_READ, _Relay(selector, stdin, ssh))
        while open_outputs:
            for key, _ in selector.select():
                if isinstance(key.data, _Relay):
                    key.data.step()
                elif chunk := os.read(key.fd, 65536):
                    key.data(chunk)
                else:
                    selector.unregister(key.fileobj)
                    open_outputs -= 1


class _Relay:
    """Copies our terminal's input to ssh, never blocking on a command that does not read."""

    def __init__(self, selector: selectors.BaseSelector, source: int, ssh: "subprocess.Popen[bytes]") -> None:
        assert ssh.stdin is not None
        self._selector, self._source, self._sink = selector, source, ssh.stdin
        self._held = b""
        os.set_blocking(self._sink.fileno(), False)

    def step(self) -> None:
        """One of the two ends is ready: the source while nothing is held, the sink otherwise."""
        if not self._held:
            self._held = os.read(self._source, 65536)
            self._selector.unregister(self._source)
            if not self._held:
                self._sink.close()
                return
            self._selector.register(self._sink, selectors.EVENT_WRITE, self)
            return
        try:
            self._held = self._held[os.write(self._sink.fileno(), self._held) :]
        except BrokenPipeError:
            self._selector.unregister(self._sink)
            return
        if not self._held:
            self._selector.unregister(self._sink)
            self._selector.register(self._source, selectors.EVENT_READ, self)


def _writer(fd: int) -> Sink:
    def write(chunk: bytes) -> None:
        while chunk:
            chunk = chunk[os.write(fd, chunk) :]

    (sys.stdout if fd == 1 else sys.stderr).flush()
    return write


@contextlib.contextmanager
def _forwarded_signals(leash: Leash, forward: bool) -> Iterator[None]:
    """While inside, signals that this process gets are the command's."""
    if not forward:
        yield
        return
    before = {number: signal.signal(number, lambda number, _: leash.signal(number)) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
