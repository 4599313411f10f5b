"""Log lines, and the budget that keeps a guest from filling the host's disk with them."""

from __future__ import annotations

import json
import logging
import time

import pytest

from motorcade.sidecars import log


def record(line: int, message: str = "broken ring") -> logging.LogRecord:
    return logging.LogRecord("motorcade", logging.WARNING, "device.py", line, "%s", (message,), None)


def test_a_line_is_one_object() -> None:
    found = json.loads(log.JsonFormatter("blk-root").format(record(1, 'two\nlines and a "quote"')))
    assert (found["level"], found["role"], found["msg"]) == ("warning", "blk-root", 'two\nlines and a "quote"')
    assert found.keys() == {"ts", "level", "role", "msg"}


def test_each_statement_has_a_budget_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    budget = log.Budget()
    assert [budget.filter(record(1)) for _ in range(log.BURST + 3)] == [True] * log.BURST + [False] * 3
    assert budget.filter(record(2)), "another statement"
    now += log.INTERVAL / 2
    assert not budget.filter(record(1))
    now += log.INTERVAL / 2
    late = record(1)
    assert budget.filter(late)
    assert json.loads(log.JsonFormatter("x").format(late))["left_out"] == 4
    assert not budget.filter(record(1))
    now += 3600
    assert [budget.filter(record(1)) for _ in range(log.BURST + 1)] == [True] * log.BURST + [False]
