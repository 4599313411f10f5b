"""Where the box keeps what it builds and what it runs.

Two places: a **cache** (kernels, initrds, images: safe to delete, rebuilt on demand) and the **state
directory** of one running box (keys, logs, sockets: gone when the box is).
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


def cache_dir() -> Path:
    """The cache: ``$MOTORCADE_CACHE_DIR``, a checkout's own ``.cache``, or ``~/.cache/motorcade``."""
    if configured := os.environ.get("MOTORCADE_CACHE_DIR"):
        return Path(configured)
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "pyproject.toml").is_file() and (checkout / "orchestrator").is_dir():
        return checkout / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "motorcade"


def state_dir() -> Path:
    """The state directory of this user's one box on this host: ``$MOTORCADE_BOX_DIR``, or among the VMs'.

    The name starts with a dot because a virtual machine's name cannot, so that the two never collide.
    """
    if configured := os.environ.get("MOTORCADE_BOX_DIR"):
        return Path(configured).absolute()
    if configured := os.environ.get("MOTORCADE_RUN_DIR"):
        base = Path(configured).absolute()
    elif os.geteuid() == 0:
        base = Path("/run/motorcade")
    else:
        base = Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}") / "motorcade"
    return base / ".box"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive flock on ``path`` (created, and never removed: removing it would let two in)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
