"""From a stored object to its tags: events of MinIO, a watcher and a real worker on a real S3 store."""

from __future__ import annotations

from pathlib import Path

import redis

from shiwu import Client, Status
from shiwu.contract import Lane
from shiwu.watch.formats import read_message
from tests.support import pictures
from tests.support.servers import S3Server, WorkerProcess
from tests.support.watch import access_event, lines, run_watch, total, write_rules

KEYS = ["watch/a b.png", "watch/a+b.png", "watch/a%2Bb.png", "watch/a%b.png", "watch/熊猫 100%.png", "watch/é/ü#?.PNG"]
EVENTS = "events-for-a-worker"


def test_every_stored_object_is_tagged(s3: S3Server, shared_worker: WorkerProcess, tmp_path: Path) -> None:
    """Whatever characters its key has, with the metadata of its rule."""
    body = pictures.png(pictures.picture())
    events = [access_event(key, bucket=s3.bucket) for key in KEYS]
    for key in KEYS:
        s3.put(key, body)
    rules = write_rules(
        tmp_path, f"- match: {{bucket: {s3.bucket}, suffix: .png}}\n  lane: interactive\n  metadata: {{team: a}}"
    )
    url = shared_worker.redis_url
    with redis.Redis.from_url(url) as client:
        client.rpush(EVENTS, *events, *events)
    result = run_watch(url, f"{url}?key={EVENTS}", "--rules", str(rules), "--once")
    counted = lines(result.stdout)
    assert (total(counted, "enqueued"), total(counted, "duplicate")) == (len(KEYS), len(KEYS))
    ids = {found.id: found.key for event in events for found in read_message(event)}  # type: ignore[union-attr]  # all are events
    with Client(url) as client:
        answers = client.wait_many(list(ids), timeout_s=60)
    for job_id, key in ids.items():
        found = answers[job_id]
        assert (found.status, found.error, found.image.reference) == (Status.TAGGED, None, f"s3://{s3.bucket}/{key}")
        assert (found.best, found.metadata, found.lane) == ("动物", {"team": "a"}, Lane.INTERACTIVE)
