"""What a machine says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.qmpexamples.example import Each, Example, Group

_NAMES = Each({"name": str})
_PROPS = {"core-id": int, "socket-id": int, "thread-id": int}


def _path(n: int) -> str:
    return f"/machine/unattached/device[{n}]"


def _cpu(n: int) -> dict[str, Any]:
    return {
        "CPU": n,
        "arch": "x86",
        "current": n == 0,
        "halted": bool,
        "props": {**_PROPS, "core-id": n},
        "qom_path": _path(n),
        "thread_id": int,
    }


def _machine(folder: Path) -> dict[str, Any]:
    (folder / "examples.img").write_bytes(bytes(1 << 20))
    return {"cpus": 2, "disks": [{"id": "rootfs", "path": str(folder / "examples.img"), "readonly": True}]}


def _hexadecimal(text: str) -> bool:
    return text == f"{int(text, 16):X}"


_IDS = dict.fromkeys(("device", "qdev", "node-name"), "rootfs")
_STATS = {
    **dict.fromkeys(("rd_bytes", "wr_bytes", "rd_operations", "wr_operations", "flush_operations"), int),
    **dict.fromkeys(("unmap_operations", "rd_merged", "wr_merged"), int),
    "account_invalid": bool,
    "account_failed": bool,
}
_NODE = {
    "file": str,
    "node-name": "rootfs",
    "ro": True,
    "drv": "raw",
    "backing_file_depth": 0,
    "encrypted": False,
    "detect_zeroes": "off",
    **dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr", "write_threshold"), 0),
    "image": {"filename": str, "format": "raw", "virtual-size": 1 << 20},
    "cache": {"writeback": True, "direct": False, "no-flush": False},
}
_DISK = {
    "device": "rootfs",
    "qdev": "rootfs",
    "type": "unknown",
    "removable": False,
    "locked": False,
    "inserted": _NODE,
}
GROUP = Group(
    "inspecting",
    machine=_machine,
    examples=[
        Example("qmp_capabilities"),
        Example("query-version", answer={"qemu": {"micro": int, "minor": int, "major": int}, "package": str}),
        Example("query-commands", answer=_NAMES),
        Example("query-events", answer=_NAMES),
        Example("query-kvm", answer={"enabled": True, "present": True}),
        Example("query-target", answer={"arch": "x86_64"}),
        Example("query-name", answer={"name": "examples"}),
        Example("query-uuid", answer={"UUID": lambda text: len(text) == 36}),
        Example("query-status", answer={"running": True, "singlestep": False, "status": "running"}),
        Example("query-cpus", answer=[_cpu(0), _cpu(1)]),
        Example(
            "query-cpus-fast",
            answer=[
                {
                    "cpu-index": n,
                    "props": {**_PROPS, "core-id": n},
                    "qom-path": _path(n),
                    "target": "x86_64",
                    "thread-id": int,
                }
                for n in range(2)
            ],
        ),
        Example(
            "query-hotpluggable-cpus",
            answer=[
                {"props": {**_PROPS, "core-id": n}, "qom-path": _path(n), "type": "host-x86-cpu", "vcpus-count": 1}
                for n in range(2)
            ],
        ),
        Example("query-block", answer=[_DISK]),
        Example("query-named-block-nodes", answer=[_NODE]),
        Example("query-blockstats", answer=[{**_IDS, "stats": _STATS}]),
        Example("query-iothreads", answer=[]),
        Example("query-memory-size-summary", answer={"base-memory": lambda n: n % (1 << 20) == 0, "plugged-memory": 0}),
        Example("query-qmp-schema", answer=Each(dict)),
        Example("query-mem-gpa", {"gpa": "1000"}, answer=_hexadecimal),
        Example("query-mem-gpa", {"gpa": "ffffffffffffffff"}, error="GenericError", desc="is not RAM"),
        Example("query-mem-gpa", {"gpa": "vda"}, error="GenericError", desc="must be a hexadecimal number"),
        Example("query-vcpu-reg", {"addr": "rip", "vcpu": 1}, answer=_hexadecimal),
        Example("query-vcpu-reg", {"addr": "c0000080", "vcpu": 0}, answer=_hexadecimal),
        Example("query-vcpu-reg", {"addr": "603000000013df1a", "vcpu": 0}, error="GenericError", desc="is no register"),
        Example("query-vcpu-reg", {"addr": "rip", "vcpu": 2}, error="DeviceNotFound", desc="there is no vCPU 2"),
        Example("query-vm-generation-id", answer={"guid": str}),
        Example("x-motorcade-set-generation-id", answer={"guid": str}),
        Example("trace-get-state", {"name": "sidecar_*"}, answer=Each({"name": str, "state": "disabled"})),
        Example("trace-set-state", {"name": "sidecar_kick", "enable": True}),
        Example("trace-event-get-state", {"name": "*_kick"}, answer=[{"name": "sidecar_kick", "state": "enabled"}]),
        Example("trace-event-set-state", {"name": "sidecar_kick", "enable": False}),
        Example("human-monitor-command", {"command-line": "info status"}, answer="VM status: running\r\n"),
        Example(
            "human-monitor-command",
            {"command-line": "info registers", "cpu-index": 1},
            answer=lambda text: text.startswith("\r\nCPU#1\r\nrax="),
        ),
        Example(
            "human-monitor-command",
            {"command-line": "info blockstats"},
            answer=lambda text: text.startswith("rootfs: rd_bytes="),
        ),
        Example("human-monitor-command", {"command-line": "savevm x"}, answer="unknown command: 'savevm'\r\n"),
        Example("query-chardev", answer=Each({"label": str, "filename": str, "frontend-open": bool})),
        Example("query-nonsense", error="CommandNotFound", desc="The command query-nonsense has not been found"),
    ],
)
