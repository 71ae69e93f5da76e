"""Leases need progress: a stuck worker loses its jobs, logs it, and no longer touches the liveness file."""

from __future__ import annotations

from dataclasses import replace

import pytest
import redis
from structlog.testing import capture_logs

from shiwu.contract import CLAIMS, WORKERS
from shiwu_worker.pipeline.heartbeat import Heartbeat
from shiwu_worker.runtime.backoff import RedisBackoff
from shiwu_worker.runtime.progress import LoadMeter, Progress
from tests.support.observers import RecordingObserver
from tests.support.redis_parts import make_lease_queue, make_maintenance, message
from tests.support.waiting import wait_until


def make_heartbeat(
    client: redis.Redis, progress: Progress, observer: RecordingObserver, *, held: list[str], stuck_s: float
) -> Heartbeat:
    """The heartbeat of a worker with a lease of 1.2 s."""
    return Heartbeat(
        make_lease_queue(client, "w", lease_s=1.2),
        make_maintenance(client, "w"),
        lease_s=1.2,
        in_flight=held,
        stuck_s=lambda: stuck_s,
        progress=progress,
        meter=LoadMeter(loader_threads=1),
        on_quarantine=lambda: None,
        observer=observer,
        backoff=RedisBackoff("heartbeat"),
        on_fatal=pytest.fail,
    )


def test_stuck_worker_loses_its_leases_and_logs_it(redis_client: redis.Redis) -> None:
    """While there is progress the lease is renewed. Then it expires, and the liveness file is not touched any more."""
    redis_client.lpush("shiwu.bulk", message("job"))
    make_lease_queue(redis_client, "w", lease_s=1.2).claim(1)
    progress, observer = Progress(), RecordingObserver()
    heartbeat = make_heartbeat(redis_client, progress, observer, held=["job"], stuck_s=3.0)
    with capture_logs() as logs:
        heartbeat.start()
        try:
            wait_until(lambda: observer.alive_count >= 3, timeout_s=10)
            assert redis_client.hexists(CLAIMS, "job"), "a lease of 1.2 s was not renewed"
            wait_until(lambda: any(line["event"] == "worker_stuck" for line in logs), timeout_s=10)
            wait_until(lambda: not redis_client.hexists(CLAIMS, "job"), timeout_s=10)
            seen = observer.alive_count
            before = redis_client.zscore(WORKERS, "w")
            wait_until(lambda: redis_client.zscore(WORKERS, "w") != before, timeout_s=10)
            assert observer.alive_count == seen
            progress.mark()
            wait_until(lambda: observer.alive_count > seen, timeout_s=10)
        finally:
            heartbeat.close()
    [line] = [line for line in logs if line["event"] == "worker_stuck"]
    assert (line["held"], line["log_level"]) == (1, "error")
    assert set(observer.redis) == {True}, "Redis answered each heartbeat"
    # It renewed the lease until it was stuck; a lost lease does not count as renewed.
    assert sum(observer.renewed) >= 5
    assert (observer.reaped, set(observer.redis)) == ([1], {True})


def test_worker_that_claims_nothing_from_full_lanes_is_stuck(redis_client: redis.Redis) -> None:
    """Nothing is in flight, a lane is not empty, and there is no progress."""
    redis_client.lpush("shiwu.interactive", message("job"))
    heartbeat = make_heartbeat(redis_client, Progress(), RecordingObserver(), held=[], stuck_s=1.5)
    with capture_logs() as logs:
        heartbeat.start()
        try:
            wait_until(lambda: any(line["event"] == "worker_stuck" for line in logs), timeout_s=10)
        finally:
            heartbeat.close()
    [line] = [line for line in logs if line["event"] == "worker_stuck"]
    assert (line["held"], line["waiting"]) == (0, 1)


def test_idle_worker_is_not_stuck(redis_client: redis.Redis) -> None:
    """Without work, a worker needs no progress."""
    observer = RecordingObserver()
    heartbeat = make_heartbeat(redis_client, Progress(), observer, held=[], stuck_s=0.1)
    heartbeat.start()
    try:
        wait_until(lambda: observer.alive_count >= 3, timeout_s=10)
    finally:
        heartbeat.close()


def test_load_is_reported_once_in_its_interval(redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at each tick; figures are divided by their time, and an idle worker logs nothing."""
    observer = RecordingObserver()
    heartbeat = make_heartbeat(redis_client, Progress(), observer, held=[], stuck_s=3.0)
    heartbeat._log_load()
    assert observer.loads == [], "too early"
    monkeypatch.setattr(heartbeat, "_load_logged_s", float("-inf"))
    with capture_logs() as logs:
        heartbeat._log_load()
        heartbeat._log_load()
    assert len(observer.loads) == 1
    assert logs == []
    heartbeat._meter.encoded(images=30, seconds=0.1)
    heartbeat._meter.encoded(images=10, seconds=0.1)
    monkeypatch.setattr(heartbeat, "_load_logged_s", float("-inf"))
    before = heartbeat._meter._read_sums
    monkeypatch.setattr(heartbeat._meter, "_read_sums", replace(before, at_s=before.at_s - 10.0))
    with capture_logs() as logs:
        heartbeat._log_load()
    [line] = logs
    load = observer.loads[-1]
    assert (load.pictures, load.batches) == (40, 2)
    assert line["event"] == "load"
    assert 40 / load.seconds == pytest.approx(line["pictures_per_s"], rel=0.1)
    assert line["batch"] == 20.0
