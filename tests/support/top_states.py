"""A service in a known state, for `shiwu top`: lanes, answers, workers, dead letters and a backfill."""

from __future__ import annotations

from typing import Any, Final

import redis

from shiwu import Client
from shiwu.broker.answers import AnswerEntry
from shiwu.broker.server_clock import server_time_ms
from shiwu.broker.worker_state import WorkerState, write_worker_state
from shiwu.contract import (
    BACKFILL,
    BACKFILLS,
    WORKERS,
    Answer,
    ErrorCode,
    ErrorInfo,
    ImageInfo,
    Lane,
    Stage,
    Status,
    Timing,
)
from tests.support.redis_parts import make_answer_store, message

IMAGE: Final = "https://example.org/panda.jpg"
GPU_WORKER: Final = WorkerState(
    version="0.1.0",
    uptime_s=7300.0,
    images_per_s=812.4,
    batch=118.0,
    max_batch=128,
    limit="device",
    device_share=0.97,
    in_flight=431,
    slots=512,
    loaders=8,
    device="NVIDIA L4",
    memory_bytes=3_200_000_000,
    memory_total_bytes=23_000_000_000,
    model="OFA-Sys/chinese-clip-vit-base-patch16",
    revision="36e679e65c2a2fead755ae21162091293ad37834",
    dtype="bfloat16",
    labels="everyday-zh",
    labels_digest="3ea8fe1f401d44e55442d9a87ff1be2d",
)


def fill(client: redis.Redis, url: str) -> None:
    """A busy service: 40 and 3 waiting jobs, 60 tagged answers, two workers, dead letters of two codes, a backfill."""
    with Client(url) as producer:
        list(producer.enqueue_many([IMAGE] * 40, lane="bulk"))
        list(producer.enqueue_many([IMAGE] * 3, lane="interactive"))
    add_answers(client, 60)
    add_dead(client, "slow", 3, code=ErrorCode.SOURCE_UNAVAILABLE)
    add_dead(client, "gone", 2, code=ErrorCode.SOURCE_NOT_FOUND)
    add_worker(client, "gpu-host-0", GPU_WORKER)
    add_worker(client, "gpu-host-1", None)
    add_backfill(client, "night", phase="running", owner="x", read="900", sent="800", **{"status:tagged": "700"})


def add_answers(client: redis.Redis, count: int, *, lane: Lane = Lane.BULK, first: int = 0) -> None:
    """Tagged answers; encode takes half of the time of each."""
    times = Timing(queue=20.0, claim=1.0, fetch=20.0, decode=5.0, batch=3.5, encode=50.0, score=0.5, total=100.0)
    entries = [
        AnswerEntry(
            id=f"a{number}",
            answer=Answer(id=f"a{number}", status=Status.TAGGED, timing=times, lane=lane, worker="gpu-host-0"),
        )
        for number in range(first, first + count)
    ]
    make_answer_store(client, "gpu-host-0").write(entries)


def add_dead(client: redis.Redis, name: str, count: int, *, code: ErrorCode) -> None:
    """Dead letters `name0`, `name1`, …, whose jobs failed in fetch."""
    entries = []
    for number in range(count):
        job_id = f"{name}{number}"
        failed = Answer(
            id=job_id,
            status=Status.FAILED,
            error=ErrorInfo(code=code, message=f"the source of {job_id} did not answer", stage=Stage.FETCH),
            image=ImageInfo(reference=IMAGE),
            worker="gpu-host-0",
            attempts=3,
        )
        raw = Lane.BULK.queue.encode() + b"|" + message(job_id, Lane.BULK)
        entries.append(AnswerEntry(answer=failed, id=job_id, message=raw, is_dead=True))
    make_answer_store(client, "gpu-host-0").write(entries)


def add_worker(client: redis.Redis, name: str, state: WorkerState | None) -> None:
    """A worker with a heartbeat now; None: of a version that tells nothing else."""
    client.zadd(WORKERS, {name: server_time_ms(client)})
    if state is not None:
        write_worker_state(client, name, state)


def add_backfill(client: redis.Redis, name: str, **fields: Any) -> None:
    """A backfill with these fields, whose process has just written."""
    now_ms = server_time_ms(client)
    client.zadd(BACKFILLS, {name: now_ms})
    mapping: dict[Any, Any] = {"heartbeat_ms": str(now_ms), **fields}
    client.hset(f"{BACKFILL}{name}", mapping=mapping)
