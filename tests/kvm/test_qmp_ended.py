"""A guest that powers off or crashes, in a VM that is to stay: on_poweroff and on_crash in machine.yaml."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.guestdriver import POWER_OFF
from harness.qmp import QmpClient
from harness.vm import Vm, VmHost, vm_host
from harness.vmmctl import Host, write_machine
from harness.wholevm import hear
from motorcade.orchestrator.qmpclient import QmpClient as QmpConnection
from motorcade.orchestrator.qmpclient import QmpError

pytestmark = pytest.mark.kvm
STAYS = {"on_poweroff": "pause", "on_crash": "pause"}
ENDS = {"shutdown": POWER_OFF, "internal-error": "fault"}


@pytest.fixture
def vms(tmp_path: Path) -> Iterator[VmHost]:
    with vm_host(tmp_path) as h:
        yield h


def start(vms: VmHost, guest: Path, end: str) -> Vm:
    """Says hello, waits for a byte, and ends."""
    kernel = {"image": str(guest), "cmdline": f"print=hello echo=1 {ENDS[end]}"}
    vm = vms.start({"name": "web", "memory": "32M", "kernel": kernel, **STAYS})
    with vm.attach() as uart:
        hear(uart, b"hello")
    return vm


def ended(vm: Vm, client: QmpClient, end: str) -> None:
    """Lets the guest end; the events say that it did."""
    client.ask("query-name")
    with vm.attach() as uart:
        uart.sendall(b"x")
        if end == "shutdown":
            event = client.read()
            assert (event["event"], event["data"]) == ("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})
        assert client.read()["event"] == "STOP"


@pytest.mark.parametrize("end", ENDS)
def test_the_machine_can_be_looked_at_and_started_again(vms: VmHost, guest: Path, tmp_path: Path, end: str) -> None:
    vm = start(vms, guest, end)
    with QmpClient(str(vm.run_dir / "qmp.sock")) as client:
        client.read()
        ended(vm, client, end)

        def ask(command: str, **arguments: Any) -> Any:
            answer = client.ask(command, **arguments)
            while "event" in answer:
                answer = client.read()
            return answer.get("return", answer.get("error", {}).get("desc"))

        assert ask("query-status") == {"running": False, "singlestep": False, "status": end}
        assert "system_reset starts it again" in ask("cont")
        for command in ("stop", "system_powerdown", "x-motorcade-snapshot"):
            arguments = {"dir": str(tmp_path / "t")} if command.startswith("x-") else {}
            assert f"in state '{end}'" in ask(command, **arguments)
        assert int(ask("query-vcpu-reg", addr="rip", vcpu=0), 16) > 0
        assert ask("dump-guest-memory", protocol=f"file:{tmp_path / 'core'}", paging=False) == {}
        assert (tmp_path / "core").read_bytes()[:4] == b"\x7fELF"
        assert ask("query-status")["status"] == end
        assert ask("system_reset") == {}
        assert ask("query-status")["status"] == "paused"
        assert ask("cont") == {}
        with vm.attach() as uart:
            hear(uart, b"hello")
        assert ask("query-status")["status"] == "running"
        ended(vm, client, end)
        assert ask("query-status")["status"] == end


def test_down_ends_it_at_once(host: Host, guest: Path, tmp_path: Path) -> None:
    file = write_machine(tmp_path, "web", guest, cmdline=f"print=hello {POWER_OFF}", **STAYS)
    host.vmmctl("up", "-d", str(file))
    with QmpConnection(host.run_dir / "web" / "qmp.sock") as qmp:
        while qmp.execute("query-status")["status"] != "shutdown":
            assert qmp.wait_event(20) is not None
    host.vmmctl("down", "--timeout", "600", "web")
    assert host.state("web")["ended"]["reason"] == "host-qmp-quit"


def test_by_default_the_vm_ends_with_its_guest(vms: VmHost, guest: Path) -> None:
    kernel = {"image": str(guest), "cmdline": f"print=hello echo=1 {POWER_OFF}"}
    vm = vms.start({"name": "web", "memory": "32M", "kernel": kernel})
    with vm.qmp() as qmp, vm.attach() as uart:
        hear(uart, b"hello")
        uart.sendall(b"x")
        assert vm.wait_end()["reason"] == "guest-shutdown"
        with pytest.raises(QmpError):
            qmp.execute("query-status")
