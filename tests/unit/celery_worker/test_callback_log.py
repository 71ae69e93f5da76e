"""What the thread of callbacks logs while Redis is away."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import redis
import structlog
from celery import Celery

from shiwu_worker.celery_worker import callbacks as canvas
from shiwu_worker.celery_worker.callbacks import CallbackSender
from shiwu_worker.jobs.outcome import CommittedJob
from shiwu_worker.policy.callback_rules import CallbackRules


def test_postponed_callbacks_are_logged_only_if_any(
    monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., Any]
) -> None:
    """A look for other workers' callbacks that finds no Redis says nothing; a job of this worker is counted."""
    monkeypatch.setattr(canvas, "POLL_EVERY_S", 0.01)
    asked: list[list[bytes]] = []

    def away(*, keys: list[str], args: list[Any]) -> None:
        asked.append(args[2:])
        raise redis.ConnectionError("away")

    with structlog.testing.capture_logs() as logged:
        monkeypatch.setattr(canvas, "log", structlog.get_logger())
        callbacks = CallbackSender(Celery("x", set_as_current=False), redis.Redis(port=1), rules=CallbackRules())
        callbacks._take = away
        callbacks.start()
        wait_until(lambda: len(asked) >= 3, timeout_s=5)
        assert logged == []
        job = SimpleNamespace(id="a", has_callbacks=True, generation=0)
        callbacks.put([cast("CommittedJob", SimpleNamespace(job=job, entry=job, is_first=True))])
        wait_until(lambda: [b"a"] in asked, timeout_s=5)
        callbacks.close(timeout_s=5)
    [line] = [line for line in logged if line["event"] == "callbacks_postponed"]
    assert line["jobs"] == 1
