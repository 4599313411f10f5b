"""The balloon under Linux's own driver: memory goes back to the host, and comes again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.vm import Vm, VmHost

Machine = Callable[..., dict[str, Any]]

MIB = 1 << 20
FILL = 215  # MiB that the guest uses when it has its memory again


def guest_memory(vm: Vm) -> Path:
    """The memfd, by way of the supervisor."""
    for link in Path(f"/proc/{vm.pid}/fd").iterdir():
        if "guest-memory" in str(link.readlink()):
            return link
    raise AssertionError("the supervisor has no guest memory")


def on_host(vm: Vm) -> int:
    """Bytes that guest memory takes of the host."""
    return guest_memory(vm).stat().st_blocks * 512


def take_all(vm: Vm) -> None:
    """Has all of guest memory be there, as that of a guest that has used it all once. (It could do so itself, but a
    first touch of a page costs a millisecond in the box.)"""
    fd = os.open(guest_memory(vm), os.O_RDWR)
    try:
        os.posix_fallocate(fd, 0, os.fstat(fd).st_size)
    finally:
        os.close(fd)


def await_actual(vm: Vm, done: Callable[[int], bool], seconds: float = 150.0) -> int:
    """query-balloon, once it is as wanted."""
    end = time.monotonic() + seconds
    with vm.qmp() as qmp:
        while not done(actual := int(qmp.execute("query-balloon")["actual"])):
            assert time.monotonic() < end, f"the guest still has {actual / MIB:.0f} MiB"
            time.sleep(0.05)  # the events, of which there is one a second, are looked at below
    return actual


@pytest.mark.timeout(500)
def test_half_of_the_memory_goes_back_to_the_host_and_comes_again(linux: Machine, host: VmHost) -> None:
    began = time.monotonic()
    vm = host.start(linux(memory="512M", balloon=True))
    agent = vm.console()
    agent.wait_ready()
    print(f"ready after {time.monotonic() - began:.1f} s")
    began = time.monotonic()
    take_all(vm)
    print(f"all there after {time.monotonic() - began:.1f} s")
    with vm.qmp() as qmp:
        full = on_host(vm)
        qmp.execute("balloon", {"value": 256 * MIB})
        began = time.monotonic()
        assert await_actual(vm, lambda actual: actual <= 256 * MIB) == 256 * MIB
        took = time.monotonic() - began
        left = on_host(vm)
        print(f"the host's: {full / MIB:.0f} MiB, after {took:.1f} s {left / MIB:.0f}: {(full - left) / MIB:.0f} back")
        assert full - left >= 200 * MIB
        said = qmp.execute("x-motorcade-balloon-stats")
        print(said)
        assert said["driver"] and said["target"] == said["actual"] == 256 * MIB
        assert 0 < said["stats"]["stat-free-memory"] < said["stats"]["stat-total-memory"]
        assert abs(said["last-update"] - time.time()) < 60
        changes = [e for e in qmp.events if e["event"] == "BALLOON_CHANGED"]
        assert changes and all(e["data"]["actual"] <= 512 * MIB for e in changes)
        qmp.execute("balloon", {"value": 512 * MIB})
        began = time.monotonic()
        assert await_actual(vm, lambda actual: actual >= 512 * MIB) == 512 * MIB
        print(f"deflated after {time.monotonic() - began:.1f} s")
    # It can use it again.
    left = on_host(vm)
    began = time.monotonic()
    agent.check("mkdir -p /tmp/fill && mount -t tmpfs -o size=100% fill /tmp/fill", 100)
    agent.check(f"dd if=/dev/zero of=/tmp/fill/data bs=1M count={FILL} 2> /dev/null", 300)
    print(f"{(on_host(vm) - left) / MIB:.0f} MiB used again in {time.monotonic() - began:.1f} s")
    assert on_host(vm) - left >= 200 * MIB
