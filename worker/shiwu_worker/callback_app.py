"""The Celery app that sends callbacks: what it is asked to send is judged once more, and it runs no task itself."""

from __future__ import annotations

import ssl
from typing import Any, Final
from urllib.parse import quote

from celery import Celery
from kombu import Producer

from shiwu.connection import read_sentinel_url
from shiwu.contract import TASK_NAME, Lane
from shiwu_worker.callback_rules import CallbackRules
from shiwu_worker.config import Settings

PASSED: Final = frozenset(
    {"countdown", "eta", "expires", "task_id", "root_id", "parent_id", "group_id", "group_index", "retries", "priority"}
    | {"link", "link_error", "chain", "chord", "add_to_parent", "reply_to", "time_limit", "soft_time_limit", "shadow"}
    | {"replaced_task_nesting", "queue", "ignore_result", "compression", "stamped_headers", "headers"}
)
"""What a signature says of how it is sent. All else could lead it elsewhere, or into another form than JSON."""


class CallbackApp(Celery):  # type: ignore[misc]  # celery has no types
    """Every message that leaves it comes through `send_task`."""

    def __init__(self, rules: CallbackRules, **config: Any) -> None:
        super().__init__("shiwu-callbacks", set_as_current=False)
        self.conf.update(config)
        self._rules = rules
        self.finalize()
        # An errback whose task is known here is called, in this process and with what a stranger wrote.
        self.tasks.clear()

    def send_task(self, name: str, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Send one task.

        Raises:
            RequestError: the operator did not allow it, or what it carries on.
        """
        self._rules.judge_sent(name, options)
        kept = {key: value for key, value in options.items() if key in PASSED}
        if isinstance(producer := options.get("producer"), Producer):
            kept["producer"] = producer
        stamps = kept.get("stamped_headers") or []
        kept |= {stamp: options[stamp] for stamp in stamps if stamp not in kept and stamp in options}
        return super().send_task(name, args, kwargs, **kept)


def make_callback_app(settings: Settings) -> Celery:
    """The app that sends callbacks, with results in our Redis."""
    broker = celery_broker(settings)
    return CallbackApp(
        settings.callback_rules,
        **broker,
        result_backend=broker["broker_url"],
        result_backend_transport_options=broker["broker_transport_options"],
        redis_socket_timeout=settings.redis_timeout_s,
        redis_socket_connect_timeout=settings.redis_timeout_s,
        result_expires=settings.result_ttl_s,
        accept_content=["json"],
        task_serializer="json",
        result_serializer="json",
        task_default_queue=settings.callback_queue,
        task_routes={TASK_NAME: {"queue": Lane.BULK.queue}},
    )


def celery_broker(settings: Settings) -> dict[str, Any]:
    """Our Redis in kombu's words."""
    url = settings.redis_url.get_secret_value()
    options: dict[str, Any] = {
        "socket_timeout": settings.redis_timeout_s,
        "socket_connect_timeout": settings.redis_timeout_s,
        "socket_keepalive": True,
        "health_check_interval": 30,
        "priority_steps": [0],
    }
    if url.startswith("sentinel:"):
        address = read_sentinel_url(url)
        login = f"{quote(address.username or '')}:{quote(address.password)}@" if address.password else ""
        hosts = (f"sentinel://{login}{host}:{port}" for host, port in address.hosts)
        url = ";".join(f"{host}/{address.database}" for host in hosts)
        options |= {"master_name": address.name, "sentinel_kwargs": {"password": address.sentinel_password}}
    return {
        "broker_url": url,
        "broker_transport_options": options,
        "broker_use_ssl": {"ssl_cert_reqs": ssl.CERT_REQUIRED} if url.startswith("rediss:") else None,
    }
