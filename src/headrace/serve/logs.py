"""The log: one line an event, JSON by default. Line breaks in what clients send are escaped, and
the text of prompts and answers is never part of it."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime


class JSONLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        } | getattr(record, "facts", {})
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields)


class TextLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        facts = getattr(record, "facts", {}).items()
        words = [time, record.levelname.lower(), record.getMessage()]
        words += [f"{name}={json.dumps(value)}" for name, value in facts]
        line = " ".join(words).replace("\n", "\\n").replace("\r", "\\r")
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def configure(form: str, level: str) -> None:
    """Send the logs of headrace and of the HTTP server to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONLines() if form == "json" else TextLines())
    for name in ("headrace", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(level.upper())
    logging.getLogger("uvicorn.error").setLevel("WARNING")
    access = logging.getLogger("uvicorn.access")
    access.handlers[:] = []
    access.propagate = False
