"""The console client and the real serial sidecar together."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.console import read_exactly, uart_sidecar
from motorcade.orchestrator import console


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose path leaves room for a socket's name (107 bytes)."""
    path = Path(tempfile.mkdtemp(prefix="mc-"))
    yield path
    shutil.rmtree(path)


def test_script_sees_the_boot_types_and_ends_with_the_vm(short: Path) -> None:
    read_in, write_in = os.pipe()
    read_out, write_out = os.pipe()
    reasons: list[str] = []
    with uart_sidecar(short) as (sidecar, ring):
        ring.print(b"boot\r\nlogin: ")
        thread = threading.Thread(
            target=lambda: reasons.append(console.attach(sidecar.console_path, stdin=read_in, stdout=write_out))
        )
        thread.start()
        assert read_exactly(read_out, 13) == b"boot\r\nlogin: "
        os.write(write_in, b"root\n")
        os.close(write_in)
        assert ring.read(5) == b"root\n"
        ring.print(b"# ")
        assert read_exactly(read_out, 2) == b"# "
        assert ring.put(b"Power down\r\n") == 12
        assert sidecar.shutdown() == 0
        thread.join(20)
        assert reasons == [console.CLOSED]
        assert read_exactly(read_out, 12) == b"Power down\r\n"
    for fd in (read_in, read_out, write_out):
        os.close(fd)


def test_input_sent_before_leaving_is_not_lost(short: Path) -> None:
    """``echo ... | vmmctl console``, leaving at the end of the input, to a guest that is slow to read."""
    data = b"".join(b"%07d\n" % i for i in range(4096))
    (short / "in").write_bytes(data)
    with uart_sidecar(short) as (sidecar, ring), open(short / "in", "rb") as f, open(short / "out", "wb") as out:
        reason = console.attach(sidecar.console_path, stdin=f.fileno(), stdout=out.fileno(), leave_at_eof=True)
        assert reason == console.INPUT_ENDED
        assert ring.read(len(data)) == data
