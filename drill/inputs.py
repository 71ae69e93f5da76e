"""Drills with bad input: images that crash the decoder, sources that fail, duplicates."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Set
from dataclasses import replace
from pathlib import Path
from statistics import quantiles
from typing import Any, Final

from tests.support import pictures
from tests.support.picture_server import PictureServer, Reply

from drill.drill_run import DrillRun, Outcome, wrong
from shiwu.contract import RESULT_STREAM, Answer

POISON_SHARE: Final = 0.01
KINDS: Final = ("ABORT", "HANG", "MEMORY")
JOBS_PER_S: Final = 60
"""Arrival rate of the poison drill, well below what a worker can do, so that latencies are meaningful."""
MAX_P95_RATIO: Final = 1.5
"""Promised: the 95th percentile of good images with bad ones among them ÷ that without."""
MIN_JOBS: Final = 1000
"""Fewer jobs give no meaningful 95th percentile, which is then reported and not checked."""
NOISE_MS: Final = 20
"""A smaller difference of two percentiles is noise of the machine."""


def poison(run: DrillRun) -> Outcome:
    """One image in a hundred crashes its decoder, hangs it or fills the memory; other jobs are hardly slower."""
    worker = run.start_worker(env=poison_env(), load_timeout_s=2, loader_spares=2)
    bad = {kind: mark(run, kind) for kind in KINDS}
    _paced(run, run.jobs, {})
    without = _p95(run, skip=frozenset())
    begin = len(run.sent)
    poison_ids = _paced(run, run.jobs, bad)
    run.wait_answers(len(run.sent), timeout_s=300)
    with_poison = _p95(run, skip=frozenset(poison_ids), begin=begin)
    ratio = with_poison / without
    run.breaks = len(poison_ids)
    notes = f"p95 of good images {with_poison:.0f} ms with poison, {without:.0f} ms without: {ratio:.2f} times"
    outcome = run.finish("poison", promised_s=0, notes=f"{len(poison_ids)} bad images; {notes}", only=())
    if run.jobs >= MIN_JOBS and ratio > MAX_P95_RATIO and with_poison - without > NOISE_MS:
        outcome = wrong(outcome, notes)
    outcome = wrong(outcome, *wrong_statuses(outcome, set(poison_ids)))
    return outcome if worker.is_running else wrong(outcome, "the worker ended")


def wrong_statuses(outcome: Outcome, poison_ids: Set[str]) -> list[str]:
    """Complaints unless the jobs without tags are exactly the bad ones."""
    untagged = [f"{job_id} ({why})" for job_id, why in outcome.untagged.items() if job_id not in poison_ids]
    tagged = poison_ids - outcome.untagged.keys()
    complaints = [f"good images without tags: {', '.join(untagged[:5])} of {len(untagged)}"] if untagged else []
    return complaints + ([f"bad images with tags: {sorted(tagged)[:5]} of {len(tagged)}"] if tagged else [])


def poison_env() -> dict[str, str]:
    """The environment of a worker whose decoder fails on marked images."""
    here = str(Path(__file__).parent / "poison")
    path = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{here}{os.pathsep}{path}" if path else here}


def mark(run: DrillRun, kind: str) -> str:
    """Write a good image with a mark after its end, on which the drill's decoder fails."""
    path = run.folder / f"{kind.lower()}.jpg"
    path.write_bytes(pictures.jpeg(pictures.picture()) + f"DRILL-{kind}".encode())
    return path.as_uri()


def _paced(run: DrillRun, count: int, bad: dict[str, str]) -> list[str]:
    """Enqueue at a steady rate; return the ids of the bad ones."""
    poison_ids: list[str] = []
    pause = threading.Event()
    for _ in range(0, count, JOBS_PER_S // 10):
        for _ in range(JOBS_PER_S // 10):
            is_bad = bool(bad) and run.rng.random() < POISON_SHARE
            image = bad[run.rng.choice(KINDS)] if is_bad else run.rng.choice(run.images)
            [job_id] = run.enqueue(1, [image])
            poison_ids += [job_id] if is_bad else []
        pause.wait(0.1)
    if bad and not poison_ids:
        poison_ids = run.enqueue(1, [bad["ABORT"]])
    run.wait_answers(len(run.sent), timeout_s=300)
    return poison_ids


def _p95(run: DrillRun, *, skip: frozenset[str], begin: int = 0) -> float:
    wanted = set(run.sent[begin:]) - skip
    found: Any = run.client.xrange(RESULT_STREAM)
    answers = [Answer.from_json(fields[b"answer"]) for _, fields in found if fields[b"id"].decode() in wanted]
    return quantiles([answer.timing.total for answer in answers], n=20)[-1]


def source(run: DrillRun) -> Outcome:
    """HTTP and S3 that answer slowly, with 503, with half a body, with resets, in turns, and well in the end."""
    server: PictureServer = run.enter(PictureServer())
    data = [pictures.jpeg(pictures.picture(sample.label)) for sample in pictures.samples()[:6]]
    env = {"AWS_ACCESS_KEY_ID": "drill", "AWS_SECRET_ACCESS_KEY": "drill", "AWS_DEFAULT_REGION": "us-east-1"}
    worker = run.start_worker(
        allow_hosts=server.host, s3_endpoint_url=f"http://{server.host}", env=env, fetch_timeout_s=3, read_timeout_s=1
    )
    for number in range(run.jobs):
        path = f"/pictures/{number}.jpg"
        url = server.serve(path, *flaky_replies(run, run.rng.choice(data)))
        run.enqueue(1, [url if number % 2 else f"s3://pictures/{number}.jpg"])
    outcome = run.finish("source", promised_s=0, timeout_s=240)
    return outcome if worker.is_running else wrong(outcome, "the worker ended")


def flaky_replies(run: DrillRun, body: bytes) -> list[Reply]:
    """Up to three bad replies, then the image."""
    good = Reply.picture(body)
    bad = (Reply.error(503), Reply.cut(body, missing_bytes=500), good.late(first_pause_s=0.3), Reply.error(500))
    return [*(run.rng.choice(bad) for _ in range(run.rng.randrange(4))), good]


def duplicates(run: DrillRun) -> Outcome:
    """The same id several times, from both lanes, also after its answer: one answer each."""
    run.start_workers(2)
    for _ in range(run.rounds):
        base = len(run.sent)
        ids = run.enqueue(run.jobs)
        copies = [job_id for job_id in ids for _ in range(run.rng.randrange(3))]
        run.rng.shuffle(copies)
        run.enqueue(len(copies), ids=copies)
        run.wait_answers(base + run.jobs // 2)
        run.enqueue(run.jobs, ids=run.rng.sample(ids, run.jobs // 2))
        run.wait_answers(base + run.jobs)
    outcome = run.finish("duplicates", promised_s=0)
    dropped = Counter(run._counters())["duplicates_dropped"]
    return replace(outcome, notes=f"{dropped} duplicates were dropped")
