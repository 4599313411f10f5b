"""pycapnp without asyncio: what a VM's start waits for, and that nobody else is hurt by it."""

from __future__ import annotations

import subprocess
import sys


def run(code: str) -> str:
    """In a fresh interpreter, since this one has everything imported."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=True, stdout=subprocess.PIPE, text=True, timeout=60
    ).stdout


def test_a_vm_s_processes_do_without_asyncio_and_openssl() -> None:
    code = "import sys\nfrom motorcade.orchestrator import daemon\ndaemon.preload()\n"
    assert run(code + "print(sorted({'asyncio', 'ssl', 'zmq.asyncio', 'capnp'} & set(sys.modules)))") == "['capnp']\n"


def test_asyncio_is_the_real_one_afterwards() -> None:
    code = """
from motorcade.proto import schema
import asyncio
async def answer():
    await asyncio.sleep(0)
    return 42
print(asyncio.run(answer()), schema.decode_life(schema.encode_life(schema.Failed("x"))).reason)
"""
    assert run(code) == "42 x\n"


def test_the_stand_in_gives_way_when_more_of_asyncio_is_wanted() -> None:
    code = """
import sys
from motorcade.proto import capnplib
stand_in = sys.modules["asyncio"] = capnplib._Asyncio("asyncio")
assert stand_in.BufferedProtocol is capnplib._Protocol
loop = stand_in.new_event_loop
import asyncio
print(asyncio is not stand_in, loop is asyncio.new_event_loop)
"""
    assert run(code) == "True True\n"
