"""A Linux guest with the program that works and checks itself in it (harness/linuxload.py has the host's end)."""

from __future__ import annotations

import re

from harness.agent import Agent
from harness.linuxload import Console, Stream
from harness.vm import Vm

LANES = 2  # processes that work on the disk
COMPLAINTS = re.compile(r".*(?:lockup|stall|hung|Trace|error|BUG|Oops|[Cc]orrupt|unstable|backwards).*")


class Worker:
    """A guest with the work in it, and our ends of that."""

    def __init__(self, vm: Vm, address: str, port: int = 0, *, resumed: bool = False) -> None:
        self.vm = vm
        self.agent = vm.console("hvc1")
        self.stream = Stream("tcp", address, port)
        self._resumed = resumed

    def start_work(self, guest_address: str, host_address: str) -> None:
        """In a guest that was booted."""
        self.agent.wait_ready()
        self.agent.check("dmesg -c > /run/boot")
        self.agent.check(f"ip addr add {guest_address}/24 dev eth0 && ip link set eth0 up")
        self.agent.check(f"load tcp {host_address} {self.stream.port} /run/tcp > /dev/null 2>&1 &")
        for lane in range(LANES):
            self.agent.check(f"load disk /dev/vda {lane} {LANES} /run/disk{lane} > /dev/null 2>&1 &")

    def consoles(self) -> list[Console]:
        """Those on which lines come and go."""
        if self._resumed:
            return [Console(n, self.vm.attach(n), resumed=True) for n in ("ttyS0", "hvc0")]
        found = []
        for name in ("ttyS0", "hvc0"):
            agent = self.vm.console(name)
            agent.wait_ready()
            agent.send(f"load tty 100 < /dev/{name}")
            found.append(Console(name, agent.sock))
        return found

    def done(self) -> dict[str, tuple[int, int]]:
        """What each part of the work says: its rounds, and how often it had to connect again."""
        said: dict[str, tuple[int, int]] = {}
        for name in ["tcp", *(f"disk{lane}" for lane in range(LANES))]:
            text = self.agent.check(f"cat /run/{name}")
            found = re.fullmatch(r"rounds (\d+) again (\d+)", text.strip())
            assert found, f"{name}: {text}"
            said[name] = (int(found[1]), int(found[2]))
        return said


def complaints(agent: Agent) -> list[str]:
    """What the guest's kernel did not like."""
    return COMPLAINTS.findall(agent.check("dmesg"))
