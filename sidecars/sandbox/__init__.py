"""What a process gives up, in two steps: ``enter`` while it has one thread and before it knows its VM, ``close`` when
all that it needs is open. docs/sandbox.md says what is left.

Death with the parent (``PR_SET_PDEATHSIG``) is the supervisor's to set, right after the fork.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import importlib.abc
import json
import linecache
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from motorcade.sidecars.sandbox.calls import Call

log = logging.getLogger("motorcade.sandbox")

_FILES = {"core": 4096, "pager": 1024}  # RLIMIT_NOFILE
_THREADS = {"core": 512}  # RLIMIT_NPROC: as many vCPUs as a machine may have, and a few
_LATE = (
    "faulthandler",
    "motorcade.proto.boot",
    "motorcade.proto.framing",
    "motorcade.proto.messages",
    "motorcade.proto.schema",
    "motorcade.proto.versions",
    "motorcade.sidecars.log",
    "traceback",
)
_ROOM = 32  # bytes for a name in the Life message
_kept: list[Any] = []  # what C has pointers to


def enter(ffi: Any, lib: Any, role: str) -> int:
    """Namespaces, Landlock, limits, no_new_privs, no capabilities, through a kind's C extension (sandbox.h).

    Call it while the process has one thread, and ``load`` before. ``role`` as in roles.py. Returns the MC_SANDBOX_*
    that were had; what the kernel does not permit to this user is left out. Raises OSError that names the step.
    """
    limits = ffi.new("struct mc_sandbox_limits *", (_FILES.get(role, 512), _THREADS.get(role, 64), role == "net"))
    had, step = ffi.new("unsigned *"), ffi.new("char const **")
    if errno := lib.mc_sandbox_enter(limits, had, step):
        raise OSError(errno, f"sandbox: {ffi.string(step[0]).decode()}: {os.strerror(errno)}")
    return int(had[0])


def close(ffi: Any, lib: Any, role: str, name: str, link_fd: int = -1, more: Sequence[Call] = ()) -> None:
    """From here on this process, with all its threads, makes no system call that is not on its role's list, or among
    ``more``; one that does is ended, which its log and, through ``link_fd``, the supervisor are told. ``name`` stands
    in the log's lines as its role. Raises OSError that names the step."""
    from motorcade.sidecars.sandbox import calls, filters

    if lib.mc_sandbox_sanitized():
        log.warning("a build with a sanitizer: system calls are not filtered")
        return
    stay_inside()
    own = calls.OWN_PID.to_bytes(4, sys.byteorder)
    program = filters.program(role, tuple(more)).replace(own, os.getpid().to_bytes(4, sys.byteorder))
    life, at = _last_words()
    words = ffi.new("struct mc_sandbox_words *")
    names = filters.names()
    spoken = ffi.new("char[]", json.dumps(name).encode())
    message = ffi.new("char[]", life)
    words.names = ffi.from_buffer(names)
    words.count, words.width = len(names) // filters.NAME_WIDTH, filters.NAME_WIDTH
    words.role, words.life = spoken, message
    words.life_size, words.life_at, words.life_room = len(life), at, _ROOM
    words.life_fd, words.log_fd = link_fd, 2
    _kept.extend((names, spoken, message))
    step = ffi.new("char const **")
    if errno := lib.mc_sandbox_close(ffi.from_buffer(program), len(program), words, step):
        raise OSError(errno, f"sandbox: {ffi.string(step[0]).decode()}: {os.strerror(errno)}")


@functools.cache
def load(role: str, more: tuple[Call, ...] = (), modules: tuple[str, ...] = ()) -> None:
    """What a role needs when there are no files any more, for this process and its children, who have to do nothing
    then: filters, and modules that are imported late."""
    from motorcade.sidecars.sandbox import filters

    for name in (*_LATE, *modules):
        importlib.import_module(name)
    filters.names()
    filters.program(role, tuple(more))
    _last_words()
    time.strftime("%Y", time.localtime())  # reads the time zone's file


@functools.cache
def _last_words() -> tuple[bytes, int]:
    """A Life message with room for a call's name, and where that is."""
    from motorcade.proto import messages, schema

    life = schema.encode_life(messages.Failed("seccomp: " + "~" * _ROOM))
    return life.replace(b"~", b" "), life.index(b"~" * _ROOM)


def stay_inside() -> None:
    """Keeps Python from opening files by itself: source lines for tracebacks, modules."""
    linecache.updatecache = lambda filename, module_globals=None: []
    linecache.checkcache = lambda filename=None: None
    sys.meta_path.insert(0, _TooLate())
    # In C these look for the source themselves.
    sys.excepthook = lambda kind, value, trace: log.critical("the process fails", exc_info=(kind, value, trace))
    threading.excepthook = _thread_failed
    sys.unraisablehook = _unraisable
    builtins.open = _closed


def _closed(*_: Any, **__: Any) -> NoReturn:
    raise PermissionError("no file is opened any more by this process")


def _thread_failed(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None:
        log.critical("a thread fails", exc_info=(args.exc_type, args.exc_value, args.exc_traceback))


def _unraisable(args: sys.UnraisableHookArgs) -> None:
    if args.exc_value is not None:
        what = args.err_msg or "an exception that nobody can be told of"
        log.error("%s", what, exc_info=(args.exc_type, args.exc_value, args.exc_traceback))


class _TooLate(importlib.abc.MetaPathFinder):
    """Says what else would be a violation."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """See importlib.abc."""
        raise ModuleNotFoundError(f"{fullname} was not imported before the sandbox closed", name=fullname)
