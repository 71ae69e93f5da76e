"""Makes `database.json` with the code of an earlier version; see README.md for how to run it."""

from __future__ import annotations

import base64
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
from celery import chain
from tests.support.celery_client import celery_client
from tests.support.pictures import picture, png
from tests.support.redis_parts import make_lease_queue, make_maintenance
from tests.support.servers import S3Server, Valkey, WorkerProcess
from tests.support.waiting import wait_until

from shiwu import Client
from shiwu.broker.answers import AnswerEntry, AnswerStore
from shiwu.broker.retention import Retention
from shiwu.contract import CLAIMS, RESULT_STREAM, Answer, ImageInfo, Lane, Status
from shiwu_worker.jobs.job import Release

IMAGE = "s3://pictures/cat.png"
SETTINGS: dict[str, Any] = {"lease_s": 2, "max_batch": 8, "callback_tasks": "plain.*", "marks": "both"}


class Maker:
    """Jobs in all states, on one server."""

    def __init__(self, server: Valkey, s3: S3Server, folder: Path) -> None:
        self.server, self.s3, self.folder = server, s3, folder
        self.redis = server.client()
        self.client = Client(server.url)
        self.ids: list[str] = []
        self.workers = 0

    def enqueue(self, *ids: str, image: str = IMAGE, lane: Lane = Lane.BULK, **options: Any) -> None:
        """Send jobs."""
        for job_id in ids:
            self.client.enqueue(image, id=job_id, lane=lane, **options)
        self.ids += [job_id for job_id in ids if job_id not in self.ids]

    def enqueue_linked(self, *ids: str) -> None:
        """Send jobs with a callback."""
        with celery_client(self.server.url) as app:
            for job_id in ids:
                tag = app.signature("shiwu.tag", args=[IMAGE], queue=Lane.BULK.queue)
                tag.apply_async(task_id=job_id, link=app.signature("plain.note", immutable=True))
        self.ids += ids

    def enqueue_chain(self, job_id: str) -> None:
        """Send a job that another task follows, whose id is that of the job and `-next`."""
        with celery_client(self.server.url) as app:
            tag = app.signature("shiwu.tag", args=[IMAGE], queue=Lane.BULK.queue).set(task_id=job_id)
            chain(tag, app.signature("plain.best").set(task_id=f"{job_id}-next")).apply_async()
        self.ids.append(job_id)

    def answered(self, *ids: str) -> bool:
        """Whether these ids are in the results stream."""
        found: Any = self.redis.xrange(RESULT_STREAM)
        return set(ids) <= {fields[b"id"].decode() for _, fields in found}

    @contextmanager
    def worker(self) -> Iterator[WorkerProcess]:
        """A real worker."""
        self.workers += 1
        name = f"old-{self.workers}"
        with WorkerProcess(
            redis_url=self.server.url, folder=self.folder, name=name, env=self.s3.env, **SETTINGS
        ) as running:
            yield running.wait_ready()

    def answer_by_worker(self) -> None:
        """Tagged jobs, dead letters and a duplicate."""
        self.enqueue("tagged-0", "tagged-1")
        self.enqueue("tagged-2", lane=Lane.INTERACTIVE)
        self.enqueue("dead-0", "dead-1", "requeued-0", image="s3://pictures/missing.png")
        with self.worker():
            wait_until(
                lambda: self.answered("tagged-0", "tagged-1", "tagged-2", "dead-0", "dead-1", "requeued-0"),
                timeout_s=60,
            )
            self.enqueue("tagged-0")
            wait_until(lambda: self.client.queue_state().counters.get("copies_dropped"), timeout_s=30)

    def crash_twice(self) -> None:
        """Two jobs that two workers held when they were killed: the store does not answer meanwhile."""
        store = self.s3._process
        assert store is not None
        os.kill(store.pid, signal.SIGSTOP)
        self.enqueue("crashed-0", "crashed-1")
        for _ in range(2):
            with self.worker() as running:
                wait_until(lambda: self.redis.hlen(CLAIMS) == 2, timeout_s=30)
                running.kill()
        os.kill(store.pid, signal.SIGCONT)
        wait_until(lambda: make_maintenance(self.redis).run_once() and not self.redis.hlen(CLAIMS), timeout_s=30)
        assert self.client.queue_state().suspects == 2

    def hold(self) -> None:
        """What a worker holds that is stopped in the middle: claims, a retry, a held duplicate, callbacks."""
        self.enqueue("later-0", "retried-0", "claimed-0", "claimed-1")
        self.enqueue_linked("linked-0", "linked-1")
        [alone] = make_lease_queue(self.redis, "old-owner").claim(1).jobs
        assert alone.id.startswith("crashed-")
        queue = make_lease_queue(self.redis, "old-held")
        jobs = {job.id: job for job in queue.claim(50).jobs}
        assert {"later-0", "retried-0", "claimed-0", "claimed-1", "linked-0", "linked-1"} <= jobs.keys()
        retry = Release("retried-0", delay_s=600, counts=True, ending="source_unavailable|fetch")
        assert queue.release([retry, Release("later-0", delay_s=3600)]) == 2
        store = AnswerStore(self.redis, token="old-held", retention=Retention, callbacks_reserved_s=0)
        record = Answer(id="linked-0", status=Status.TAGGED, attempts=1, image=ImageInfo(reference=IMAGE))
        message = b"shiwu.bulk|" + jobs["linked-0"].raw
        assert not store.write([AnswerEntry(answer=record, id="linked-0", message=message, has_callbacks=True)])
        queue._announce = lambda *_args, **_kwargs: None  # type: ignore[method-assign]  # as if it crashed before
        self.enqueue("tagged-1")
        assert not queue.claim(50, held=["claimed-0"]).jobs

    def wait_in_lanes(self) -> None:
        """What no worker has seen, or what was answered while it waited."""
        self.enqueue_chain("cancelled-0")
        assert self.client.cancel(["cancelled-0"]) == ["cancelled-0"]
        assert self.client.requeue(["requeued-0"]) == ["requeued-0"]
        self.enqueue("waiting-0", "waiting-1")
        self.enqueue("waiting-2", lane=Lane.INTERACTIVE, priority=3)
        self.enqueue("deadline-0", answer_by_s=60)
        self.redis.xgroup_create(RESULT_STREAM, "archive", id="0")
        assert self.redis.xreadgroup("archive", "old-reader", {RESULT_STREAM: ">"}, count=2)


def text(value: Any) -> Any:
    """Bytes as text where they are UTF-8 and as base64 otherwise; lists of them, and numbers, as they are."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return {"base64": base64.b64encode(value).decode()}
    return [text(each) for each in value] if isinstance(value, list | tuple) else value


def read_key(client: redis.Redis, key: bytes) -> dict[str, Any]:
    """A key as plain data."""
    kind = client.type(key).decode()  # type: ignore[union-attr]  # not awaited
    found: dict[str, Any] = {"key": text(key), "type": kind}
    ttl_ms: Any = client.pttl(key)
    if ttl_ms > 0:
        found["ttl_ms"] = ttl_ms
    value: Any
    if kind == "string":
        value = client.get(key)
    elif kind == "hash":
        value = sorted(client.hgetall(key).items())  # type: ignore[union-attr]  # not awaited
    elif kind == "list":
        value = client.lrange(key, 0, -1)
    elif kind == "set":
        value = sorted(client.smembers(key))  # type: ignore[arg-type]  # not awaited
    elif kind == "zset":
        value = client.zrange(key, 0, -1, withscores=True)
    else:
        value = [[entry, sorted(fields.items())] for entry, fields in client.xrange(key)]  # type: ignore[union-attr]  # not awaited
        found["groups"] = [
            [text(group["name"]), text(group["last-delivered-id"])] for group in client.xinfo_groups(key)
        ]  # type: ignore[union-attr]  # not awaited
    return found | {"value": text(value)}


def main(arguments: Sequence[str]) -> None:
    """Write the database to the file that is named."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Valkey(folder=folder / "valkey") as server, S3Server(folder=folder) as s3:
            s3.put("cat.png", png(picture("熊猫").resize((48, 48))))
            maker = Maker(server, s3, folder)
            maker.answer_by_worker()
            maker.crash_twice()
            maker.hold()
            maker.wait_in_lanes()
            keys = [read_key(maker.redis, key) for key in sorted(maker.redis.keys())]  # type: ignore[arg-type]  # not awaited
            seconds, micros = maker.redis.time()  # type: ignore[misc]  # not awaited
            made_ms = seconds * 1000 + micros // 1000
            data = {"made_ms": made_ms, "ids": sorted(maker.ids), "keys": keys}
            maker.client.close()
            maker.redis.close()
    Path(arguments[0]).write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


main(sys.argv[1:])
