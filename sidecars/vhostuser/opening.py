"""Where a device's backend is found: in the supervisor, which alone may connect, and start programs."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from motorcade.sidecars.sdk import Place
    from motorcade.sidecars.vhostuser.options import VhostUserOptions

PATIENCE = 10.0  # seconds for a program that was started to listen
_LOOK = 0.01


def open_backend(options: VhostUserOptions, place: Place, *, again: bool) -> int:
    """A connected socket, the caller's. ``again``: not waited for, and a program that has ended is started once more.

    Errors: OSError, whose text names the path.
    """
    if options.command is None:
        assert options.socket is not None
        return connect(options.socket)
    if again and place.running:
        return connect(options.socket or str(_own_socket(place)))
    path = options.socket or str(_own_socket(place))
    begin(options.command, path, place, ours=options.socket is None)
    if again and options.socket is not None:
        return connect(path)
    until = time.monotonic() + (0 if again else PATIENCE)
    while True:
        try:
            return connect(path)
        except OSError:
            # It listens when it listens: there is no event for that.
            if not place.running or time.monotonic() > until:
                raise
            place.wait_end(_LOOK)


def _own_socket(place: Place) -> Path:
    return place.directory / f"backend-{place.device}.sock"


def begin(command: list[str], path: str, place: Place, *, ours: bool) -> None:
    """Starts the program. ``ours``: the path is made here, and {fd} and {socket} stand for it. Errors: OSError."""
    if not ours:
        place.start(command)
        return
    with_fd = any("{fd}" in word for word in command)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        Path(path).unlink(missing_ok=True)
        if with_fd:
            listener.bind(path)
            listener.listen(4)  # from now on we can connect, whenever it comes to accept that
        argv = [word.replace("{fd}", str(listener.fileno())).replace("{socket}", path) for word in command]
        place.start(argv, [listener.fileno()] if with_fd else [])


def connect(path: str) -> int:
    """To who listens there, without waiting. Errors: OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        sock.connect(path)
    except OSError as e:
        sock.close()
        raise OSError(e.errno, f"no backend at {path}: {_reason(e)}") from None
    return sock.detach()


def _reason(e: OSError) -> str:
    if isinstance(e, FileNotFoundError):
        return "there is no such socket"
    if isinstance(e, ConnectionRefusedError):
        return "nobody listens there"
    if isinstance(e, BlockingIOError):
        return "too many others wait there already"
    return e.strerror or str(e)
