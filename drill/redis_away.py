"""Drills that break Redis and the connections to it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial

from redis import Redis, RedisError
from tests.support.failover import Failover
from tests.support.fault_proxy import FaultProxy
from tests.support.waiting import wait_until

from drill.drill_run import DrillRun, Outcome, wrong
from shiwu import Client
from shiwu.broker.connection import connect
from shiwu.contract import result_key

RESUME_S = 3.0
"""Promised: work goes on this long after Redis is available again."""
RESUME_AFTER_FAILOVER_S = 15.0
"""Promised after a failover, where writes wait for a replica that must first follow the new primary."""
MAX_OUTAGE_S = 8.0


def restart(run: DrillRun) -> Outcome:
    """Redis with an append-only file is restarted and killed under load; the worker waits and goes on."""
    worker = run.start_worker()
    pause = threading.Event()
    for number in range(run.rounds):
        base = len(run.sent)
        run.enqueue(run.jobs)
        run.wait_answers(base + run.rng.randrange(1, max(2, run.jobs // 2)))
        if number % 2:
            run.server.kill()
            pause.wait(run.rng.uniform(0.0, MAX_OUTAGE_S))
        run.server.restart()
        before = run.answered()
        run.time_until(partial(lambda before: run.answered() > before, before), timeout_s=30)
        run.wait_answers(base + run.jobs)
    outcome = run.finish("redis", promised_s=RESUME_S)
    return outcome if worker.is_running else wrong(outcome, "the worker ended")


def cuts(run: DrillRun) -> Outcome:
    """Connections to Redis are cut at random bytes, swallowed, refused and slowed down."""
    proxy: FaultProxy = run.enter(FaultProxy(run.url))
    workers = run.start_workers(2, url=proxy.url)
    run.enqueue(run.jobs)
    pause = threading.Event()
    faults = 0
    while faults < run.rounds and run.answered() - run.answered_before < run.jobs:
        faults += 1
        kind = run.rng.choice(("request", "reply", "request", "reply", "refuse", "slow", "hole"))
        if kind == "request":
            proxy.cut_request_after(run.rng.randrange(3000))
        elif kind == "reply":
            proxy.cut_reply_after(run.rng.randrange(3000))
        elif kind == "refuse":
            proxy.refuse()
        elif kind == "slow":
            proxy.delay(0.05)
        else:
            proxy.black_hole()
        pause.wait(run.rng.uniform(0.05, 0.3) if kind != "hole" else 2.5)
        proxy.heal()
    proxy.heal()
    outcome = run.finish(
        "cuts", promised_s=RESUME_S, notes=f"{faults} faults, {proxy.cuts} connections cut in the middle"
    )
    ended = [worker.name for worker in workers if not worker.is_running]
    return wrong(outcome, f"ended: {ended}") if ended else outcome


def failover(run: DrillRun) -> Outcome:
    """A primary under sentinels crashes or hangs; writes wait for a replica, and missing jobs are enqueued again."""
    servers: Failover = run.server
    worker = run.start_worker(commit_replicas=1)
    # A server that hangs must not block the observer.
    with Client(run.url) as producer, connect(run.url, timeout_s=2.0) as observer:
        for number in range(run.rounds):
            base = len(run.sent)
            ids = [f"{run.prefix}-{base + n}" for n in range(run.jobs)]
            run.note(ids)
            items = [{"image": run.rng.choice(run.images), "id": job_id} for job_id in ids]
            list(producer.enqueue_many(items, replicas=1))
            run.wait_answers(base + run.rng.randrange(1, max(2, run.jobs // 2)))
            old = servers.pause_primary() if number % 2 else servers.kill_primary()
            servers.wait_failover(old, timeout_s=60)
            run.time_until(partial(_some_progress, observer, ids), timeout_s=60)
            # Jobs without an answer are enqueued again with the same ids, which is always safe.
            missing = _missing(observer, ids)
            again = [item for item in items if item["id"] in missing]
            wait_until(partial(_sent, producer, again), timeout_s=30, every_s=0.2)
            wait_until(partial(lambda ids: not _missing(observer, ids), ids), timeout_s=120, every_s=0.25)
            servers.bring_back(old)
    outcome = run.finish("failover", promised_s=RESUME_AFTER_FAILOVER_S)
    return outcome if worker.is_running else wrong(outcome, "the worker ended")


def _missing(client: Redis, ids: Sequence[str]) -> set[str]:
    with client.pipeline(transaction=False) as pipe:
        for job_id in ids:
            pipe.exists(result_key(job_id))
        found = pipe.execute()
    return {job_id for job_id, there in zip(ids, found, strict=True) if not there}


def _sent(producer: Client, again: list[dict[str, str]]) -> bool:
    try:
        list(producer.enqueue_many(again, replicas=1))
    except RedisError:
        return False
    return True


def _some_progress(client: Redis, ids: Sequence[str]) -> bool:
    """Whether another answer has come, or all have."""
    try:
        before = _missing(client, ids)
        return not before or bool(
            wait_until(lambda: len(_missing(client, ids)) < len(before), timeout_s=2.0, every_s=0.02)
        )
    except (RedisError, TimeoutError):
        return False
