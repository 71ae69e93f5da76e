"""Client of shiwu: enqueue images, wait for tags, read the results stream.

    from shiwu import Client

    with Client() as client:
        job_id = client.enqueue("s3://pictures/cat.jpg", labels="six-zh")
        print(client.wait(job_id, timeout_s=30).best)

Names other than the errors are loaded when they are first used, so that `import shiwu.contract` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Imported now because Celery's `AsyncResult.get()` finds `JobFailed` only in a loaded module. Otherwise Celery raises a
# class of its own, which `except shiwu.JobFailed` does not catch.
from shiwu.errors import ForeignResult, JobFailed, QueueFull, RedisUrlError, ShiwuError, WaitTimeout

if TYPE_CHECKING:
    from shiwu.broker.queue_stats import QueueState
    from shiwu.broker.redis_errors import ConnectionsBusy, NotReplicated
    from shiwu.client.client import Client
    from shiwu.client.dead_letters import DeadFilter, DeadLetter
    from shiwu.client.items import job_id_for
    from shiwu.client.results import TagResult
    from shiwu.client.stream_items import StreamItem, UnreadableItem
    from shiwu.contract import Answer, Lane, RequestError, Status

_HOMES = {
    "Client": "client.client",
    "DeadFilter": "client.dead_letters",
    "DeadLetter": "client.dead_letters",
    "ConnectionsBusy": "broker.redis_errors",
    "NotReplicated": "broker.redis_errors",
    "QueueState": "broker.queue_stats",
    "Answer": "contract",
    "Lane": "contract",
    "RequestError": "contract",
    "Status": "contract",
    "StreamItem": "client.stream_items",
    "TagResult": "client.results",
    "UnreadableItem": "client.stream_items",
    "job_id_for": "client.items",
}

__all__ = [
    "Answer",
    "Client",
    "ConnectionsBusy",
    "DeadFilter",
    "DeadLetter",
    "ForeignResult",
    "JobFailed",
    "Lane",
    "NotReplicated",
    "QueueFull",
    "QueueState",
    "RedisUrlError",
    "RequestError",
    "ShiwuError",
    "Status",
    "StreamItem",
    "TagResult",
    "UnreadableItem",
    "WaitTimeout",
    "job_id_for",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"shiwu.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
