"""A VM on bare KVM whose guest has a checksummed load on its disk (tests/guests/load.c), and whose sidecars are
killed."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from harness import microguest
from harness.vmmctl import Host, write_machine
from motorcade.core.layout import slot_gsi
from motorcade.orchestrator.qmpclient import QmpClient

TIMEOUT = 60.0
_END = re.compile(rb"load ([0-9a-f]+) bad ([0-9a-f]+) errors ([0-9a-f]+) doubled ([0-9a-f]+)\n")


@dataclass(frozen=True)
class Report:
    """What the guest has to say at the end."""

    requests: int
    bad: int  # reads that were not what the last write left
    errors: int  # requests answered with an error
    doubled: int  # answers to what was not in flight

    @property
    def clean(self) -> bool:
        """Nothing was lost, and nothing came twice."""
        return self.requests > 0 and not (self.bad or self.errors or self.doubled)


class Victim:
    """The VM ``web``, running its load. A context manager, which ends it."""

    def __init__(
        self, host: Host, folder: Path, depth: int, *, blocks: int = 1024, gap: int = 0, **machine: Any
    ) -> None:
        """``gap``: ticks of the TSC; what is longer between two completions the guest reports. ``machine``: more of
        machine.yaml; ``disks`` has its own default."""
        image = folder / "disk.img"
        image.write_bytes(bytes(blocks * 4096))
        machine = {"disks": [{"id": "root", "path": str(image)}], "restarts": 1_000_000, **machine}
        cmdline = f"irq={slot_gsi(0)} disk=0:{depth}:{blocks}:0:{gap} print=end"
        self.host = host
        self._file = write_machine(folder, "web", microguest.build(), cmdline=cmdline, **machine)
        host.vmmctl("up", "-d", str(self._file))
        self.directory = host.run_dir / "web"
        self.qmp = QmpClient(self.directory / "qmp.sock", timeout=TIMEOUT)
        self._listening: socket.socket | None = None
        self._heard = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.qmp.__exit__(kind, error, tb)
        if self._listening is not None:
            self._listening.close()
        self.host.vmmctl("down", "--force", "web", check=None)

    def freeze_and_thaw(self, template: Path) -> None:
        """It goes on as a clone that fills its memory as it is touched, with a pager."""
        self.host.vmmctl("snapshot", "web", str(template))
        self.qmp.__exit__(None, None, None)
        self.host.vmmctl("down", "--force", "web")
        self.host.vmmctl("up", "-d", "--incoming", f"file:{template}", str(self._file))
        self.qmp = QmpClient(self.directory / "qmp.sock", timeout=TIMEOUT)

    def pid(self, role: str) -> int:
        """Of its present process."""
        if role == "pager":
            return self.host.pid("web", role)
        device = role.partition("-")[2]
        return next(int(s["pid"]) for s in self.qmp.execute("x-motorcade-sidecars") if s["id"] == device)

    def wait_event(self, name: str, device: str) -> dict[str, Any]:
        """The next event of this name about this device; a device that failed is an error."""
        deadline = time.monotonic() + TIMEOUT
        while (event := self.qmp.wait_event(max(0.0, deadline - time.monotonic()))) is not None:
            if event["event"] == name and event["data"].get("id") == device:
                data: dict[str, Any] = event["data"]
                return data
            assert event["event"] != "SIDECAR_FAILED" or name == "SIDECAR_FAILED", event
        raise AssertionError(f"no {name} of {device}\n{self.log(device)}")

    def kill(self, role: str, number: int = signal.SIGKILL, *, wait: bool = True) -> float:
        """Kills a sidecar (a role such as blk-root); seconds until another serves in its place."""
        began = time.monotonic()
        while True:
            pid = self.pid(role)
            try:
                os.kill(pid, number)
                break
            except ProcessLookupError:  # an earlier kill has had its effect, and the core has not heard yet
                time.sleep(0.001)
        if role == "pager":
            self.host.wait_for("another pager", lambda: self.pid(role) != pid)
            wait = False
        while wait:
            self.wait_event("SIDECAR_RESTARTED", role.partition("-")[2])
            wait = self.pid(role) == pid  # an event of before
        return time.monotonic() - began

    def log(self, device: str) -> str:
        """The end of a sidecar's log, for messages."""
        found = [p.read_text(errors="replace")[-2000:] for p in self.directory.glob(f"log/*-{device}.log")]
        return "\n".join(found)

    def gaps(self, seconds: float) -> Sequence[int]:
        """The gaps, in ticks, that the guest has reported since the last call, and reports within ``seconds``. Only
        while its console's sidecar lives."""
        if self._listening is None:
            self._listening = self._console()
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._listening.settimeout(left)
            with contextlib.suppress(TimeoutError):
                self._heard += self._listening.recv(1 << 20).replace(b"\r", b"")
        whole, _, self._heard = self._heard.rpartition(b"\n")
        return [int(n, 16) for n in re.findall(rb"gap ([0-9a-f]+)", whole)]

    def _console(self) -> socket.socket:
        console = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        console.connect(str(self.directory / "console-ttyS0.sock"))
        return console

    def finish(self) -> Report:
        """Has the guest end its load, read everything once more, and report. Its console's sidecar may have to be
        asked twice: what was typed at one that is gone is gone with it."""
        deadline = time.monotonic() + TIMEOUT
        said = b""
        while time.monotonic() < deadline:
            with self._console() as console:
                console.settimeout(10)
                console.sendall(b"x")
                said = b""
                try:
                    while not (found := _END.search(said.replace(b"\r", b""))):
                        some = console.recv(1 << 20)
                        if not some:
                            break
                        said += some
                except TimeoutError:
                    continue
                if found:
                    return Report(*(int(n, 16) for n in found.groups()))
        raise AssertionError(f"the guest does not end its load: {said[-300:]!r}\n{self.log('root')}")
