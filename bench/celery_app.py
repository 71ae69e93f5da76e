"""The Celery application of every peer: settings that lose no job and have no avoidable cost."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from celery import Celery
from celery.signals import worker_ready

URL: Final = os.environ.get("BENCH_REDIS_URL", "redis://127.0.0.1:6379/0")
READY_FILE: Final = os.environ.get("BENCH_READY_FILE", "")
TASK: Final = "shiwu.tag"
WORDS: Final = ("动物", "人物", "交通工具", "食物", "建筑", "植物")
TOP: Final = 5
SETTINGS_TEXT: Final = "acks_late, JSON, results in Redis, no events, no gossip, mingle, heartbeat or remote control"


def make_app(name: str) -> Celery:
    """Return an app with broker and results in the benchmark's Redis, which acknowledges late, as shiwu does."""
    app = Celery(name, broker=URL, backend=URL)
    app.conf.update(
        task_acks_late=True,
        worker_send_task_events=False,
        worker_enable_remote_control=False,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
        # One list for each queue instead of four, so every BRPOP names a quarter of the keys.
        broker_transport_options={"priority_steps": [0]},
    )
    return app


@worker_ready.connect  # type: ignore[untyped-decorator]  # celery has no types
def _touch_ready_file(**_: Any) -> None:
    if READY_FILE:
        Path(READY_FILE).touch()
