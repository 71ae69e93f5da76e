"""Writes Celery messages: task protocol 2 in kombu's envelope. `message_reader` reads them.

The format is described in https://docs.celeryq.dev/en/stable/internals/protocol.html, and a test compares it with
Celery's own messages. Celery is not imported, so that producers do not need it.
"""

from __future__ import annotations

import base64
import os
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any
from uuid import uuid4

from pydantic_core import to_json

from shiwu.contract import ANSWER_BY_HEADER, SENT_HEADER, TASK_NAME, Lane, Request


@lru_cache(maxsize=1)
def _origin() -> str:
    return f"{os.getpid()}@{socket.gethostname()}"


def build_message(
    request: Request,
    *,
    job_id: str,
    lane: Lane,
    sent_ms: float | None = None,
    expires_ms: float | None = None,
    answer_by_ms: float | None = None,
    eta_ms: float | None = None,
    priority: int = 0,
    ignore_result: bool = False,
    trace: Mapping[str, str] | None = None,
) -> bytes:
    """The bytes to LPUSH to the lane. Times are in ms since 1970 by Redis' clock; `trace` has W3C trace headers."""
    body = to_json(
        [
            [],
            request.model_dump(exclude_defaults=True, mode="json"),
            {"callbacks": None, "errbacks": None, "chain": None, "chord": None},
        ]
    )
    headers = _headers(
        job_id, sent_ms=sent_ms, expires_ms=expires_ms, eta_ms=eta_ms, ignore_result=ignore_result, trace=trace
    )
    if answer_by_ms is not None:
        headers[ANSWER_BY_HEADER] = answer_by_ms
    return to_json(
        {
            "body": base64.b64encode(body).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": headers,
            "properties": {
                "correlation_id": job_id,
                "reply_to": "",
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": lane.queue},
                "priority": priority,
                "body_encoding": "base64",
                "delivery_tag": str(uuid4()),
            },
        }
    )


def _headers(
    job_id: str,
    *,
    sent_ms: float | None,
    expires_ms: float | None,
    eta_ms: float | None,
    ignore_result: bool,
    trace: Mapping[str, str] | None,
) -> dict[str, Any]:
    """Return the headers of Celery's message protocol 2, with those of shiwu and of the trace."""
    return {
        "lang": "py",
        "task": TASK_NAME,
        "id": job_id,
        "shadow": None,
        "eta": _iso(eta_ms),
        "expires": _iso(expires_ms),
        "group": None,
        "group_index": None,
        "retries": 0,
        "timelimit": [None, None],
        "root_id": job_id,
        "parent_id": None,
        "argsrepr": "()",
        "kwargsrepr": "{}",
        "origin": _origin(),
        "ignore_result": ignore_result,
        SENT_HEADER: sent_ms,
        **(trace or {}),
    }


def _iso(milliseconds: float | None) -> str | None:
    return None if milliseconds is None else datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat()
