"""Answers the jobs of all shards of a cluster in a thread of the test, without loaders and without a model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Self

import msgspec
import redis

from shiwu.broker.answers import AnswerEntry, AnswerStore, dead_message
from shiwu.broker.retention import Retention
from shiwu.broker.sharding import PoolOptions, ShardRedis, open_shards
from shiwu.contract import Answer, Status
from shiwu_worker.jobs.job import Claimed
from tests.support.answering import entry_of
from tests.support.redis_parts import make_lease_queue, make_maintenance

RETENTION = Retention(result_ttl_s=600, done_ttl_s=1200, dead_length=1000)


class AnsweringShards:
    """A worker over shards, for as long as the block lasts. A shard that is unavailable is tried again.

    Args:
        more: what an answer has besides, by the id of its job.
    """

    def __init__(self, url: str, *, batch: int = 50, more: Callable[[Answer], Answer] = lambda answer: answer) -> None:
        self._shards = open_shards(url, PoolOptions(timeout_s=2))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._answer, name="answering-shards")
        self._workers = [_ShardWorker(shard, batch=batch, more=more) for shard in self._shards]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=60)
        for shard in self._shards:
            shard.close()

    def _answer(self) -> None:
        while not self._stop.is_set():
            answered = sum(worker.answer() for worker in self._workers)
            self._stop.wait(0.0 if answered else 0.02)


class _ShardWorker:
    def __init__(self, shard: ShardRedis, *, batch: int, more: Callable[[Answer], Answer]) -> None:
        name = f"answering-{shard.shard.index}"
        self._more = more
        self._batch = batch
        self._queue = make_lease_queue(shard, name, lease_s=2.0, bulk_share=1.0)
        self._store = AnswerStore(shard, token=name, retention=lambda: RETENTION)
        self._maintenance = make_maintenance(shard, name)

    def answer(self) -> int:
        """Claim and answer; how many jobs."""
        try:
            jobs = self._queue.claim(self._batch).jobs
            entries = [_entry(job) for job in jobs]
            self._store.write([msgspec.structs.replace(each, answer=self._more(each.answer)) for each in entries])
            if not jobs:
                self._maintenance.run_once()
        except redis.RedisError:
            return 0
        return len(jobs)


def _entry(job: Claimed) -> AnswerEntry:
    """As a worker's: a job without tags becomes a dead letter."""
    entry = entry_of(job)
    if entry.answer.status != Status.REJECTED:
        return entry
    return msgspec.structs.replace(entry, is_dead=True, message=dead_message(job.key, job.raw))
