"""structlog for the whole process: JSON lines, or colours on a terminal. One line per job with all its times."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import msgspec
import structlog

from shiwu.contract import Answer, Status


def set_up(*, level: str, form: str) -> None:
    """Configure structlog and the standard library's root logger, which celery, kombu and urllib3 write to."""
    number = getattr(logging, level.upper())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    pretty = form == "console" or (form == "auto" and sys.stderr.isatty())
    renderer: Any = structlog.dev.ConsoleRenderer() if pretty else structlog.processors.JSONRenderer(ensure_ascii=False)
    ending: list[Any] = [] if pretty else [structlog.processors.format_exc_info]
    structlog.configure(
        processors=[*shared, *ending, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *ending, renderer],
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(number, logging.WARNING))
    logging.captureWarnings(capture=True)


def job_logger(*, level: str) -> Callable[[Answer, float, bool], None] | None:
    """A writer of the one line per job, or None where the level leaves it out and its cost with it."""
    if getattr(logging, level.upper()) > logging.INFO:
        return None
    log = structlog.get_logger("shiwu.job")

    def write(answer: Answer, commit_s: float, again: bool) -> None:
        fields: dict[str, Any] = {
            f"{k}_ms": v for k, v in msgspec.structs.asdict(answer.timing).items() if v is not None
        }
        if answer.error is not None:
            fields |= {"code": answer.error.code.value, "error": answer.error.message}
            fields |= {"stage": answer.error.stage.value} if answer.error.stage else {}
        log.info(
            "answered_before" if again else answer.status.value,
            id=answer.id,
            lane=answer.lane.value if answer.lane else None,
            attempt=answer.attempts,
            image=answer.image.reference if answer.image else None,
            top=answer.tags[0].label if answer.status is Status.TAGGED and answer.tags else None,
            batch_size=answer.batch_size,
            commit_ms=round(commit_s * 1000, 3),
            **fields,
        )

    return write
