"""Boot and Life over the SEQPACKET pair: hundreds of descriptors, and every way for one to go wrong."""

from __future__ import annotations

import array
import os
import resource
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from motorcade.proto import boot, schema
from motorcade.proto.boot import BootError
from motorcade.proto.memory import Region
from motorcade.proto.schema import Boot, CoreBoot, Malformed, Slot

BOOT = Boot(1, "vm", "/run/x/core.sock", (Region(0, 4096, 0),), "INFO", CoreBoot("u", 2, "console=ttyS0", ()))


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    a, b = boot.socketpair()
    with a, b:
        a.settimeout(20)
        b.settimeout(20)
        yield a, b


@pytest.fixture
def many_fds() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def open_fds() -> set[str]:
    return {fd.name for fd in Path("/proc/self/fd").iterdir()}


def send(sock: socket.socket, packet: bytes, fds: list[int]) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([packet], rights)


def header(length: int, count: int, number: int = 0) -> bytes:
    return boot._HEADER.pack(boot._MAGIC, length, count, number)


@pytest.mark.usefixtures("many_fds")
@pytest.mark.parametrize("count", [0, 1, 249, 250, 251, 700])
def test_descriptors_arrive_under_their_labels(pair: tuple[socket.socket, socket.socket], count: int) -> None:
    sent = {f"kick.disk0.{n}": os.eventfd(n) for n in range(count)}
    try:
        sender = threading.Thread(target=boot.send_boot, args=(pair[0], BOOT, sent))
        sender.start()
        got, fds = boot.recv_boot(pair[1])
        sender.join()
        try:
            assert got.fd_labels == tuple(sent)
            assert list(fds) == list(sent)
            assert not any(os.get_inheritable(fd) for fd in fds.values())
            assert [os.eventfd_read(fd) for fd in list(fds.values())[1:]] == list(range(1, count))
        finally:
            for fd in fds.values():
                os.close(fd)
    finally:
        for fd in sent.values():
            os.close(fd)


def test_a_boot_longer_than_a_packet_arrives(pair: tuple[socket.socket, socket.socket]) -> None:
    devices = tuple(Slot(f"disk{n}", "blk", n, 1, 100 + n, "{" + " " * 16000 + "}") for n in range(48))
    long = Boot(1, "vm", "/run/x", (), "INFO", CoreBoot("u", 1, "", devices))
    sender = threading.Thread(target=boot.send_boot, args=(pair[0], long, {}))
    sender.start()
    got, fds = boot.recv_boot(pair[1])
    sender.join()
    assert got == long
    assert not fds


def test_a_process_that_does_not_read_is_an_error_and_not_a_wait(pair: tuple[socket.socket, socket.socket]) -> None:
    devices = tuple(Slot(f"disk{n}", "blk", n, 1, 100 + n, "{" + " " * 16000 + "}") for n in range(48))
    with pytest.raises(BootError, match="did not read"):
        boot.send_boot(pair[0], Boot(1, "vm", "/", (), "INFO", CoreBoot("u", 1, "", devices)), {}, timeout=0.05)


def test_a_process_that_is_gone_is_an_error(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[1].close()
    with pytest.raises(BootError, match="could not be sent"):
        boot.send_boot(pair[0], BOOT, {})


DATA = schema.encode_boot(Boot(1, "vm", "/x", (), "INFO", CoreBoot("u", 1, "", ()), ("memory", "log")))
TWICE = schema.encode_boot(Boot(1, "vm", "/x", (), "INFO", CoreBoot("u", 1, "", ()), ("log", "log")))


@pytest.mark.parametrize(
    ("packets", "message"),
    [
        ([], "went away"),
        ([(b"short", 1)], "shorter than a header"),
        ([(b"\0" * 40, 1)], "bad header"),
        ([(header(len(DATA), 2, 1) + DATA, 2)], "bad header"),
        ([(header(schema.MAX_BOOT_BYTES + 8, 2) + DATA, 2)], "bad header"),
        ([(header(len(DATA), 2) + DATA, 1)], "went away"),
        ([(header(len(DATA), 1) + DATA, 1)], "1 descriptors arrived for 2 labels"),
        ([(header(len(DATA), 3) + DATA, 3)], "3 descriptors arrived for 2 labels"),
        ([(header(len(DATA), 1) + DATA, 2)], "were said"),
        ([(header(8, 2) + DATA, 2)], "were said"),
        ([(header(len(TWICE), 2) + TWICE, 2)], "same label"),
        ([(header(64, 2) + b"\xaa" * 64, 2)], "not a Boot"),
        ([(header(len(DATA) + 8, 2) + DATA, 2), (header(len(DATA), 2, 1) + bytes(8), 0)], "disagree"),
        ([(header(len(DATA) + 8, 2) + DATA, 2), (header(len(DATA) + 8, 2, 1), 0)], "is empty"),
        ([(header(len(DATA), 251) + DATA, 251)], "truncated"),
    ],
)
def test_what_is_no_boot_is_refused_and_nothing_stays_open(
    pair: tuple[socket.socket, socket.socket], packets: list[tuple[bytes, int]], message: str
) -> None:
    fd = os.eventfd(0)
    for packet, count in packets:
        send(pair[0], packet, [fd] * count)
    pair[0].shutdown(socket.SHUT_WR)
    before = open_fds()
    with pytest.raises(BootError, match=message):
        boot.recv_boot(pair[1])
    assert open_fds() == before
    os.close(fd)


def test_too_few_free_descriptors_is_an_error_and_nothing_stays_open(pair: tuple[socket.socket, socket.socket]) -> None:
    fd = os.eventfd(0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    send(pair[0], header(len(DATA), 2) + DATA, [fd] * 2)
    before = open_fds()
    highest = max(int(n) for n in before)
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))
    spare = []
    try:
        while True:  # fill the holes, so that not one more fits
            spare.append(os.dup(fd))
    except OSError:
        try:
            with pytest.raises(BootError, match="truncated"):
                boot.recv_boot(pair[1])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for one in spare:
                os.close(one)
    assert open_fds() == before
    os.close(fd)


def test_life_goes_both_ways_until_one_side_is_gone(pair: tuple[socket.socket, socket.socket]) -> None:
    ended = schema.Ended(0, "guest-shutdown", "détail")
    assert boot.send_life(pair[0], schema.Ready())
    assert boot.send_life(pair[0], ended)
    assert boot.recv_life(pair[1]) == schema.Ready()
    assert boot.drain_life(pair[1]) == ([ended], True)
    assert boot.drain_life(pair[1]) == ([], True)
    boot.send_life(pair[1], schema.ShutdownVm())
    pair[1].close()
    assert boot.drain_life(pair[0]) == ([schema.ShutdownVm()], False)
    assert boot.recv_life(pair[0]) is None
    assert not boot.send_life(pair[0], schema.Running())


def test_life_that_is_none_is_malformed_and_the_next_is_read(pair: tuple[socket.socket, socket.socket]) -> None:
    fd = os.eventfd(0)
    before = open_fds()
    send(pair[0], b"\xffnonsense", [fd])  # with a descriptor that nobody asked for
    with pytest.raises(Malformed):
        boot.recv_life(pair[1])
    pair[0].send(bytes(schema.MAX_LIFE_BYTES + 100))
    with pytest.raises(Malformed, match="at most"):
        boot.recv_life(pair[1])
    boot.send_life(pair[0], schema.KillSidecar("disk0"))
    assert boot.recv_life(pair[1]) == schema.KillSidecar("disk0")
    pair[1].setblocking(False)
    with pytest.raises(BlockingIOError):
        boot.recv_life(pair[1])
    assert open_fds() == before
    os.close(fd)


def test_the_socket_of_a_command_line_is_checked() -> None:
    read, write = os.pipe()
    with pytest.raises(BootError, match="not the boot socket"):
        boot.from_fd(read)
    a, b = socket.socketpair()
    with a, b, pytest.raises(BootError, match="SEQPACKET"):
        boot.from_fd(a.fileno())
    with pytest.raises(BootError, match="Bad file descriptor"):
        boot.from_fd(1 << 20)
    c, d = boot.socketpair()
    os.set_inheritable(c.fileno(), True)
    with d, boot.from_fd(c.detach()) as mine:
        assert not mine.get_inheritable()
        boot.send_life(d, schema.Running())
        assert boot.recv_life(mine) == schema.Running()
    os.close(read)
    os.close(write)
