"""The exposition format, and the server that gives it: read back by rules of its own; clients of every kind."""

from __future__ import annotations

import contextlib
import re
import selectors
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from motorcade.orchestrator import httpserver, metrics
from motorcade.orchestrator.httpserver import HttpServer
from motorcade.orchestrator.watchserver import listen

STATUS = {
    "name": 'a"b\\c',
    "status": "running",
    "started": 1700000000.25,
    "memory": 1 << 30,
    "cpus": 2,
    "processes": [
        {"role": "core", "up": 1, "restarts": 0, "uptime": 12.5, "cpu": 0.75, "rss": 4096, "pss": None},
        {"role": "blk-root", "up": 0, "restarts": 3},
    ],
    "queues": [
        {
            "device": "root", "index": 0, "requests": 5, "errors": 1, "bytes_in": 512, "bytes_out": 1024, "kicks": 4,
            "kicks_suppressed": 1, "interrupts": 3, "suppressed": 2, "in_flight": 1,
            "latency": [0] * 15 + [3, 1] + [0] * 22 + [1], "latency_ns": 200_000_000_000,
        }
    ],
}  # fmt: skip

SAMPLE = re.compile(r'([a-z_]+)(\{(?:[a-z]+="(?:[^"\\\n]|\\["\\n])*",?)*\})? (\S+)')


def parsed(text: str) -> dict[str, dict[str, float]]:
    """By family: samples by name and labels. Fails on what a scraper would refuse."""
    families: dict[str, dict[str, float]] = {}
    current = kind = ""
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# HELP "):
            current = line.split()[2]
            assert current not in families, "a family comes once"
            families[current] = {}
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            assert name == current
            assert kind in ("counter", "gauge", "histogram")
        else:
            match = SAMPLE.fullmatch(line)
            assert match, line
            name = match[1].removesuffix("_bucket").removesuffix("_sum") if kind == "histogram" else match[1]
            assert name in (current, current + "_count"), line
            assert match[0] not in families[current]
            families[current][match[1] + (match[2] or "")] = float(match[3])
    return families


def test_every_family_has_help_type_and_samples_that_make_sense() -> None:
    families = parsed(metrics.render(metrics.of_vm(STATUS)))
    vm = 'vm="a\\"b\\\\c"'
    assert families["motorcade_vm_up"] == {f"motorcade_vm_up{{{vm}}}": 1}
    assert families["motorcade_vm_start_time_seconds"][f"motorcade_vm_start_time_seconds{{{vm}}}"] == 1700000000.25
    restarts = families["motorcade_process_restarts_total"]
    assert restarts[f'motorcade_process_restarts_total{{{vm},role="blk-root"}}'] == 3
    assert len(families["motorcade_process_cpu_seconds_total"]) == 1  # one lives
    assert "motorcade_process_proportional_memory_bytes" not in families
    latency = families["motorcade_queue_latency_seconds"]
    labels = f'{vm},device="root",queue="0"'
    bounds = [(float(m[1]), v) for k, v in latency.items() if (m := re.search(r'le="([^"]+)"', k))]
    assert [v for _, v in bounds] == sorted(v for _, v in bounds)
    assert bounds[-1] == (float("inf"), 5)
    by_bound = dict(bounds)
    assert by_bound[(1 << 15) / 1e9] == 0
    assert by_bound[(1 << 16) / 1e9] == 3
    assert by_bound[(1 << 17) / 1e9] == 4
    assert latency[f"motorcade_queue_latency_seconds_count{{{labels}}}"] == 5
    assert latency[f"motorcade_queue_latency_seconds_sum{{{labels}}}"] == 200


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Path]:
    """A server in a thread; its socket's path."""
    selector = selectors.DefaultSelector()
    calls = iter(range(1000))
    served = HttpServer(selector, lambda: f"made {next(calls)}\n", metrics.CONTENT_TYPE)
    path = tmp_path / "metrics.sock"
    served.add(listen(path))
    stop, stopper = socket.socketpair()
    selector.register(stop, selectors.EVENT_READ, None)

    def loop() -> None:
        while True:
            due = served.due
            timeout = None if due is None else max(0.0, due - httpserver.time.monotonic())
            for key, _ in selector.select(timeout):
                if key.fd == stop.fileno():
                    return
                key.data()
            served.work()

    thread = threading.Thread(target=loop)
    thread.start()
    yield path
    stopper.close()
    thread.join()
    served.close()
    stop.close()


def connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    sock.connect(str(path))
    return sock


def everything(sock: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while more := sock.recv(65536):
            data += more
    sock.close()
    return data


def ask(path: Path, request: bytes) -> bytes:
    sock = connect(path)
    sock.sendall(request)
    return everything(sock)


def test_a_scrape(server: Path) -> None:
    head, _, body = ask(server, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4")
    assert b"Content-Length: 7" in head
    assert body == b"made 0\n"
    assert ask(server, b"GET /metrics?x=1 HTTP/1.0\n\n").endswith(b"made 0\n")  # of the same second
    assert ask(server, b"HEAD /metrics HTTP/1.1\r\n\r\n").endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", b"404"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", b"405"),
        (b"\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x00\xa5\x01\n\n", b"400"),
        (b"GET /metrics HTTP/1.1\r\n" + b"X: y\r\n" * 2000, b"431"),
    ],
)
def test_what_is_no_scrape(server: Path, request_: bytes, status: bytes) -> None:
    assert ask(server, request_).startswith(b"HTTP/1.1 " + status)


def test_clients_that_say_nothing_hold_up_nobody_and_are_hung_up_on(
    server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(httpserver, "SECONDS", 0.2)
    slow = [connect(server) for _ in range(3)]
    slow[0].sendall(b"GET /met")
    assert ask(server, b"GET /metrics HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 200")
    assert [everything(sock) for sock in slow] == [b"", b"", b""]


def test_too_many_clients_push_out_the_oldest(server: Path) -> None:
    crowd = [connect(server) for _ in range(httpserver.MAX_CLIENTS)]
    assert ask(server, b"GET /metrics HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 200")
    assert everything(crowd[0]) == b""
    crowd[1].sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
    assert everything(crowd[1]).startswith(b"HTTP/1.1 200")
    for sock in crowd[2:]:
        sock.close()
    assert ask(server, b"GET /metrics HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 200")
