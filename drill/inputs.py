"""Drills with bad input: poisonous pictures, sources that fail in turns, the same id again and again."""

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

from drill.field import Field, Outcome, wrong
from shiwu.contract import RESULT_STREAM, Answer

POISON_SHARE: Final = 0.01
KINDS: Final = ("ABORT", "HANG", "MEMORY")
PER_SECOND: Final = 60
"""Arrivals in the poison drill: some way below what a worker can do, so that latencies mean something."""
NEIGHBOURS: Final = 1.5
"""Promised: with poison the 95th percentile of the others' latency is at most this many times the one without."""
ENOUGH: Final = 1000
"""Jobs from which a 95th percentile means something; a shorter drill only tells it."""
FEW: Final = 20
"""Milliseconds below which a difference of two percentiles is the machine's noise."""


def poison(field: Field) -> Outcome:
    """One picture in a hundred aborts its decoder, hangs it or eats memory; the neighbours hardly notice."""
    worker = field.worker(env=poison_env(), load_timeout_s=2, loader_spares=2)
    bad = {kind: mark(field, kind) for kind in KINDS}
    _paced(field, field.jobs, {})
    without = _p95(field, skip=frozenset())
    begin = len(field.sent)
    guilty = _paced(field, field.jobs, bad)
    field.wait_answers(len(field.sent), timeout_s=300)
    with_poison = _p95(field, skip=frozenset(guilty), begin=begin)
    ratio = with_poison / without
    field.breaks = len(guilty)
    notes = f"p95 of the neighbours {with_poison:.0f} ms with poison, {without:.0f} ms without: {ratio:.2f} times"
    outcome = field.finish("poison", promised_s=0, notes=f"{len(guilty)} poisonous; {notes}", only=())
    if field.jobs >= ENOUGH and ratio > NEIGHBOURS and with_poison - without > FEW:
        outcome = wrong(outcome, notes)
    outcome = wrong(outcome, *misjudged(outcome, set(guilty)))
    return outcome if worker.is_running else wrong(outcome, "the worker ended")


def misjudged(outcome: Outcome, guilty: Set[str]) -> list[str]:
    """Complaints unless the ids without tags are exactly the poisonous ones."""
    blamed = [f"{job_id} ({why})" for job_id, why in outcome.untagged.items() if job_id not in guilty]
    tagged = guilty - outcome.untagged.keys()
    complaints = [f"innocent and without tags: {', '.join(blamed[:5])} of {len(blamed)}"] if blamed else []
    return complaints + ([f"poisonous and tagged: {sorted(tagged)[:5]} of {len(tagged)}"] if tagged else [])


def poison_env() -> dict[str, str]:
    """The environment of a worker whose decoder breaks on marked pictures."""
    here = str(Path(__file__).parent / "poison")
    path = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{here}{os.pathsep}{path}" if path else here}


def mark(field: Field, kind: str) -> str:
    """A good picture with a mark behind its end, on which the drill's decoder breaks."""
    path = field.folder / f"{kind.lower()}.jpg"
    path.write_bytes(pictures.jpeg(pictures.picture()) + f"DRILL-{kind}".encode())
    return path.as_uri()


def _paced(field: Field, count: int, bad: dict[str, str]) -> list[str]:
    """Enqueue at a steady rate; return the ids of the poisonous ones."""
    guilty: list[str] = []
    pause = threading.Event()
    for _ in range(0, count, PER_SECOND // 10):
        for _ in range(PER_SECOND // 10):
            is_bad = bool(bad) and field.chance.random() < POISON_SHARE
            image = bad[field.chance.choice(KINDS)] if is_bad else field.chance.choice(field.images)
            [job_id] = field.enqueue(1, [image])
            guilty += [job_id] if is_bad else []
        pause.wait(0.1)
    if bad and not guilty:
        guilty = field.enqueue(1, [bad["ABORT"]])
    field.wait_answers(len(field.sent), timeout_s=300)
    return guilty


def _p95(field: Field, *, skip: frozenset[str], begin: int = 0) -> float:
    wanted = set(field.sent[begin:]) - skip
    found: Any = field.client.xrange(RESULT_STREAM)
    answers = [Answer.from_json(fields[b"answer"]) for _, fields in found if fields[b"id"].decode() in wanted]
    return quantiles([answer.timing.total for answer in answers], n=20)[-1]


def source(field: Field) -> Outcome:
    """HTTP and S3 that answer slowly, with 503, with half a body, with resets, in turns, and well in the end."""
    server: PictureServer = field.enter(PictureServer())
    data = [pictures.jpeg(pictures.picture(sample.label)) for sample in pictures.samples()[:6]]
    env = {"AWS_ACCESS_KEY_ID": "drill", "AWS_SECRET_ACCESS_KEY": "drill", "AWS_DEFAULT_REGION": "us-east-1"}
    worker = field.worker(
        allow_hosts=server.host, s3_endpoint_url=f"http://{server.host}", env=env, fetch_timeout_s=3, read_timeout_s=1
    )
    for number in range(field.jobs):
        path = f"/pictures/{number}.jpg"
        url = server.serve(path, *moody(field, field.chance.choice(data)))
        field.enqueue(1, [url if number % 2 else f"s3://pictures/{number}.jpg"])
    outcome = field.finish("source", promised_s=0, timeout_s=240)
    return outcome if worker.is_running else wrong(outcome, "the worker ended")


def moody(field: Field, body: bytes) -> list[Reply]:
    """Up to three bad replies, then the picture."""
    good = Reply.picture(body)
    bad = (Reply.error(503), Reply.cut(body, missing_bytes=500), good.late(first_pause_s=0.3), Reply.error(500))
    return [*(field.chance.choice(bad) for _ in range(field.chance.randrange(4))), good]


def duplicates(field: Field) -> Outcome:
    """The same id twice, thrice, at once, from both lanes, and again after its answer: one answer each."""
    field.fleet(2)
    for _ in range(field.rounds):
        base = len(field.sent)
        ids = field.enqueue(field.jobs)
        copies = [job_id for job_id in ids for _ in range(field.chance.randrange(3))]
        field.chance.shuffle(copies)
        field.enqueue(len(copies), ids=copies)
        field.wait_answers(base + field.jobs // 2)
        field.enqueue(field.jobs, ids=field.chance.sample(ids, field.jobs // 2))
        field.wait_answers(base + field.jobs)
    outcome = field.finish("duplicates", promised_s=0)
    dropped = Counter(field._counters())["copies_dropped"]
    return replace(outcome, notes=f"{dropped} copies were dropped")
