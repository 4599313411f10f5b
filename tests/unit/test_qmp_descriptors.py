"""getfd and closefd over real sockets: whose descriptors are whose, and when they are closed."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.qmp import QmpClient, QmpHost, qmp_host
from motorcade.core.qmp.descriptors import MAX_NAMED


@pytest.fixture
def host(tmp_path: Path) -> Iterator[QmpHost]:
    with qmp_host(tmp_path / "qmp.sock") as host:
        yield host


@pytest.fixture
def client(host: QmpHost) -> Iterator[QmpClient]:
    with host.connect() as client:
        yield client


class Pipe:
    """Its writing end is for the server; the reading end shows when nobody has that any more."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe2(os.O_CLOEXEC)

    def __enter__(self) -> Pipe:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.reader)
        if self.writer >= 0:
            os.close(self.writer)

    def give(self, client: QmpClient, data: bytes) -> None:
        """Sends it beside ``data``, and keeps no copy."""
        socket.send_fds(client.sock, [data], [self.writer])
        os.close(self.writer)
        self.writer = -1

    def is_open(self) -> bool:
        """Whether the server has it. (It closes before it answers.)"""
        os.set_blocking(self.reader, False)
        try:
            return os.read(self.reader, 1) != b""
        except BlockingIOError:
            return True


def getfd(name: str) -> bytes:
    return json.dumps({"execute": "getfd", "arguments": {"fdname": name}}).encode()


def desc(answer: Any) -> str:
    return str(answer["error"]["desc"])


def test_a_descriptor_gets_its_name_and_is_closed_by_it(client: QmpClient) -> None:
    with Pipe() as pipe:
        pipe.give(client, getfd("state"))
        assert client.read() == {"return": {}}
        assert pipe.is_open()
        assert client.ask("closefd", fdname="state") == {"return": {}}
        assert not pipe.is_open()
    assert desc(client.ask("closefd", fdname="state")) == "File descriptor named 'state' not found"


def test_getfd_without_a_descriptor_is_an_error(host: QmpHost, client: QmpClient) -> None:
    assert desc(client.ask("getfd", fdname="state")) == "No file descriptor supplied via SCM_RIGHTS"
    with QmpClient(host.tcp) as tcp:
        tcp.read()
        assert desc(tcp.ask("getfd", fdname="state")) == "No file descriptor supplied via SCM_RIGHTS"


@pytest.mark.parametrize("name", ["", "7", "7up", "x" * 256])
def test_names_that_are_none(client: QmpClient, name: str) -> None:
    with Pipe() as pipe:
        pipe.give(client, getfd(name))
        assert "'fdname'" in desc(client.read())
        assert client.ask("query-name")["return"]
        assert not pipe.is_open()


def test_the_same_name_again_takes_the_place_of_the_first(client: QmpClient) -> None:
    with Pipe() as first, Pipe() as second:
        first.give(client, getfd("a"))
        assert client.read() == {"return": {}}
        second.give(client, getfd("a"))
        assert client.read() == {"return": {}}
        assert not first.is_open()
        assert second.is_open()


def test_pipelined_and_split_requests_get_their_own(client: QmpClient) -> None:
    with Pipe() as a, Pipe() as b, Pipe() as c:
        half = getfd("c")
        a.give(client, getfd("a") + b'{"execute":"query-name"}')
        b.give(client, getfd("b"))
        c.give(client, half[:10])
        client.send(half[10:])
        assert [set(client.read()) for _ in range(4)] == [{"return"}] * 4
        for name, pipe in (("a", a), ("b", b), ("c", c)):
            assert pipe.is_open()
            client.ask("closefd", fdname=name)
            assert not pipe.is_open()


def test_several_descriptors_with_one_message_are_taken_in_order(client: QmpClient) -> None:
    with Pipe() as a, Pipe() as b:
        socket.send_fds(client.sock, [getfd("a") + getfd("b")], [a.writer, b.writer])
        for pipe in (a, b):
            os.close(pipe.writer)
            pipe.writer = -1
        assert [client.read(), client.read()] == [{"return": {}}] * 2
        client.ask("closefd", fdname="a")
        assert (a.is_open(), b.is_open()) == (False, True)


def test_a_descriptor_that_came_with_another_request_is_closed(client: QmpClient) -> None:
    with Pipe() as pipe:
        pipe.give(client, b'{"execute":"query-name"}')
        client.read()
        assert desc(client.ask("getfd", fdname="late")) == "No file descriptor supplied via SCM_RIGHTS"
        assert not pipe.is_open()


def test_a_descriptor_beside_white_space_is_for_the_next_request(client: QmpClient) -> None:
    """As qemu.qmp's send_fd_scm sends it."""
    with Pipe() as pipe:
        pipe.give(client, b" ")
        assert client.ask("getfd", fdname="spaced") == {"return": {}}
        assert pipe.is_open()
        client.ask("closefd", fdname="spaced")
        assert not pipe.is_open()
    with Pipe() as pipe:
        pipe.give(client, b" ")
        client.ask("query-name")
        assert desc(client.ask("getfd", fdname="late")) == "No file descriptor supplied via SCM_RIGHTS"
        assert not pipe.is_open()


def test_what_has_a_name_outlives_its_client_and_ends_with_the_vm(tmp_path: Path) -> None:
    with Pipe() as named, Pipe() as nameless:
        with qmp_host(tmp_path / "qmp.sock") as host:
            with host.connect() as client:
                named.give(client, getfd("mine"))
                assert client.read() == {"return": {}}
                nameless.give(client, b'{"execute":')
            with host.connect() as other:
                while nameless.is_open():  # until the server has seen that the first has gone
                    other.ask("query-name")
                assert named.is_open()
                with Pipe() as again:
                    again.give(other, getfd("yours"))
                    assert other.read() == {"return": {}}
        assert not named.is_open()


def test_there_is_a_bound_on_names(client: QmpClient) -> None:
    for n in range(MAX_NAMED):
        with Pipe() as pipe:
            pipe.give(client, getfd(f"n{n}"))
            assert client.read() == {"return": {}}
    with Pipe() as one_more:
        one_more.give(client, getfd("more"))
        assert desc(client.read()) == f"There are {MAX_NAMED} named file descriptors already; closefd makes room"
        client.ask("query-name")
        assert not one_more.is_open()
    with Pipe() as replacing:
        replacing.give(client, getfd("n0"))
        assert client.read() == {"return": {}}
