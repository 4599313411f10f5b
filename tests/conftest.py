"""For every test: where it runs, and what the end of the output says about that."""

import signal
from pathlib import Path

import pytest

from harness import box
from harness.where import Tally

_GUEST_TESTS = Path(__file__).resolve().parent / "guest"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--box",
        choices=["private", "shared", "off"],
        default="private",
        help="where the host's KVM cannot boot Linux, tests marked linux run in a box: one of this session's own, "
        "the user's long-lived one (vmmctl box), or not at all",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # Under nohup it is ignored, and would be in what the tests start, too.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if box.IN_BOX:
        return  # the pytest outside does the counting
    from motorcade.orchestrator.kvmprobe import probe

    kvm = probe()
    config.pluginmanager.register(Tally(kvm.summary), "where-tally")
    if not kvm.boots_linux:
        config.pluginmanager.register(box.Delegation(config.getoption("--box")), "box-delegation")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is below tests/guest needs Linux guests; so does whatever else says so."""
    for item in items:
        if item.path.is_relative_to(_GUEST_TESTS):
            item.add_marker("linux")
    delegation = config.pluginmanager.get_plugin("box-delegation")
    if not isinstance(delegation, box.Delegation):
        return
    if config.getoption("--box") == "off":
        for item in items:
            if item.get_closest_marker("linux"):
                item.add_marker(pytest.mark.skip(reason="needs Linux guests: no hardware KVM here, and --box=off"))
        return
    delegation.take(items)
    if delegation.items and not config.option.collectonly:
        # Built here: what the box builds is forgotten with it.
        from harness import images

        generic = any("generic_linux" in getattr(item, "fixturenames", ()) for item in delegation.items.values())
        images.prepare([images.CLOUD, images.GENERIC] if generic else [images.CLOUD])


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    delegation, tally = (config.pluginmanager.get_plugin(name) for name in ("box-delegation", "where-tally"))
    if isinstance(delegation, box.Delegation) and isinstance(tally, Tally) and delegation.session is not None:
        tally.box = delegation.session.about
