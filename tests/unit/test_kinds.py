"""Which kinds of device there are: ours, and those of installed packages, some of which are broken."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from motorcade.orchestrator import kitplace
from motorcade.sidecars import kinds, sdk
from motorcade.sidecars.rng.device import RngDevice

Install = Callable[[str, str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a distribution where Python looks: its name, the line of its entry point, and the text of its module."""
    monkeypatch.syspath_prepend(str(tmp_path))
    kinds.find.cache_clear()

    def put(name: str, entry: str, text: str) -> None:
        info = tmp_path / f"{name}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[motorcade.sidecars]\n{entry}\n")
        (tmp_path / f"{name}.py").write_text(text)

    yield put
    kinds.find.cache_clear()
    for name in [n for n in sys.modules if n.startswith("kindtest")]:
        del sys.modules[name]


GOOD = """\
from motorcade.sidecars import sdk

class Good(sdk.Device):
    virtio_type = 62
    sizes = (1,)
    def handle(self, request):
        return None
"""


def test_our_own() -> None:
    assert kinds.find("rng") is RngDevice


def test_a_package_brings_a_kind(install: Install) -> None:
    install("kindtest1", "good = kindtest1:Good", GOOD)
    found = kinds.find("good")
    assert issubclass(found, sdk.Device) and found.sizes == (1,)
    assert kinds.names() == sorted({"good", *kinds.OWN} - kinds.ELSEWHERE)


def test_two_packages_cannot_bring_the_same(install: Install) -> None:
    install("kindtest2", "good = kindtest2:Good", GOOD)
    install("kindtest3", "good = kindtest3:Good", GOOD)
    with pytest.raises(kinds.UnknownKind, match="several packages"):
        kinds.find("good")


def test_nobody_takes_the_place_of_ours(install: Install) -> None:
    install("kindtest4", "rng = kindtest4:Good\nblk = kindtest4:Good", GOOD)
    assert kinds.find("rng") is RngDevice
    with pytest.raises(kinds.UnknownKind, match="no kind"):
        kinds.find("blk")


@pytest.mark.parametrize(
    ("target", "text", "match"),
    [
        ("Missing", GOOD, "AttributeError"),
        ("Good", "raise SystemError('no')", "cannot be imported: SystemError: no"),
        ("Good", "Good = 5", "not a subclass"),
        ("Good", "class Good: pass", "not a subclass"),
        ("Good", GOOD.replace("sizes", "size"), "has no sizes"),
        ("Good", GOOD.replace("handle", "answer"), "has no handle"),
        ("Good", "raise SystemExit(3)", "cannot be imported: SystemExit: 3"),
        ("Good", GOOD.replace("(1,)", "(100,)"), "a queue of size 100: it is to be a power of two up to 1024"),
        ("Good", GOOD.replace("(1,)", "(2048,)"), "a queue of size 2048"),
        ("Good", GOOD.replace("(1,)", "(8,) * 17"), "a tuple of one to 16 sizes"),
        ("Good", GOOD.replace("(1,)", "64"), "sizes 64: it is to be a tuple"),
        ("Good", GOOD.replace("62", "'rng'"), "virtio_type 'rng'"),
        ("Good", GOOD + "    Options = dict\n", "not a subclass of motorcade.sidecars.sdk.Options"),
    ],
)
def test_a_package_that_is_broken_is_named(install: Install, target: str, text: str, match: str) -> None:
    name = f"kindtest_{abs(hash((target, text)))}"
    install(name, f"bad = {name}:{target}", text)
    with pytest.raises(kinds.UnknownKind, match=match):
        kinds.find("bad")


def test_a_damaged_list_of_entry_points_is_an_error_of_its_own(install: Install) -> None:
    install("kindtest9", "no equals sign here", GOOD)
    with pytest.raises(kinds.UnknownKind, match="entry points of the installed packages cannot be read"):
        kinds.find("good")
    assert kinds.find("rng") is RngDevice


@pytest.mark.parametrize("opened", [{"memory": 0}, {"kick.0": 0}, {"": 0}, {"disk": -1}, {"disk": None}])
def test_what_a_kind_opens_cannot_take_the_place_of_what_every_device_has(opened: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="its open"):
        kitplace.check_labels(opened)
    kitplace.check_labels({"disk": 0})
