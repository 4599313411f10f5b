"""Talking to the test guest's agent (tests/guests/linux/agent.sh) over a console."""

import re
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path


class AgentError(Exception):
    """The guest did not answer in time, or the console ended; the message has what was last seen."""


@dataclass(frozen=True)
class Result:
    """What a command in the guest did."""

    status: int
    output: str
    """Standard output and error, as they came over the console."""


@dataclass
class Agent:
    """One console of a test guest, through the stream socket that ``vmmctl console`` connects to."""

    sock: socket.socket
    seen: bytearray = field(default_factory=bytearray)
    """All that the console has said so far."""
    _done: int = 0
    _commands: int = 0

    @classmethod
    def connect(cls, path: Path, timeout: float = 10.0) -> "Agent":
        """Connects to ``console-ID.sock``; its scrollback comes first, so nothing is missed."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(timeout)
        sock.connect(str(path))
        return cls(sock)

    def wait_ready(self, timeout: float = 60.0) -> str:
        """Waits for the agent to come up (again, after a reboot); returns the guest's ``uname -r``."""
        return self.expect(rb"\nagent: ready on \w+, Linux (\S+)\r?\n", timeout)[1].decode()

    def run(self, command: str, timeout: float = 60.0) -> Result:
        """Runs a shell command (one line) in the guest."""
        assert "\n" not in command, "the agent takes one line"
        self._commands += 1
        mark = b"%d-%d" % (id(self) % 9973, self._commands)
        self.sock.settimeout(timeout)
        self.sock.sendall(mark + b" " + command.encode() + b"\n")
        found = self.expect(rb"\nagent: begin " + mark + rb"\r?\n(.*?)\nagent: end " + mark + rb" (\d+)\r?\n", timeout)
        return Result(int(found[2]), found[1].decode(errors="replace").replace("\r\n", "\n").removesuffix("\r"))

    def check(self, command: str, timeout: float = 60.0) -> str:
        """Runs a command that must succeed; returns its output without surrounding blanks."""
        result = self.run(command, timeout)
        if result.status:
            raise AgentError(f"{command!r} in the guest ended with {result.status}: {result.output.strip()}")
        return result.output.strip()

    def send(self, command: str) -> None:
        """Starts a command that does not come back, such as ``reboot -f``."""
        self.sock.sendall(b"0 " + command.encode() + b"\n")

    def expect(self, pattern: bytes, timeout: float = 60.0) -> re.Match[bytes]:
        """Waits until the console has said something that matches, after what was matched before."""
        deadline = time.monotonic() + timeout
        expression = re.compile(pattern, re.DOTALL)
        while True:
            if found := expression.search(self.seen, self._done):
                self._done = found.end()
                return found
            self.sock.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                chunk = self.sock.recv(65536)
            except TimeoutError:
                raise AgentError(f"no {pattern!r} in {timeout:.0f} s; the console's end: {self._tail()}") from None
            if not chunk:
                raise AgentError(f"the console ended while waiting for {pattern!r}; its end: {self._tail()}")
            self.seen += chunk

    def close(self) -> None:
        self.sock.close()

    def _tail(self) -> str:
        return self.seen[-1500:].decode(errors="replace")
