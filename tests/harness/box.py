"""Running the tests that need Linux guests inside a box, as part of one pytest session.

Where the host's KVM cannot boot a stock kernel, the items marked ``linux`` are not run by this process. One
pytest in a private box runs them all (a Python start costs seconds in there), while this one runs the others;
its reports come back line by line and are replayed here, so that the output, the counts and the exit status
are of one session.
"""

import json
import os
import queue
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from motorcade.orchestrator.box.session import carried_environment, run
from motorcade.orchestrator.box.vm import Box, BoxError, ensure_box, stop_box

ROOT = Path(__file__).resolve().parents[2]
IN_BOX = os.environ.get("MOTORCADE_BOX") == "1"

Event = dict[str, Any]


class BoxSession:
    """The pytest session in the box, driven by a thread of ours.

    A thread and not the main one, since the box starts and works while the host's tests run. The private box
    is tied to that thread's life by the kernel.
    """

    def __init__(self, nodeids: list[str], options: list[str], shared: bool) -> None:
        self._nodeids, self._options, self._shared = nodeids, options, shared
        self._events: queue.Queue[Event] = queue.Queue()
        self._scratch = tempfile.TemporaryDirectory(prefix="mcbox-")
        self._partial = b""
        self._box: Box | None = None
        self.finished = False
        self.error: str | None = None
        self.about: str | None = None
        """What the box is: its ``uname``."""
        self.log = bytearray()
        """What the pytest in the box printed, for when it breaks down."""
        self._thread = threading.Thread(target=self._main, name="box")

    def start(self) -> None:
        self._thread.start()

    def events(self, wait: bool) -> Iterator[Event]:
        """The events that are there; with ``wait``, all until the end of the session in the box."""
        while not self.finished:
            try:
                event = self._events.get(block=wait)
            except queue.Empty:
                return
            if event["event"] == "end":
                self.finished = True
                self.error = event["error"]
                self._thread.join()
                self._scratch.cleanup()
                return
            if event["event"] == "about":
                self.about = event["uname"]
            else:
                yield event

    def stop(self) -> None:
        """Ends it early: the tests are interrupted."""
        if not self.finished and not self._shared:
            stop_box(self._directory)
        for _ in self.events(wait=True):
            pass

    @property
    def _directory(self) -> Path:
        return Path(self._scratch.name) / "box"

    def _main(self) -> None:
        error: str | None = None
        try:
            box = ensure_box(_say) if self._shared else ensure_box(_say, directory=self._directory, private=True)
            command = [sys.executable, "-m", "pytest", "-p", "harness.boxreport", "-p", "no:cacheprovider"]
            with open(os.devnull, "rb") as null:
                status = run(
                    box,
                    [*command, *self._options, *self._nodeids],
                    cwd=ROOT,
                    env=carried_environment() | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
                    stdin=null.fileno(),
                    out=self._feed,
                    err=self.log.extend,
                    forward_signals=False,
                )
            # 0 and 1 are pytest's "all passed" and "some failed", which the reports have said already.
            if status not in (0, 1):
                error = f"pytest in the box ended with status {status}"
        except BoxError as failure:
            error = str(failure)
        except BaseException as failure:
            error = f"{type(failure).__name__}: {failure}"
            raise
        finally:
            if not self._shared:
                stop_box(self._directory)
            self._events.put({"event": "end", "error": error})

    def _feed(self, chunk: bytes) -> None:
        *lines, self._partial = (self._partial + chunk).split(b"\n")
        for line in lines:
            self._events.put(json.loads(line))


def _say(line: str) -> None:
    if sys.__stderr__ is not None:  # pytest has replaced sys.stderr, and captures descriptor 2 besides
        print(f"box: {line}", file=sys.__stderr__, flush=True)


class Delegation:
    """The pytest plugin: takes the ``linux`` items out of this process's hands and replays their reports."""

    def __init__(self, mode: str) -> None:
        self._mode = mode
        self.items: dict[str, pytest.Item] = {}
        self.session: BoxSession | None = None
        self._reported: set[str] = set()

    def take(self, items: list[pytest.Item]) -> None:
        """Remembers the items that the box will run; they stay in ``items`` for the counts."""
        self.items = {item.nodeid: item for item in items if item.get_closest_marker("linux")}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """pytest's own loop (_pytest/main.py, pytest_runtestloop), with the box's reports between the items."""
        config = session.config
        if not self.items or config.option.collectonly:
            return None
        if session.testsfailed and not config.option.continue_on_collection_errors:
            return None  # pytest's loop says so properly
        options = ["-q"]
        if config.option.maxfail:
            options.append(f"--maxfail={config.option.maxfail}")
        self.session = BoxSession(list(self.items), options, shared=self._mode == "shared")
        self.session.start()
        try:
            here = [item for item in session.items if item.nodeid not in self.items]
            for item, following in zip(here, [*here[1:], None], strict=False):
                config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                self._replay(session, wait=False)
            self._replay(session, wait=True)
        finally:
            self.session.stop()
        return True

    def _replay(self, session: pytest.Session, wait: bool) -> None:
        assert self.session is not None
        hook = session.config.hook
        for event in self.session.events(wait):
            if event["event"] == "start":
                hook.pytest_runtest_logstart(nodeid=event["nodeid"], location=tuple(event["location"]))
            elif event["event"] == "finish":
                hook.pytest_runtest_logfinish(nodeid=event["nodeid"], location=tuple(event["location"]))
            else:
                report = hook.pytest_report_from_serializable(config=session.config, data=event["report"])
                report.ran_in_box = True
                if isinstance(report, pytest.TestReport):
                    self._reported.add(report.nodeid)
                    hook.pytest_runtest_logreport(report=report)
                else:
                    hook.pytest_collectreport(report=report)
            self._check_stop(session)
        if self.session.finished:
            self._account_for_missing(session)
        self._check_stop(session)

    def _check_stop(self, session: pytest.Session) -> None:
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)

    def _account_for_missing(self, session: pytest.Session) -> None:
        """No test of the box's may vanish: what it never reported on has failed, or was skipped for want of a box."""
        assert self.session is not None
        for nodeid, item in self.items.items():
            if nodeid in self._reported:
                continue
            self._reported.add(nodeid)
            reason = self.session.error or "the box's pytest did not report on this test"
            log = self.session.log.decode(errors="replace")[-4000:]
            skip = not log and self.session.about is None and os.environ.get("CI") != "true"
            path, line, _ = item.location
            report = pytest.TestReport(
                nodeid=nodeid,
                location=item.location,
                keywords=dict.fromkeys(item.keywords, 1),
                outcome="skipped" if skip else "failed",
                longrepr=(path, (line or 0) + 1, f"Skipped: no box: {reason}") if skip else f"{reason}\n{log}",
                when="setup",
            )
            session.config.hook.pytest_runtest_logreport(report=report)
