"""Every way to look into a device's process, on one live Linux guest (docs/looking-in.md)."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.vm import VmHost
from motorcade.orchestrator import cli, traceclient
from motorcade.orchestrator.traceclient import Happened, Trace
from motorcade.proto.watch import Kind

Machine = Callable[..., dict[str, Any]]
MIB = 1 << 20
READ = "dd if=/dev/vda of=/dev/null bs=64k count=16 iflag=direct"


def test_every_command(host: VmHost, linux: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.img").write_bytes(bytes(8 * MIB))
    disk = {"id": "data", "path": "data.img", "queues": 2, "debug": True}
    vm = host.start(linux(cpus=2, disks=[disk], consoles=[{"id": "hvc0"}]))
    agent = vm.console()
    agent.wait_ready()

    def vmmctl(*args: str) -> str:
        capsys.readouterr()
        assert cli.main(list(args)) == 0
        return capsys.readouterr().out

    def stats() -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(vmmctl("sidecar", "stats", "linux", "data", "--json"))
        return answer

    before = stats()["queues"]
    agent.check(READ)
    after = stats()["queues"]
    assert sum(q["bytes-out"] for q in after) - sum(q["bytes-out"] for q in before) >= MIB
    for queue in after:
        assert sum(queue["latency"]) == queue["requests"] == queue["taken"] - queue["in-flight"]
    assert "latency of queue" in vmmctl("sidecar", "stats", "linux", "data")

    def listed() -> dict[str, Any]:
        return {s["device"]: s for s in json.loads(vmmctl("sidecar", "ls", "linux", "--json"))}

    found = listed()
    assert [q["size"] for q in found["data"]["queues"]] == [256, 256]
    assert len(found["hvc0"]["queues"]) == 2
    assert found["data"]["pss"] > MIB
    assert "activated: features" in vmmctl("sidecar", "log", "linux", "data")

    with Trace(vm.run_dir / "watch.sock", ["data"]) as trace:
        agent.check(READ)
        seen: list[traceclient.Item] = []
        pushed = 0
        for item in trace.read(None):
            seen.append(item)
            pushed += isinstance(item, Happened) and item.event.kind == Kind.PUSH
            if pushed >= 16:
                break
    assert {Kind.TAKE, Kind.SUBMIT, Kind.COMPLETE} <= {i.event.kind for i in seen if isinstance(i, Happened)}
    out = tmp_path / "trace.json"
    vmmctl("sidecar", "trace", "linux", "core", "--seconds", "0.1", "--perfetto", str(out))
    assert json.loads(out.read_text())["traceEvents"]

    vmmctl("sidecar", "pause", "linux", "data")
    reader = threading.Thread(target=lambda: agent.check(READ))
    reader.start()
    while not any(q["waiting"] for q in listed()["data"]["queues"]):
        time.sleep(0.05)
    assert "paused" in vmmctl("sidecar", "ls", "linux")
    vmmctl("sidecar", "resume", "linux", "data")
    reader.join()

    vmmctl("sidecar", "inject", "linux", "data", "--fail", "1", "--op", "read")
    assert agent.run(READ).status != 0  # the kernel passes an I/O error on
    assert agent.run(READ).status == 0
    vmmctl("sidecar", "inject", "linux", "data", "--delay", "50", "--count", "4")
    agent.check(READ)
    assert stats()["detail"]["injected"] == 5
    assert sum(q["errors"] for q in stats()["queues"]) == 1

    served = []
    for command in ("restart", "upgrade"):
        vmmctl("sidecar", command, "linux", "data")
        served.append(listed()["data"]["pid"])
        agent.check(READ)
    assert len({vm.sidecar_pid("data"), *served}) == 3, "each puts a process of its own in the last one's place"
    assert "seccomp" in vmmctl("sidecar", "sandbox", "linux", "data")

    assert 'motorcade_queue_errors_total{vm="linux",device="data"' in vmmctl("metrics", "linux")
    assert "blk-data" in vmmctl("top", "--once", "-i", "0.1")
    prompt = vm.run_dir / "debug-data.sock"
    with traceclient.connect(prompt) as sock:
        said = b""
        sock.sendall(b"device.engine\n")
        while b"io_uring" not in said and b"sync" not in said:
            said += sock.recv(4096)
    agent.send("poweroff -f")
    assert vm.wait_end()["status"] == 0
