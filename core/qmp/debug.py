"""Guest memory and registers for debugging: StratoVirt's look-ups, in its form (numbers are hexadecimal text)."""

from __future__ import annotations

from motorcade.core.qmp.errors import QmpError
from motorcade.core.qmp.registry import Arguments, Context, command

WORD = 4
"""Bytes that query-mem-gpa reads."""


class QueryMemGpa(Arguments, frozen=True):
    """Of query-mem-gpa. ``gpa``: guest physical, hexadecimal."""

    gpa: str


@command("query-mem-gpa", arguments=QueryMemGpa, returns=str)
def query_mem_gpa(ctx: Context, args: QueryMemGpa) -> str:
    """The 32-bit word at a guest physical address; both hexadecimal."""
    try:
        gpa = int(args.gpa, 16)
    except ValueError:
        gpa = -1
    if gpa < 0:
        raise QmpError(f"Parameter 'gpa' must be a hexadecimal number such as 13c4d1d00, and not '{args.gpa}'")
    return f"{int.from_bytes(ctx.machine.debugger.read_memory(gpa, WORD), 'little'):X}"


class QueryVcpuReg(Arguments, frozen=True):
    """Of query-vcpu-reg. ``addr``: a register's name, or an MSR's number in hexadecimal."""

    addr: str
    vcpu: int


@command("query-vcpu-reg", arguments=QueryVcpuReg, returns=str)
def query_vcpu_reg(ctx: Context, args: QueryVcpuReg) -> str:
    """A register of a vCPU, hexadecimal; the vCPUs stand still for the moment that it takes."""
    return f"{ctx.machine.debugger.register(args.vcpu, args.addr):X}"
