"""`python -m tests.support.answering`: claims jobs and answers them at once, without loaders and without a model.

It uses the worker's own claims, leases and commits, so it can be killed like a worker. References that contain `broken`
are answered `rejected`. It takes over jobs of crashed ones, as a worker's heartbeat does.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final, Self

import redis

from shiwu.broker.answers import AnswerEntry, AnswerStore
from shiwu.broker.message_reader import read_message
from shiwu.broker.retention import Retention
from shiwu.contract import Answer, ErrorCode, ErrorInfo, ImageInfo, RequestError, Status, Tag, Timing, moment
from shiwu_worker.jobs.job import Claimed
from tests.support.processes import Process, clean_environment
from tests.support.redis_parts import make_lease_queue, make_maintenance

LEASE_S: Final = 1.0
SWEEP_EVERY_S: Final = 0.3


class AnsweringWorker(Process):
    """The program as a process of a test."""

    def __init__(
        self, *, redis_url: str, folder: Path, name: str = "answering", pause_ms: float = 0.0, batch: int = 500
    ) -> None:
        command = [sys.executable, "-m", "tests.support.answering", "--redis-url", redis_url]
        command += ["--pause-ms", str(pause_ms), "--batch", str(batch)]
        super().__init__(command, name=name, folder=folder, env=clean_environment({}))


class AnsweringThread:
    """The same in a thread of the test, for as long as the block lasts."""

    def __init__(self, redis_url: str, *, batch: int = 20) -> None:
        self._url = redis_url
        self._batch = batch
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._answer, name="answering")

    def _answer(self) -> None:
        with redis.Redis.from_url(self._url, socket_timeout=10) as client:
            answer_jobs(client, "answering-thread", pause_s=0.0, batch=self._batch, stop=self._stop)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=20)


def main() -> None:
    """Answer until the process is killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--redis-url", required=True)
    parser.add_argument("--pause-ms", type=float, default=0.0, help="between two batches")
    parser.add_argument("--batch", type=int, default=500)
    asked = parser.parse_args()
    with redis.Redis.from_url(asked.redis_url, socket_timeout=10) as client:
        name = f"answering-{os.getpid()}"
        answer_jobs(client, name, pause_s=asked.pause_ms / 1000, batch=asked.batch, stop=threading.Event())


def answer_jobs(client: redis.Redis, name: str, *, pause_s: float, batch: int, stop: threading.Event) -> None:
    """Claim and answer jobs until the event is set."""
    queue = make_lease_queue(client, name, lease_s=LEASE_S, bulk_share=1.0)
    maintenance = make_maintenance(client, name)
    retention = Retention(result_ttl_s=600, done_ttl_s=1200, dead_length=10)
    answers = AnswerStore(client, token=name, retention=lambda: retention)
    swept_s = 0.0
    while not stop.is_set():
        if time.monotonic() - swept_s > SWEEP_EVERY_S:
            swept_s = time.monotonic()
            maintenance.sweep()
        jobs = queue.claim(batch).jobs
        answers.write([entry_of(job) for job in jobs])
        stop.wait(pause_s if jobs else 0.005)


def entry_of(job: Claimed) -> AnswerEntry:
    """The answer of a job."""
    try:
        envelope = read_message(job.raw)
    except RequestError as error:
        info = ErrorInfo(code=error.code, message=str(error))
        return AnswerEntry(id=job.id, answer=Answer(id=job.id, status=Status.REJECTED, error=info))
    reference = str(envelope.fields["image"])
    metadata = envelope.fields.get("metadata")
    about: dict[str, Any] = {"id": job.id, "attempts": job.attempt, "metadata": metadata, "worker": "answering"}
    timing = Timing(total=max(0.1, job.claimed_ms - (envelope.sent_ms or job.claimed_ms)))
    answered_at = moment(job.claimed_ms)
    if "broken" in reference:
        info = ErrorInfo(code=ErrorCode.SOURCE_NOT_FOUND, message="no such image")
        answer = Answer(status=Status.REJECTED, error=info, answered_at=answered_at, timing=timing, **about)
        return AnswerEntry(id=job.id, answer=answer, generation=job.generation)
    answer = Answer(
        status=Status.TAGGED,
        image=ImageInfo(reference=reference, format="JPEG", width=1, height=1, bytes=1, sha256="0" * 64),
        tags=(Tag(label="猫", score=0.9, cosine=0.2),),
        answered_at=answered_at,
        timing=timing,
        **about,
    )
    return AnswerEntry(id=job.id, answer=answer, generation=job.generation)


if __name__ == "__main__":
    main()
