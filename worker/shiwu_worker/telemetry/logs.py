"""Sets up structlog for the whole process: JSON lines, or colours on a terminal, and one line for each job."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, MutableMapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, cast

import msgspec
import structlog

from shiwu.contract import Answer, Status, Timing, printable, printable_lines, without_logins
from shiwu_worker.telemetry.log_output import LogOutput, open_standard_streams

if TYPE_CHECKING:
    from structlog.typing import Processor

_SEVERAL_LINES: Final = frozenset({"exception", "stack"})
"""Fields that the terminal shows as lines of their own."""
_TIMES: Final = tuple((name, f"{name}_ms") for name in Timing.__struct_fields__)


def set_up(*, level: str, form: str, log_file: str | None = None) -> None:
    """Configure structlog and the standard library's root logger, to which Celery, kombu and urllib3 log.

    Args:
        level: debug, info, warning or error.
        form: json, console, or auto: console on a terminal, otherwise json.
        log_file: a file to append to (Celery's --logfile); None is standard error.
    """
    open_standard_streams()
    output = LogOutput(log_file)
    number = getattr(logging, level.upper())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    is_console = form == "console" or (form == "auto" and output.isatty())
    final: list[Processor] = [structlog.processors.format_exc_info, *([_escape_controls] if is_console else [])]
    # structlog's own tracebacks would show local variables, with passwords and texts of messages.
    console = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    renderer: Processor = console if is_console else lambda *event: _json_line(*event).decode()
    structlog.configure(
        processors=[*shared, *final, renderer if is_console else _json_line],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=_factory(output, is_text=is_console),
        cache_logger_on_first_use=True,
    )
    handler: logging.Handler = logging.StreamHandler(cast("Any", output))
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                _hide_logins,
                *final,
                renderer,
            ],
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(number, logging.WARNING))
    logging.captureWarnings(capture=True)


def _factory(output: LogOutput, *, is_text: bool) -> Any:
    file: Any = output
    return structlog.PrintLoggerFactory(file) if is_text else structlog.BytesLoggerFactory(file)


def _escape_controls(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Escape control characters in texts for the terminal; the renderer writes other types by repr."""
    for name, value in event.items():
        if isinstance(value, str):
            event[name] = printable_lines(value) if name in _SEVERAL_LINES else printable(value)
    return event


def _hide_logins(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Remove user names and passwords from URLs in lines of libraries, which may quote those of the configuration."""
    for name, value in event.items():
        if isinstance(value, str):
            event[name] = without_logins(value)
    return event


def _json_line(_logger: object, _method: str, event: MutableMapping[str, Any]) -> bytes:
    # Every image has a line, and json.dumps takes three times as long for it.
    try:
        # indent=0 puts a space after each colon and comma, like json.dumps, which the filters of operators expect.
        line = msgspec.json.format(msgspec.json.encode(event, enc_hook=repr), indent=0)
    except (TypeError, ValueError):
        # For example a file name that is not UTF-8, or a key that is not text.
        return json.dumps(event, default=repr, skipkeys=True).encode()
    if line.isascii() and b"\x7f" not in line:
        return line  # JSON escapes the other control characters of ASCII
    text = line.decode()
    return line if text.isprintable() else printable(text).encode()


def job_logger(*, level: str) -> Callable[[Answer, float, bool], None] | None:
    """Return a function that logs the line of a job, or None if the level excludes it, which saves its cost."""
    if getattr(logging, level.upper()) > logging.INFO:
        return None
    config = structlog.get_config()
    if config["processors"][-1] is not _json_line:
        log = structlog.get_logger("shiwu.job")

        def write(answer: Answer, commit_s: float, is_duplicate: bool) -> None:
            log.info("answered_before" if is_duplicate else str(answer.status), **_job_fields(answer, commit_s))

        return write
    # Bypasses structlog, whose chain of processors takes as long as all other work for the line.
    write_line = config["logger_factory"]().msg

    def write_json(answer: Answer, commit_s: float, is_duplicate: bool) -> None:
        fields = _job_fields(answer, commit_s)
        fields["event"] = "answered_before" if is_duplicate else str(answer.status)
        fields["level"] = "info"
        fields["timestamp"] = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        write_line(_json_line(None, "info", fields))

    return write_json


def _job_fields(answer: Answer, commit_s: float) -> dict[str, Any]:
    fields = {
        "id": answer.id,
        "lane": str(answer.lane) if answer.lane else None,
        "attempt": answer.attempts,
        "image": answer.image.reference if answer.image else None,
        "top": answer.tags[0].label if answer.status is Status.TAGGED and answer.tags else None,
        "batch_size": answer.batch_size,
        "commit_ms": int(commit_s * 1e6 + 0.5) / 1000,
    }
    timing = answer.timing
    for name, field in _TIMES:
        if (value := getattr(timing, name)) is not None:
            fields[field] = value
    if answer.error is not None:
        fields |= {"code": str(answer.error.code), "error": answer.error.message}
        fields |= {"stage": str(answer.error.stage)} if answer.error.stage else {}
    return fields
