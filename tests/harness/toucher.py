"""A process with lazily filled guest memory: it maps the memfd, registers it, and touches it as it is told.

Run as ``python -m harness.toucher SOCKET MEMFD SIZE``; ``Toucher`` is the test's end. A fault that is never answered
holds up this process, and the test sees a time-out.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from typing import Any, Self

from motorcade.proto import messages as m
from motorcade.proto.memory import PAGE, GuestMemory, layout

TIMEOUT = 60.0  # seconds


class Toucher:
    """The test's end. ``uffd`` and ``mappings`` are what the process would say in LazyReady."""

    def __init__(self, memory: int, size: int) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(TIMEOUT)
        with theirs:
            arguments = [str(theirs.fileno()), str(memory), str(size)]
            self.process = subprocess.Popen(
                [sys.executable, "-m", "harness.toucher", *arguments],
                pass_fds=[theirs.fileno(), memory],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        data, fds, _, _ = socket.recv_fds(self._socket, 4096, 1)
        assert fds, f"the toucher could not register: {data!r}"
        self.uffd = fds[0]
        self.mappings = tuple(m.Mapping(*some) for some in json.loads(data))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self, what: str, **arguments: Any) -> None:
        """Asks for something; ``finish`` waits for it."""
        self._socket.send(json.dumps({"what": what, **arguments}).encode())

    def finish(self, timeout: float = TIMEOUT) -> Any:
        """The answer. TimeoutError: it is still waiting for a page."""
        self._socket.settimeout(timeout)
        answer = self._socket.recv(1 << 18)
        assert answer, "the toucher has ended"
        return json.loads(answer)

    def ask(self, what: str, **arguments: Any) -> Any:
        """begin, finish."""
        self.begin(what, **arguments)
        return self.finish()

    def walk(self, order: str = "up", seed: int = 0) -> Any:
        """Reads a byte of every page in that order (up, down, random), then sums all of memory. ``sum``, and the ns of
        the first touches: ``p50``, ``p99`` of those that took longer than a page that is there."""
        return self.ask("walk", order=order, seed=seed)

    def digest(self, offset: int, size: int) -> str:
        """As the function, of guest memory."""
        return str(self.ask("digest", offset=offset, size=size))

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of guest memory, at most a chunk."""
        return bytes.fromhex(self.ask("read", offset=offset, size=size))

    def write(self, offset: int, data: bytes) -> None:
        """Changes guest memory."""
        self.ask("write", offset=offset, data=data.hex())

    def close(self) -> None:
        """Kills it."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(TIMEOUT)
        self._socket.close()
        os.close(self.uffd)


def digest(memory: bytes | bytearray | memoryview) -> str:
    """What ``walk`` has as ``sum``."""
    return hashlib.blake2b(memory, digest_size=16).hexdigest()


def _walk(memory: GuestMemory, order: str, seed: int) -> dict[str, Any]:
    pages = [(r.gpa, offset) for r in memory.regions for offset in range(0, r.size, PAGE)]
    if order == "down":
        pages.reverse()
    elif order == "random":
        random.Random(seed).shuffle(pages)
    views = {r.gpa: memory.view(r.gpa, r.size) for r in memory.regions}
    now, times = time.perf_counter_ns, []
    for gpa, offset in pages:
        view = views[gpa]
        before = now()
        view[offset]
        times.append(now() - before)
    total = hashlib.blake2b(digest_size=16)
    for view in views.values():
        total.update(view)
    slow = sorted(t for t in times if t > 5000)
    return {
        "sum": total.hexdigest(),
        "faults": len(slow),
        "p50": slow[len(slow) // 2] if slow else 0,
        "p99": slow[len(slow) * 99 // 100] if slow else 0,
    }


def _serve(sock: socket.socket, fd: int, size: int) -> None:
    from motorcade.core._native import ffi, lib
    from motorcade.sidecars import lazymem

    memory = GuestMemory(fd, layout(size), lazy=True)
    uffd, mappings = lazymem.register(ffi, lib, memory, {})
    socket.send_fds(sock, [json.dumps([(x.address, x.size, x.offset) for x in mappings]).encode()], [uffd])
    while data := sock.recv(65536):
        request = json.loads(data)
        what, answer = request["what"], None
        if what == "walk":
            answer = _walk(memory, request["order"], request["seed"])
        elif what == "read":
            answer = memory.read(request["offset"], request["size"]).hex()
        elif what == "digest":
            answer = digest(memory.view(request["offset"], request["size"]))
        elif what == "write":
            memory.write(request["offset"], bytes.fromhex(request["data"]))
        elif what == "kernel-read":  # the kernel faults, as in io_uring and KVM
            source = os.memfd_create("source")
            os.write(source, bytes.fromhex(request["data"]))
            with memory.view(request["offset"], len(request["data"]) // 2) as view:
                answer = os.preadv(source, [view], 0)
        elif what == "touch":  # page after page, until it is killed or all is there
            for offset in range(0, size, PAGE):
                memory.read(offset, 1)
        sock.send(json.dumps(answer).encode())


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]))
