"""The balloon: without a driver, and with Linux's own. (Without a balloon: tests/kvm/test_balloon_vm.py.)"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from harness.qmpexamples.example import Example, Group, Place

_MIB = 1 << 20


def _machine(_folder: Path) -> dict[str, Any]:
    return {"balloon": True}


def _await_driver(place: Place) -> None:
    """It is loaded early, but so is this."""
    end = time.monotonic() + 120
    with place.vm.qmp() as qmp:
        while not qmp.execute("x-motorcade-balloon-stats")["driver"]:
            assert time.monotonic() < end, "the guest has no driver for its balloon"
            time.sleep(0.05)  # nobody is told when a driver comes


def _whole(place: Place) -> int:
    with place.vm.qmp() as qmp:
        return int(qmp.execute("x-motorcade-balloon-stats")["size"])


WITHOUT_DRIVER = Group(
    "balloon",
    machine=_machine,
    guests=("micro",),
    examples=[
        Example("query-balloon", answer={"actual": int}),
        Example("balloon", {"value": 16 * _MIB}),
        Example(
            "x-motorcade-balloon-stats",
            answer={
                "size": 32 * _MIB,
                "target": 16 * _MIB,
                "actual": 32 * _MIB,
                "driver": False,
                "stats": {},
                "last-update": 0,
            },
        ),
        Example("balloon", {"value": 0}, error="GenericError", desc="expects a size"),
        Example("balloon", error="GenericError", desc="Parameter 'value' is missing"),
        Example("balloon", {"value": 1 << 40}),
    ],
)
GROUP = Group(
    "balloon-linux",
    machine=_machine,
    guests=("linux",),
    prepare=_await_driver,
    examples=[
        Example(
            "balloon",
            lambda place: {"value": _whole(place) - 8 * _MIB},
            after=[("BALLOON_CHANGED", {"actual": lambda n: n % (8 * _MIB) == 0 and n % (16 * _MIB) != 0})],
        ),
        Example("query-balloon", answer={"actual": lambda n: n % (16 * _MIB) == 8 * _MIB}),
        Example(
            "balloon",
            lambda place: {"value": _whole(place)},
            after=[("BALLOON_CHANGED", {"actual": lambda n: n % (16 * _MIB) == 0})],
        ),
    ],
)
