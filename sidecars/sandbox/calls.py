"""What a line of an allow-list says: a system call, what its arguments must be, and why the role needs it.

Values are given by their names in the kernel's headers, or as numbers; native/syscalls.cdef.h has the names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

OWN_PID = 0x5E1F_C0DE  # stands for the pid of the process, which puts its own in when it installs the filter
Value: TypeAlias = str | int


@dataclass(frozen=True)
class Is:
    """Argument ``index`` (from 0) is one of ``values``, in its lower 32 bits: all that an int or a flag has."""

    index: int
    values: tuple[Value, ...]

    def __str__(self) -> str:
        return f"{_ARGUMENTS[self.index]} is {' or '.join(_shown(v) for v in self.values)}"


@dataclass(frozen=True)
class IsNot:
    """Argument ``index`` is anything but ``value``."""

    index: int
    value: Value

    def __str__(self) -> str:
        return f"{_ARGUMENTS[self.index]} is not {_shown(self.value)}"


@dataclass(frozen=True)
class Null:
    """Argument ``index`` is 0, all of its 64 bits."""

    index: int

    def __str__(self) -> str:
        return f"{_ARGUMENTS[self.index]} is 0"


@dataclass(frozen=True)
class Has:
    """All of these bits are set."""

    index: int
    bits: tuple[Value, ...]

    def __str__(self) -> str:
        return f"{_ARGUMENTS[self.index]} has {' and '.join(_shown(v) for v in self.bits)}"


@dataclass(frozen=True)
class Lacks:
    """None of these bits is set."""

    index: int
    bits: tuple[Value, ...]

    def __str__(self) -> str:
        return f"{_ARGUMENTS[self.index]} lacks {' and '.join(_shown(v) for v in self.bits)}"


Condition: TypeAlias = Is | IsNot | Null | Has | Lacks


@dataclass(frozen=True)
class Call:
    """One system call that is let through where all of ``where`` hold; ``fails``: it is not, but gets that errno
    instead of ending the process. A call that this kernel or libseccomp does not know yet is passed over."""

    name: str
    why: str
    where: tuple[Condition, ...] = ()
    fails: int = 0

    def __str__(self) -> str:
        where = f" where {' and '.join(str(c) for c in self.where)}" if self.where else ""
        return f"{self.name}{where}" + (f" (fails, errno {self.fails})" if self.fails else "")


def allow(why: str, *names: str) -> tuple[Call, ...]:
    """Calls with one reason and no conditions."""
    return tuple(Call(name, why) for name in names)


_ARGUMENTS = ["the first argument", *[f"the {n} argument" for n in ("second", "third", "fourth", "fifth", "sixth")]]


def _shown(value: Value) -> str:
    if value == OWN_PID:
        return "its own pid"
    return value if isinstance(value, str) else hex(value)
