"""The end of a test session's output: where the tests ran, and the proof that Linux was booted."""

from collections import Counter
from dataclasses import dataclass, field

import pytest

GUEST_UNAME = "guest_uname"
"""The user property (``record_property``) under which a test notes what ``uname -a`` said in its guest."""

SECOND_TRY = "second_try"
"""The user property of a test in the box that was run again (harness/boxreport.py): how the first try ended."""


@dataclass(eq=False)  # pytest hashes its plugins
class Tally:
    """Counts of test outcomes by place."""

    kvm: str
    """What this host's /dev/kvm is, for the reader."""
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    unames: Counter[str] = field(default_factory=Counter)
    box: str | None = None
    second_tries: list[str] = field(default_factory=list)
    _failed: set[str] = field(default_factory=set)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test counts once: as failed if any of its phases did, else by its call (or by its skip)."""
        if report.when == "call":
            self.second_tries += [f"{report.nodeid}: {v}" for name, v in report.user_properties if name == SECOND_TRY]
            said = [str(value) for name, value in report.user_properties if name == GUEST_UNAME]
            if said:
                self.unames[said[-1]] += 1
        place = "box" if getattr(report, "ran_in_box", False) else "kvm" if _uses_kvm(report) else "host"
        if report.failed:
            if report.nodeid not in self._failed:
                self._failed.add(report.nodeid)
                self.outcomes[place, "failed"] += 1
                if report.when == "teardown":
                    self.outcomes[place, "passed"] -= 1
        elif report.skipped:
            # An expected failure (xfail) is not something that was left out.
            self.outcomes[place, "passed" if hasattr(report, "wasxfail") else "skipped"] += 1
        elif report.when == "call":
            self.outcomes[place, "passed"] += 1

    def total(self, outcome: str) -> int:
        return sum(count for (_, o), count in self.outcomes.items() if o == outcome)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        write = terminalreporter.write_line
        terminalreporter.section("where the tests ran")
        box = f"in the box ({self.box})" if self.box else "in the box"
        for place, label in [("box", box), ("kvm", f"on the bare /dev/kvm ({self.kvm})"), ("host", "without either")]:
            passed, failed, skipped = (self.outcomes[place, o] for o in ("passed", "failed", "skipped"))
            write(f"{passed + failed:4} {label}" + (f"; {skipped} more skipped" if skipped else ""))
        if self.second_tries:
            write(f"{len(self.second_tries)} tests in the box were run a second time, since the first failed:")
            for line in self.second_tries:
                write(f"     {line}")
        if self.unames:
            write(f"Linux guests said of themselves, in {sum(self.unames.values())} tests:")
            for uname, count in sorted(self.unames.items()):
                write(f"{count:4} x {uname}")
        else:
            write("no Linux guest was booted")

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self, config: pytest.Config) -> None:
        """The very last line, after pytest's own."""
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None and not config.option.collectonly:
            counts = ", ".join(f"{self.total(outcome)} {outcome}" for outcome in ("passed", "failed", "skipped"))
            reporter.write_line(counts)


def _uses_kvm(report: pytest.TestReport) -> bool:
    return "kvm" in report.keywords or "linux" in report.keywords
