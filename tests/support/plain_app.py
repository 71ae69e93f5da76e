"""A user's Celery application without shiwu's code: `celery -A tests.support.plain_app worker`.

`plain.tag` is an ordinary task with the answers of `shiwu.tag`: it shows what Celery's canvas does.
"""

from __future__ import annotations

import os
from typing import Any

from celery import Celery

URL = os.environ.get("PLAIN_REDIS_URL", "redis://127.0.0.1:6379/0")
NOTES = "plain:notes"
app = Celery("plain", broker=URL, backend=URL)
app.conf.update(worker_enable_remote_control=False, broker_connection_retry_on_startup=True, result_expires=600)


def note(text: str) -> None:
    """Leave a trace that a test can read."""
    app.backend.client.rpush(NOTES, text)


@app.task(name="plain.tag")  # type: ignore[untyped-decorator]  # celery has no types
def tag(image: str, **_: Any) -> dict[str, Any]:
    """What shiwu does, without doing it."""
    if "missing" in image:
        raise ValueError("source_not_found: no such picture")
    return {"status": "tagged", "image": {"reference": image}}


@app.task(name="plain.reference")  # type: ignore[untyped-decorator]  # celery has no types
def reference(name: str) -> str:
    """The first of a chain, which makes the reference."""
    return name


@app.task(name="plain.best")  # type: ignore[untyped-decorator]  # celery has no types
def best(answer: dict[str, Any]) -> str:
    """What one does with an answer."""
    return f"{answer['status']} {answer['image']['reference']}"


@app.task(name="plain.gather")  # type: ignore[untyped-decorator]  # celery has no types
def gather(answers: list[dict[str, Any]]) -> list[str]:
    """The body of a chord."""
    return [answer["image"]["reference"] for answer in answers]


@app.task(name="plain.note")  # type: ignore[untyped-decorator]  # celery has no types
def take_note(answer: dict[str, Any], word: str) -> None:
    """A link."""
    note(f"{word} {answer['status']}")


@app.task(name="plain.note_error")  # type: ignore[untyped-decorator]  # celery has no types
def note_error(task_id: str) -> None:
    """A link_error."""
    note(f"error {task_id}")
