"""Celery's side of commits: opens the senders of callbacks and of task events, and the revoker."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final

from celery.worker import state

from shiwu.contract import TASK_NAME
from shiwu_worker.celery_worker.callback_app import make_callback_app
from shiwu_worker.celery_worker.callbacks import CallbackSender
from shiwu_worker.celery_worker.revoke import Revoker, ShardedRevoker
from shiwu_worker.celery_worker.task_events import TaskEventSender
from shiwu_worker.config.settings import Settings
from shiwu_worker.config.views import callback_rules
from shiwu_worker.jobs.outcome import CommittedJob
from shiwu_worker.service.factories import CELERY_CONNECTIONS, connect_shards, make_answer_store

SENDERS_CLOSE_S: Final = 5.0


class Senders:
    """The threads that tell Celery's side about commits. They end together, within SENDERS_CLOSE_S.

    Args:
        callbacks: one for each shard, in the order of their indexes; one without a cluster.
        events: for the jobs of all shards.
    """

    def __init__(self, callbacks: Sequence[CallbackSender], events: Sequence[TaskEventSender]) -> None:
        self._callbacks = callbacks
        self._events = events
        self._all: Sequence[CallbackSender | TaskEventSender] = (*callbacks, *events)
        self._until_s: float | None = None

    def put(self, committed: Sequence[CommittedJob]) -> None:
        """Queue the jobs of a commit. Never blocks."""
        state.total_count[TASK_NAME] += len(committed)
        by_shard: dict[int, list[CommittedJob]] = {}
        for item in committed:
            by_shard.setdefault(item.job.shard, []).append(item)
        for shard, portion in by_shard.items():
            self._callbacks[shard].put(portion)
        for sender in self._events:
            sender.put(committed)

    def start(self) -> None:
        """Start the threads."""
        for sender in self._all:
            sender.start()

    def ask_to_end(self) -> None:
        """Let the threads end once they have sent what is queued, without waiting for them."""
        if self._until_s is None:
            self._until_s = time.monotonic() + SENDERS_CLOSE_S
            for sender in self._all:
                sender.ask_to_end()

    def close(self) -> None:
        """Wait until the threads have ended."""
        self.ask_to_end()
        for sender in self._all:
            sender.close(timeout_s=max(0.0, (self._until_s or 0.0) - time.monotonic()))


@contextmanager
def open_senders(worker: Any, settings: Settings) -> Iterator[Senders]:
    """Start the senders of callbacks and, with `-E`, of task events; give the app what carries out revokes."""
    with ExitStack() as stack:
        # Callbacks that a refused command leaves wait for half a minute, and a revoke is lost.
        retries = 1 if settings.redis_address.shards else 0
        clients = connect_shards(settings, connections=CELERY_CONNECTIONS, retries=retries)
        for client in clients:
            stack.enter_context(client)
        if settings.revoke:
            token = f"revoke.{secrets.token_hex(4)}"
            revokers = [Revoker(client, make_answer_store(settings, client, token)) for client in clients]
            worker.app.shiwu_revoker = revokers[0] if len(revokers) == 1 else ShardedRevoker(revokers)
        rules = callback_rules(settings)
        callbacks = [
            CallbackSender(make_callback_app(settings, shard=shard), client, rules=rules, shard=shard)
            for shard, client in enumerate(clients)
        ]
        events = [TaskEventSender(worker.app, hostname=worker.hostname)] if worker.task_events else []
        senders = Senders(callbacks, events)
        senders.start()
        stack.callback(senders.close)
        yield senders
