"""Where the supervisor opens a device of the kit (sdk.Place), and the program that such a device may bring with it."""

from __future__ import annotations

import os
import select
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from pathlib import Path

    from motorcade.orchestrator.rundir import RunDir

_MOST_STARTS, _PERIOD = 5, 60.0  # starts of one program in so many seconds
# Labels that every sidecar has (docs/internals.md).
_TAKEN = frozenset({"memory", "dirty", "isr", "log", "watch", "run", "inflight", "userfaultfd", "control", "state"})
_TAKEN_PREFIXES = ("kick.", "call.")
WORDS = 400  # bytes of a log's end that a message has room for


class KitPlace:
    """Of one device. ``on_helper`` takes the role and pid of a program: a child of this process, the supervisor's to
    watch and to end, in good order (``gentle``)."""

    def __init__(self, device: str, run: RunDir, on_helper: Callable[..., None]) -> None:
        self.device, self._run, self._on_helper = device, run, on_helper
        self.directory: Path = run.path
        self._pidfd = -1
        self._starts: deque[float] = deque(maxlen=_MOST_STARTS)

    @property
    def role(self) -> str:
        """Of the program."""
        return f"backend-{self.device}"

    @property
    def running(self) -> bool:
        """See sdk.Place, as below."""
        return self._pidfd >= 0 and not self.wait_end(0)

    def wait_end(self, seconds: float) -> bool:
        return bool(select.select([self._pidfd], [], [], seconds)[0])

    def start(self, argv: Sequence[str], keep: Sequence[int] = ()) -> None:
        now = time.monotonic()
        if len(self._starts) == _MOST_STARTS and now - self._starts[0] < _PERIOD:
            raise OSError(0, f"{argv[0]} was started {_MOST_STARTS} times in {_PERIOD:g} s, and ends each time")
        self._starts.append(now)
        self.close()
        log_fd = self._run.open_log(self.role)
        try:
            pid = _spawn(argv, keep, log_fd)
        finally:
            os.close(log_fd)
        self._pidfd = os.pidfd_open(pid)
        self._on_helper(self.role, pid, gentle=True)

    def close(self) -> None:
        """Lets go of the program, which is the supervisor's."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def check_labels(opened: Mapping[str, int]) -> None:
    """ValueError for what a kind may not open under this name, or is no descriptor."""
    for label, fd in opened.items():
        if not isinstance(label, str) or not label or label in _TAKEN or label.startswith(_TAKEN_PREFIXES):
            raise ValueError(f"its open() gives a descriptor the name {label!r}, which is the kit's own")
        if not isinstance(fd, int) or fd < 0:
            raise ValueError(f"its open() gives {fd!r} as the descriptor '{label}'")


@dataclass
class Connection:
    """What a kind that ``connects`` has opened: each process of the device gets its own. Owns the descriptors."""

    place: KitPlace
    connect: Callable[[], Mapping[str, int]]
    fds: dict[str, int] = field(default_factory=dict)
    handed: bool = False

    def hand_over(self) -> dict[str, int]:
        """For a process that is about to start; ``let_go`` when it has them. Errors: OSError."""
        if self.handed:
            self.let_go()
        if not self.fds:
            self.fds = dict(self.connect())
        self.handed = True
        return self.fds

    def let_go(self) -> None:
        """Closes our copies, so that the other side sees the process's end."""
        for fd in self.fds.values():
            os.close(fd)
        self.fds, self.handed = {}, False

    def close(self) -> None:
        """Lets go of all."""
        self.let_go()
        self.place.close()


def last_words(run: RunDir, role: str) -> str:
    """The last line that a program wrote, as an addition to a message; empty where it wrote none."""
    try:
        with open(run.path / "log" / f"{role}.log", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - WORDS))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    said = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f" ({role} said: {said})" if said else ""


def _spawn(argv: Sequence[str], keep: Sequence[int], log_fd: int) -> int:
    """Starts a program that ends with this process, whatever becomes of that. Returns its pid. Errors: OSError.

    Forked by hand: posix_spawn cannot set PR_SET_PDEATHSIG, and this process has one thread."""
    path = shutil.which(argv[0])
    if path is None:
        raise FileNotFoundError(2, f"{argv[0]}: there is no such program")
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    failed, theirs = os.pipe2(os.O_CLOEXEC)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        _exec(path, argv, keep, {0: null, 1: log_fd, 2: log_fd}, theirs, parent)
    os.close(null)
    os.close(theirs)
    error = os.read(failed, 16)  # the end of file when it has become the program
    os.close(failed)
    if error:
        os.waitpid(pid, 0)
        raise OSError(int(error), f"{path}: {os.strerror(int(error))}")
    return pid


def _exec(
    path: str, argv: Sequence[str], keep: Sequence[int], standard: Mapping[int, int], failed: int, parent: int
) -> NoReturn:
    try:
        from motorcade.orchestrator.spawn import default_signals, die_with

        die_with(parent, signal.SIGTERM)
        default_signals()
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.setsid()  # the terminal's Ctrl-C is vmmctl's business
        for fd in keep:
            os.set_inheritable(fd, True)
        for number, fd in standard.items():
            os.dup2(fd, number)
        os.execv(path, list(argv))
    except OSError as e:
        os.write(failed, str(e.errno or 1).encode())
    finally:
        os._exit(127)
