"""The supervisor's openers of network backends, and what they say when it cannot be."""

from __future__ import annotations

import os
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.netns import NetNs
from motorcade.orchestrator import netbackend
from motorcade.orchestrator.errors import UserError
from motorcade.orchestrator.netbackend import Forward


@pytest.fixture
def ns() -> Iterator[NetNs]:
    with NetNs() as ns:
        yield ns


def refused(ns: NetNs, name: str, queues: int = 1) -> str:
    with pytest.raises(UserError) as e:
        ns.call(netbackend.open_tap, name, queues)
    return str(e.value)


@pytest.mark.root
def test_a_tap_that_does_not_exist_is_not_created(ns: NetNs) -> None:
    assert refused(ns, "nope").startswith("tap nope: there is no such interface (make it with: ip tuntap add nope")
    assert "nope" not in ns.ip("link")


@pytest.mark.root
def test_a_tap_in_use(ns: NetNs) -> None:
    ns.add_tap()
    (fd,) = ns.call(netbackend.open_tap, "t0", 1)
    assert not os.get_blocking(fd) and not os.get_inheritable(fd)
    assert refused(ns, "t0") == "tap t0: in use by another process"
    os.close(fd)
    (fd,) = ns.call(netbackend.open_tap, "t0", 1)
    os.close(fd)


@pytest.mark.root
def test_queues_as_the_tap_was_made(ns: NetNs) -> None:
    ns.add_tap("single")
    ns.add_tap("many", address="10.0.1.1/24", multi_queue=True)
    assert "made for one queue, not for 2" in refused(ns, "single", 2)
    for n in (1, 4):
        fds = ns.call(netbackend.open_tap, "many", n)
        assert len(fds) == n
        for fd in fds:
            os.close(fd)
    assert "17 queues; 1 to 16" in refused(ns, "many", 17)


@pytest.mark.root
def test_an_interface_that_is_no_tap(ns: NetNs) -> None:
    assert refused(ns, "lo") == "tap lo: an interface, but not a tap"


def as_nobody(ns: NetNs, function: Callable[[], object]) -> str:
    """The UserError that ``function`` raises in a child that is nobody."""

    def child() -> str:
        read, write = os.pipe()
        if (pid := os.fork()) == 0:
            try:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
                function()
                os.write(write, b"it worked")
            except UserError as e:
                os.write(write, str(e).encode())
            finally:
                os._exit(0)
        os.close(write)
        text = os.read(read, 4096).decode()
        os.close(read)
        os.waitpid(pid, 0)
        return text

    return ns.call(child)


@pytest.mark.root
def test_a_tap_that_belongs_to_somebody_else(ns: NetNs) -> None:
    import motorcade.sidecars._net  # noqa: F401 - nobody may be unable to read it

    ns.add_tap()
    mode = stat.S_IMODE(Path("/dev/net/tun").stat().st_mode)
    expected = "not permitted: it belongs to another user" if mode & 2 else "/dev/net/tun: permission denied"
    assert expected in as_nobody(ns, lambda: netbackend.open_tap("t0", 1))


def test_a_link_is_a_directory(tmp_path: Path) -> None:
    fd = netbackend.link(str(tmp_path / "wire"))
    assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o700 and stat.S_ISDIR(os.fstat(fd).st_mode)
    os.close(fd)
    os.close(netbackend.link(str(tmp_path / "wire")))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="exists and is not a directory"):
        netbackend.link(str(tmp_path / "file"))
    with pytest.raises(UserError, match="No such file or directory"):
        netbackend.link(str(tmp_path / "none" / "wire"))


def test_forward_rules() -> None:
    assert Forward.parse("8080:80").option == ["-t", "8080:80"]
    assert Forward.parse("tcp:8080:80").option == ["-t", "8080:80"]
    assert Forward.parse("udp:127.0.0.1:53:5353").option == ["-u", "127.0.0.1/53:5353"]
    assert Forward.parse("[::1]:8080:80").option == ["-t", "::1/8080:80"]
    for rule in ("80", "0:80", "80:65536", "sctp:1:2", "a:1:2", "1:2:3", "8080:80 ", ""):
        with pytest.raises(UserError, match="is not "):
            Forward.parse(rule)


def test_passt_that_is_not_installed() -> None:
    with pytest.raises(UserError, match="needs passt, which is not installed"):
        netbackend.spawn_passt(program="passt-of-another-name")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 3", "passt: it ended"),
        ("echo 'it is broken' >&2; exit 1", "passt: it is broken"),
        ("exec sleep 100", "passt: it does not answer"),
    ],
)
def test_passt_that_does_not_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str) -> None:
    program = tmp_path / "passt"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(netbackend, "PASST_DEADLINE", 0.3)
    pids: list[int] = []
    real = netbackend._spawn

    def spawn(path: str, argv: list[str], words: int) -> int:
        pids.append(real(path, argv, words))
        return pids[0]

    monkeypatch.setattr(netbackend, "_spawn", spawn)
    with pytest.raises(UserError, match=message):
        netbackend.spawn_passt(program=str(program))
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)  # it was ended and reaped


def test_only_the_first_answer_is_taken_off_the_stream(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(struct.pack("!I", 3) + b"abc" + struct.pack("!I", 2) + b"de")
        assert netbackend._recv_frame(ours, time.monotonic() + 5)
        assert ours.recv(100) == struct.pack("!I", 2) + b"de"
