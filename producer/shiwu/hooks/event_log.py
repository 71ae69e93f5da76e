"""Writes one JSON line for each event to standard output, and the warnings of the library in the same form.

No line has a secret, a body, or the query of a URL.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from datetime import UTC, datetime
from typing import Any, Final, TextIO

from shiwu.contract import printable_lines, without_logins


class EventLog:
    """Writes events as lines. Thread-safe."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._lock = threading.Lock()

    def info(self, event: str, **fields: Any) -> None:
        """Write what is as it should be."""
        self._write("info", event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """Write what an operator should look at."""
        self._write("warning", event, fields)

    def error(self, event: str, **fields: Any) -> None:
        """Write what ends the process, or loses something."""
        self._write("error", event, fields)

    def _write(self, level: str, event: str, fields: dict[str, Any]) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        record = {"event": event, "level": level, "timestamp": now}
        record |= {name: _shown(value) for name, value in fields.items() if value is not None}
        line = json.dumps(record, ensure_ascii=False, default=repr)
        with self._lock:
            self._stream.write(f"{line}\n")
            self._stream.flush()


class LibraryLines(logging.Handler):
    """Passes on what the client library logs, as about an unavailable Redis."""

    def __init__(self, log: EventLog) -> None:
        super().__init__(logging.INFO)
        self._events: Final = log

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        trace = logging.Formatter().formatException(record.exc_info) if record.exc_info else None
        self._events.warning("library", logger=record.name, message=record.getMessage(), exception=trace)


def _shown(value: Any) -> Any:
    return printable_lines(without_logins(value)) if isinstance(value, str) else value
