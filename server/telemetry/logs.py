"""Logs on stderr, one JSON object per line.

Callers pass names and numbers in `extra`, never audio, questions or answers.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

# The attributes of every LogRecord; all others come from `extra`.
RECORD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class JsonFormatter(logging.Formatter):
    """Formatter for a record and its extra fields, as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of JSON."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {key: value for key, value in vars(record).items() if key not in RECORD_FIELDS}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(level: str) -> None:
    """Send all loggers of the process to stderr through the JSON formatter."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    if level != "debug":
        logging.getLogger("vllm").setLevel(logging.WARNING)
    # It warns about every invalid form, so a client could fill the log.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    # Its lines contain the client's address and path; ours have the request id and the outcome.
    logging.getLogger("uvicorn.access").disabled = True
