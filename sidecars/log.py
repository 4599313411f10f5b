"""Log lines as JSON objects: for `vmmctl logs`, and for whoever collects them.

Much of what core and sidecars log is a guest's doing, and a guest can do it again at once: a driver that breaks its
ring and resets the device, in a loop, would fill the host's disk. So each statement that logs has a budget.
"""

from __future__ import annotations

import json
import logging
import time

BURST = 50  # lines of one statement in a row: more than a machine has devices
INTERVAL = 5.0  # seconds after which it may write one more


class Budget(logging.Filter):
    """Lets each logging statement write BURST lines and one more every INTERVAL; the next one that passes has the
    number that did not, as ``left_out``. Called with the handler's lock held."""

    def __init__(self) -> None:
        super().__init__()
        self._statements: dict[tuple[str, int], tuple[float, float, int]] = {}  # when, how many may pass, left out

    def filter(self, record: logging.LogRecord) -> bool:
        """See logging.Filter."""
        where = (record.pathname, record.lineno)
        now = time.monotonic()
        then, budget, left_out = self._statements.get(where, (now, BURST, 0))
        budget = min(BURST, budget + (now - then) / INTERVAL)
        passes = budget >= 1
        self._statements[where] = (now, budget - 1, 0) if passes else (now, budget, left_out + 1)
        record.left_out = left_out
        return passes


def start(role: str, level: str, *, limited: bool = True) -> None:
    """Sends this process's log to stderr. ``limited``: with a budget, for a process that a guest can make talk."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(role))
    if limited:
        handler.addFilter(Budget())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class JsonFormatter(logging.Formatter):
    """One object a line: ``ts`` (UTC), ``level``, ``role``, ``msg``; ``left_out`` (see Budget) and ``traceback`` where
    there is one."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self.role = role

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its newline."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "ts": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "role": self.role,
            "msg": record.getMessage(),
        }
        if left_out := getattr(record, "left_out", 0):
            line["left_out"] = left_out
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
