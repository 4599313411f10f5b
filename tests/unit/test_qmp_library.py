"""QEMU's own client library against our server."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from qemu.qmp import EventListener, ExecuteError, QMPClient

from harness.qmp import qmp_host


def test_the_library_negotiates_asks_and_listens(tmp_path: Path) -> None:
    with qmp_host(tmp_path / "qmp.sock") as host:

        async def talk() -> None:
            client = QMPClient("test")
            with client.listener(names=("STOP", "RESUME")) as events:
                await client.connect(host.path)
                assert await client.execute("query-status") == {
                    "running": True,
                    "singlestep": False,
                    "status": "running",
                }
                assert await client.execute("stop") == {}
                assert (await events.get())["event"] == "STOP"
                assert await client.execute("cont") == {}
                assert (await events.get())["event"] == "RESUME"
                with pytest.raises(ExecuteError) as error:
                    await client.execute("device_frobnicate")
                assert error.value.error_class == "CommandNotFound"
                assert str(error.value) == "The command device_frobnicate has not been found"
                answers = await asyncio.gather(*(client.execute("query-cpus-fast") for _ in range(5)))
                assert [len(a) for a in answers] == [2] * 5  # type: ignore[arg-type]
            await client.disconnect()

        asyncio.run(asyncio.wait_for(talk(), 30))


def test_an_event_before_the_negotiation_does_not_confuse_it(tmp_path: Path) -> None:
    with qmp_host(tmp_path / "qmp.sock") as host:

        async def talk() -> None:
            client = QMPClient("early")
            client.negotiate = False  # the library reads the greeting and says nothing yet
            await client.connect(host.path)
            host.call(lambda: host.server.emit("STOP"))
            assert await client.execute("qmp_capabilities") == {}
            listener = EventListener()
            with client.listen(listener):
                host.call(lambda: host.server.emit("RESUME"))
                assert (await listener.get())["event"] in ("STOP", "RESUME")
            await client.disconnect()

        asyncio.run(asyncio.wait_for(talk(), 30))


def test_its_shell_in_both_modes(tmp_path: Path) -> None:
    with qmp_host(tmp_path / "qmp.sock") as host:

        def shell(typed: str, *options: str) -> str:
            shell = [sys.executable, "-m", "qemu.qmp.qmp_shell", *options, host.path]
            done = subprocess.run(shell, input=typed, capture_output=True, text=True, timeout=60, check=True)
            return done.stdout

        said = shell("query-name\nmigrate uri=file:/t\nstop\nfrobnicate\n")
        assert '(QEMU) {"return": {"name": "fake"}}' in said
        assert "The command frobnicate has not been found" in said
        assert host.machine.done == ["pause"]
        said = shell("info status\nc\nhelp cont\n", "-H")
        assert "VM status: paused" in said
        assert "let the vCPUs run" in said
    assert host.machine.done == ["pause", "resume"]


def test_quit_says_shutdown_last(tmp_path: Path) -> None:
    with qmp_host(tmp_path / "qmp.sock") as host:

        async def talk() -> None:
            client = QMPClient("quit")
            with client.listener(names="SHUTDOWN") as events:
                await client.connect(host.path)
                assert await client.execute("quit") == {}
                shutdown = await events.get()
                assert shutdown["data"] == {"guest": False, "reason": "host-qmp-quit"}
            await client.disconnect()

        asyncio.run(asyncio.wait_for(talk(), 30))
        assert host.machine.done == ["quit"]
