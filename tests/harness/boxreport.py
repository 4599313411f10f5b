"""Loaded into the pytest that runs in the box: tells the one outside what happens, a JSON object a line.

The lines go to what was standard output; everything that pytest and the tests print goes to standard error.
"""

import json
import os
import platform
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

from harness.where import SECOND_TRY

_TRIPLE_FAULT = "'reason': 'triple-fault'"  # of the supervisor's last message, as harness/vm.py shows it

_channel = os.dup(1)
os.dup2(2, 1)


def _tell(**event: Any) -> None:
    line = json.dumps(event).encode() + b"\n"
    while line:
        line = line[os.write(_channel, line) :]


def pytest_sessionstart() -> None:
    _tell(event="about", uname=" ".join(platform.uname()))


def pytest_runtest_logstart(nodeid: str, location: tuple[str, int | None, str]) -> None:
    _tell(event="start", nodeid=nodeid, location=location)


def pytest_runtest_logfinish(nodeid: str, location: tuple[str, int | None, str]) -> None:
    _tell(event="finish", nodeid=nodeid, location=location)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """Runs a test once more whose guest was lost to a triple fault, and has the summary outside say so.

    That is what QEMU's emulation of SVM does to guests now and then (docs/box.md). Nothing else gets a second try: not
    a wrong byte, not a silent guest, not a sidecar that died.
    """
    hook = item.ihook
    hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = runtestprotocol(item, nextitem=nextitem, log=False)
    failed = [r for r in reports if r.failed]
    if failed and any(_TRIPLE_FAULT in text for r in reports for text in (r.longreprtext, *(c for _, c in r.sections))):
        print(f"first try of {item.nodeid} failed:\n{failed[0].longreprtext}", *(c for _, c in failed[0].sections))
        item.user_properties.clear()
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
        for report in reports:
            report.user_properties.append((SECOND_TRY, failed[0].longreprtext.strip().splitlines()[-1][:300]))
    for report in reports:
        hook.pytest_runtest_logreport(report=report)
    hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


class _Reports:
    """Registered once there is a config, which the hooks for reports are not given."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._send(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._send(report)

    def _send(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        _tell(event="report", report=data)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Reports(config), "boxreport-reports")
