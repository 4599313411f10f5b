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
        Example("query-chardev", answer=Each({"label": str, "filename": str, "frontend-open": bool})),
        Example("query-balloon", error="DeviceNotActive", desc="No balloon device has been activated"),
        Example("query-nonsense", error="CommandNotFound", desc="The command query-nonsense has not been found"),
    ],
)
