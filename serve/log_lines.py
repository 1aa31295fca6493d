"""The embedded server's log: one JSON object a line, on stderr."""

from __future__ import annotations

import json
import logging
import sys

#: Their messages are JSON objects already.
_JSON = frozenset({"excise.access", "excise.server"})


class JsonLines(logging.Formatter):
    """A record as one line, with the time in seconds since 1970; a traceback is a field of it."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        if record.name in _JSON:
            return record.getMessage()
        fields = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def log_to_stderr() -> None:
    """Send everything from level INFO to stderr, of uvicorn only what goes wrong."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)
