"""Filters of system calls, made from the lists by libseccomp: once a role in the process that starts the others, whose
children install them by one system call.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterable, Iterator

from motorcade.sidecars._seccomp import ffi, lib
from motorcade.sidecars.sandbox.calls import Call, Condition, Has, Is, IsNot, Null, Value
from motorcade.sidecars.sandbox.roles import ROLES

NAME_WIDTH = 32  # bytes, of the table of names; the longest has 23
_MAX_NUMBER = 1024
_INT = (1 << 32) - 1


class FilterError(RuntimeError):
    """A list that libseccomp does not take: a mistake in it."""


@functools.cache
def program(role: str, more: tuple[Call, ...] = ()) -> bytes:
    """The filter of a role (struct sock_filter, one after the other), where calls.OWN_PID stands for the process's
    pid. Errors: FilterError; KeyError for a role that is none."""
    context = lib.seccomp_init(lib.SCMP_ACT_TRAP)
    if context == ffi.NULL:
        raise FilterError("seccomp_init")
    try:
        # Its decisions by a tree instead of a list.
        _check(lib.seccomp_attr_set(context, lib.SCMP_FLTATR_CTL_OPTIMIZE, 2), "the optimisation")
        _check(lib.seccomp_attr_set(context, lib.SCMP_FLTATR_ACT_BADARCH, lib.SCMP_ACT_KILL_PROCESS), "architectures")
        for call in dict.fromkeys((*ROLES[role], *more)):
            _add(context, call)
        memfd = os.memfd_create("seccomp", os.MFD_CLOEXEC)
        try:
            _check(lib.seccomp_export_bpf(context, memfd), "the export")
            return os.pread(memfd, os.fstat(memfd).st_size, 0)
        finally:
            os.close(memfd)
    finally:
        lib.seccomp_release(context)


@functools.cache
def names() -> bytes:
    """The table of system calls' names, by number: NAME_WIDTH bytes each, padded with NULs."""
    table = bytearray()
    for number in range(_MAX_NUMBER):
        name = lib.seccomp_syscall_resolve_num_arch(lib.SCMP_ARCH_NATIVE, number)
        if name != ffi.NULL:
            table += b"\0" * (number * NAME_WIDTH - len(table)) + ffi.string(name).ljust(NAME_WIDTH, b"\0")
            lib.free(name)
    return bytes(table)


def _add(context: object, call: Call) -> None:
    number = lib.seccomp_syscall_resolve_name(call.name.encode())
    if number < 0:
        return  # unknown to this libseccomp, or no call of this architecture
    action = lib.mc_seccomp_errno(call.fails) if call.fails else lib.SCMP_ACT_ALLOW
    for comparisons in itertools.product(*(tuple(_comparisons(c)) for c in call.where)):
        array = ffi.new("struct scmp_arg_cmp[]", list(comparisons))
        _check(lib.seccomp_rule_add_array(context, action, number, len(comparisons), array), str(call))


def _comparisons(condition: Condition) -> Iterator[tuple[int, int, int, int]]:
    """Alternatives."""
    at = condition.index
    if isinstance(condition, Is):
        for value in condition.values:
            yield at, lib.SCMP_CMP_MASKED_EQ, _INT, _number(value) & _INT
    elif isinstance(condition, IsNot):
        yield at, lib.SCMP_CMP_NE, _number(condition.value), 0
    elif isinstance(condition, Null):
        yield at, lib.SCMP_CMP_EQ, 0, 0
    else:
        bits = _bits(condition.bits)
        yield at, lib.SCMP_CMP_MASKED_EQ, bits, bits if isinstance(condition, Has) else 0


def _bits(values: Iterable[Value]) -> int:
    return functools.reduce(lambda bits, value: bits | _number(value), values, 0)


def _number(value: Value) -> int:
    return value if isinstance(value, int) else int(getattr(lib, value))


def _check(error: int, what: str) -> None:
    if error:
        raise FilterError(f"{what}: {os.strerror(-error)}")
