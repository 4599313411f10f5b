"""Log lines as JSON objects: for `vmmctl logs`, and for whoever collects them."""

from __future__ import annotations

import json
import logging
import time


class JsonFormatter(logging.Formatter):
    """One object a line: ``ts`` (UTC), ``level``, ``role``, ``msg``, and ``traceback`` where there is one."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self.role = role

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its newline."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "ts": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "role": self.role,
            "msg": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
