"""shiwu's message path with a stand-in model: everything between Redis and Redis but loaders and torch.

Run as a process: `python -m bench.standin --redis-url URL --jobs N --per-batch-ms B --per-picture-ms A`. It claims,
admits, batches, "encodes" for A·n + B ms, scores, serialises real answers and commits them, until N are answered.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import redis

from shiwu.contract import COUNTERS, ModelInfo, Tag
from shiwu.ledger import Ledger
from shiwu_worker.errors import Trouble
from shiwu_worker.job import Job
from shiwu_worker.labels import LabelSet, inline_label_set
from shiwu_worker.pipeline import Limits, Pipeline, Stages
from shiwu_worker.settle import Away, Settler
from shiwu_worker.stages.batch import Batcher
from shiwu_worker.stages.claim import Claims, Doorbell
from shiwu_worker.stages.commit import Committer
from shiwu_worker.timing import Progress
from shiwu_worker.triage import Triage

MODEL = ModelInfo(id="stand-in", revision="0", dtype="none", device="none")
TAGS = tuple(Tag(label=word, score=0.2, cosine=0.1) for word in ("动物", "人物", "交通工具", "食物", "建筑"))


def build(
    url: str, *, slots: int, cap: int, per_picture_ms: float, per_batch_ms: float
) -> tuple[Pipeline, Settler, Doorbell]:
    """A pipeline whose loaders and model take no CPU of their own."""
    client = redis.Redis.from_url(url, socket_timeout=30)
    token = f"bench{os.getpid()}"
    claims = Claims(client, token=token, lease_s=60, bulk_share=0.1)
    committer = Committer(Ledger(client, token=token, result_ttl_s=3600, done_ttl_s=7200), worker=token)
    labels: LabelSet = inline_label_set(tuple(tag.label for tag in TAGS), head="softmax")

    def encode(pixels: np.ndarray) -> np.ndarray:
        if wait_ms := per_picture_ms * len(pixels) + per_batch_ms:
            time.sleep(wait_ms / 1000)
        return pixels

    def load(tickets: Sequence[tuple[int, Job]]) -> None:
        now_s = time.monotonic()
        pipeline.loaded(
            [
                SimpleNamespace(
                    ticket=n, started_s=now_s, fetched_s=now_s, decoded_s=now_s, n_bytes=1, format="JPEG",
                    width=1, height=1, sha256=None, error=None,
                )
                for n, _ in tickets
            ]
        )  # fmt: skip

    def score(jobs: Sequence[Job], _: np.ndarray) -> None:
        for job in jobs:
            job.tags, job.model = TAGS, MODEL

    def fatal(error: BaseException) -> None:
        raise SystemExit(str(error))

    settler = Settler(
        committer, claims, away=Away("commit"), on_settled=lambda jobs: pipeline.settled(jobs),  # noqa: PLW0108 bound late
        on_answered=None, on_fatal=fatal,
    )  # fmt: skip
    doorbell = Doorbell(redis.Redis.from_url(url, socket_timeout=30))
    batcher: Batcher[Job] = Batcher(cap=cap, bulk_share=0.1)
    triage = Triage(
        pixels=np.zeros((slots, 1), np.uint8), encode=encode, encode_exact=encode, score=score,
        trouble=lambda _: Trouble.OTHER, lower_cap=batcher.lower_cap,
    )  # fmt: skip
    pipeline = Pipeline(
        Stages(
            claims=claims,
            doorbell=doorbell,
            resolve=lambda _: labels,
            load=load,
            batcher=batcher,
            encode_and_score=triage.run,
            settle=settler.put,
            away=Away("claim"),
        ),
        Limits(slots=slots, max_attempts=3),
        progress=Progress(),
        on_fatal=fatal,
    )
    return pipeline, settler, doorbell


def main() -> None:
    """Answer the backlog and print how long it took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--redis-url", required=True)
    parser.add_argument("--jobs", type=int, required=True)
    parser.add_argument("--slots", type=int, default=1024)
    parser.add_argument("--cap", type=int, default=256)
    parser.add_argument("--per-picture-ms", type=float, default=0.0)
    parser.add_argument("--per-batch-ms", type=float, default=0.0)
    parser.add_argument("--limit-s", type=float, default=300.0)
    asked = parser.parse_args()
    client = redis.Redis.from_url(asked.redis_url)
    pipeline, settler, doorbell = build(
        asked.redis_url,
        slots=asked.slots,
        cap=asked.cap,
        per_picture_ms=asked.per_picture_ms,
        per_batch_ms=asked.per_batch_ms,
    )
    began_s = time.monotonic()
    settler.start()
    doorbell.start()
    pipeline.start()
    pause = threading.Event()
    while int(client.hget(COUNTERS, "answered") or 0) < asked.jobs and time.monotonic() - began_s < asked.limit_s:
        pause.wait(0.02)
    took_s = time.monotonic() - began_s
    answered = int(client.hget(COUNTERS, "answered") or 0)
    print(json.dumps({"answered": answered, "seconds": took_s, "cpu_seconds": time.process_time()}))
    pipeline.stop(grace_s=1.0)
    settler.close(timeout_s=5.0)


if __name__ == "__main__":
    main()
