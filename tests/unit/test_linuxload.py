"""The checks of the work in Linux guests find what they are there to find."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator

import pytest

from harness import images
from harness.linuxload import FRESH, Console, Stream, pad, stream_bytes, working


@contextlib.contextmanager
def console(said: bytes, *, resumed: bool = False) -> Iterator[Console]:
    """A console that has said this."""
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(said)
        yield Console("console", ours, resumed=resumed)
        ours.close()


def line(n: int) -> bytes:
    return b"L %d %s\n" % (n, pad(n))


def echo(n: int) -> bytes:
    return b"E %d %s\n" % (n, pad(n))


def test_the_program_satisfies_its_checks() -> None:
    ours, theirs = socket.socketpair()
    stream = Stream("tcp", "127.0.0.1")
    program = images.load_program()
    with theirs, contextlib.ExitStack() as stack:
        for arguments in (["tty", "1"], ["tcp", "127.0.0.1", str(stream.port), "/dev/null"]):
            process = stack.enter_context(subprocess.Popen([program, *arguments], stdin=theirs, stdout=theirs))
            stack.callback(process.kill)
        parts = (Console("console", ours), stream)
        with working(*parts):
            for part in parts:
                part.wait_more(2000)


@pytest.mark.parametrize(
    "said",
    [
        line(1) + line(3),
        line(1) + line(1),
        line(2),
        line(1) + line(2)[5:],
        line(1) + line(2).replace(pad(2)[-2:], b"??"),
        line(1) + echo(2),
        line(1) + echo(1) + echo(1),
        line(1) + b"E 1 x\n",
        line(1) + b"\n",
    ],
)
def test_a_lost_doubled_or_damaged_line_is_found(said: bytes) -> None:
    with console(said) as c:
        with pytest.raises(AssertionError, match=r"expected|damaged|neither"), working(c):
            c.wait_more(3)
        assert c.failure is not None


def test_a_resumed_console_goes_on_anywhere_but_without_a_gap() -> None:
    old = line(7)[9:] + line(8) + echo(4) + b"E 5 " + pad(5)[:7] + b"\n"
    with console(old + line(9) + echo(FRESH) + echo(FRESH + 1) + line(10), resumed=True) as c, working(c):
        c.wait(lambda: (c.lines, c.echoes) == (3, 2), "lines")
    with (
        console(old + line(9) + echo(FRESH) + line(11), resumed=True) as c,
        pytest.raises(AssertionError, match="line 10 expected"),
        working(c),
    ):
        c.wait(lambda: c.lines == 3, "lines")


@pytest.mark.parametrize("at", [0, 70000])
def test_a_wrong_byte_of_a_stream_is_found(at: int) -> None:
    sent = bytearray(stream_bytes(0, 100000, 2 << 40))
    sent[at] ^= 1
    stream = Stream("tcp", "127.0.0.1")
    with (
        socket.create_connection(("127.0.0.1", stream.port)) as guest,
        pytest.raises(AssertionError, match="damaged"),
        working(stream),
    ):
        guest.sendall(sent)
        stream.wait(lambda: stream.received == len(sent), "bytes")
