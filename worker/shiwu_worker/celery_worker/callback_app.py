"""The Celery app that sends callbacks. It checks each message against the rules, and never runs a task itself."""

from __future__ import annotations

from typing import Any, Final

from celery import Celery
from kombu import Producer
from kombu.exceptions import OperationalError

from shiwu.contract import TASK_NAME, Lane
from shiwu_worker.celery_worker.celery_redis import backend_config, broker_config
from shiwu_worker.config.settings import Settings
from shiwu_worker.config.views import callback_rules
from shiwu_worker.policy.callback_rules import CallbackRules

ALLOWED_OPTIONS: Final = frozenset(
    {"countdown", "eta", "expires", "task_id", "root_id", "parent_id", "group_id", "group_index", "retries", "priority"}
    | {"link", "link_error", "chain", "chord", "add_to_parent", "reply_to", "time_limit", "soft_time_limit", "shadow"}
    | {"replaced_task_nesting", "queue", "ignore_result", "compression", "stamped_headers", "headers"}
)
"""Options of a signature that are passed on. Others could change the destination or the serializer."""


class CallbackApp(Celery):  # type: ignore[misc]  # celery has no types
    """An app whose messages all pass through `send_task`."""

    def __init__(self, rules: CallbackRules, **config: Any) -> None:
        super().__init__("shiwu-callbacks", set_as_current=False)
        self.conf.update(config)
        self._rules = rules
        self.finalize()
        # Celery would run a known errback task in this process, with arguments from the message.
        self.tasks.clear()

    def send_task(self, name: str, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Send one task.

        Raises:
            RequestError: the operator does not allow the task, its queue, or a callback in its options.
        """
        self._rules.check_sent(name, options)
        passed = {key: value for key, value in options.items() if key in ALLOWED_OPTIONS}
        if isinstance(producer := options.get("producer"), Producer):
            passed["producer"] = producer
        stamps = passed.get("stamped_headers") or []
        passed |= {stamp: options[stamp] for stamp in stamps if stamp not in passed and stamp in options}
        return super().send_task(name, args, kwargs, **passed)


def make_callback_app(settings: Settings, *, shard: int = 0) -> Celery:
    """Return the app that sends callbacks, with results in the Redis of the worker or in a shard of its cluster."""
    address = settings.redis_address
    return CallbackApp(
        callback_rules(settings),
        **broker_config(address, timeout_s=settings.redis_timeout_s, shard=shard),
        **backend_config(address, timeout_s=settings.redis_timeout_s, shard=shard),
        result_expires=settings.result_ttl_s,
        accept_content=["json"],
        task_serializer="json",
        result_serializer="json",
        task_default_queue=settings.callback_queue,
        task_routes={TASK_NAME: {"queue": Lane.BULK.queue}},
    )


def check_callbacks(settings: Settings) -> str:
    """Ping Redis through Celery's connections, which send callbacks and store their results.

    Raises:
        redis.RedisError: Celery does not reach Redis.
    """
    shards = settings.redis_address.shards
    for shard in range(max(1, shards)):
        _ping(make_callback_app(settings, shard=shard))
    where = f"the {shards} shards" if shards else "the same Redis"
    return f"Celery reaches {where}, for callbacks and their results"


def _ping(app: Celery) -> None:
    try:
        with (
            app.connection_for_write() as connection,
            connection.channel() as channel,
            channel.conn_or_acquire() as client,
        ):
            client.ping()
        app.backend.client.ping()
    except OperationalError as error:
        raise error.__cause__ or error from None
    finally:
        app.close()
