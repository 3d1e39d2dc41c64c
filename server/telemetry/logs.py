"""One JSON object a line on stderr. Callers pass names and numbers in `extra`; audio, questions and answers never."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

# The attributes that every LogRecord has; whatever else a record carries came in through `extra`.
RECORD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class JsonFormatter(logging.Formatter):
    """Formats a record and its extra fields as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
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
    """Sends every logger of the process through the JSON formatter to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    if level != "debug":
        logging.getLogger("vllm").setLevel(logging.WARNING)
    # It warns of every form that is none: whoever sends many would fill the log.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    # Its lines name the client's address and path; ours have the request id and the outcome.
    logging.getLogger("uvicorn.access").disabled = True
