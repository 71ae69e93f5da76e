"""Enqueue jobs and read their answers."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import redis

from shiwu.broker.message_writer import build_message
from shiwu.client.results import TagResult
from shiwu.contract import (
    Answer,
    Lane,
    Request,
    result_key,
)
from tests.support.waiting import wait_until


def ask(url: str, image: str, job_id: str, **fields: Any) -> Answer:
    """Enqueue as our client does and wait for the answer under its key."""
    with redis.Redis.from_url(url) as client:
        message = build_message(Request(image=image, **fields), job_id=job_id, lane=Lane.INTERACTIVE)
        client.lpush(Lane.INTERACTIVE.queue, message)
        return read_answer(client, job_id)


def read_answer(client: redis.Redis, job_id: str, *, timeout_s: float = 30.0) -> Answer:
    """Wait for the answer in Celery's result, whichever form it has."""
    raw: Any = wait_until(lambda: client.get(result_key(job_id)), timeout_s=timeout_s, what=f"answer of {job_id}")
    result = json.loads(raw)["result"]
    return msgspec.convert(result.get("answer", result), TagResult)
