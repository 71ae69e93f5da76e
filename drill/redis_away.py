"""Drills that break Redis, and the way to it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial

from redis import Redis, RedisError
from tests.support.failover import Failover
from tests.support.fault_proxy import FaultProxy
from tests.support.waiting import wait_until

from drill.field import Field, Outcome, wrong
from shiwu import Client
from shiwu.broker.connection import connect
from shiwu.contract import result_key

GOES_ON_S = 3.0
"""Promised: work goes on this long after Redis is back."""
FOLLOWS_S = 15.0
"""The same after a failover, where writes wait for a replica that has to follow the new primary first."""
LONGEST_AWAY_S = 8.0


def restart(field: Field) -> Outcome:
    """Redis with its AOF is restarted or killed under load, in turns; the worker waits and goes on."""
    worker = field.worker()
    pause = threading.Event()
    for number in range(field.rounds):
        base = len(field.sent)
        field.enqueue(field.jobs)
        field.wait_answers(base + field.chance.randrange(1, max(2, field.jobs // 2)))
        if number % 2:
            field.server.kill()
            pause.wait(field.chance.uniform(0.0, LONGEST_AWAY_S))
        field.server.restart()
        before = field.answered()
        field.time_until(partial(lambda before: field.answered() > before, before), timeout_s=30)
        field.wait_answers(base + field.jobs)
    outcome = field.finish("redis", promised_s=GOES_ON_S)
    return outcome if worker.is_running else wrong(outcome, "the worker ended")


def cuts(field: Field) -> Outcome:
    """The way to Redis is cut at random bytes of requests and replies, swallowed, refused and slowed down."""
    proxy: FaultProxy = field.enter(FaultProxy(field.url))
    workers = field.fleet(2, url=proxy.url)
    field.enqueue(field.jobs)
    pause = threading.Event()
    faults = 0
    while faults < field.rounds and field.answered() - field.answered_before < field.jobs:
        faults += 1
        kind = field.chance.choice(("request", "reply", "request", "reply", "refuse", "slow", "hole"))
        if kind == "request":
            proxy.cut_request_after(field.chance.randrange(3000))
        elif kind == "reply":
            proxy.cut_reply_after(field.chance.randrange(3000))
        elif kind == "refuse":
            proxy.refuse()
        elif kind == "slow":
            proxy.delay(0.05)
        else:
            proxy.black_hole()
        pause.wait(field.chance.uniform(0.05, 0.3) if kind != "hole" else 2.5)
        proxy.heal()
    proxy.heal()
    outcome = field.finish(
        "cuts", promised_s=GOES_ON_S, notes=f"{faults} faults, {proxy.cuts} connections cut in the middle"
    )
    ended = [worker.name for worker in workers if not worker.is_running]
    return wrong(outcome, f"ended: {ended}") if ended else outcome


def failover(field: Field) -> Outcome:
    """A primary under sentinels dies or hangs; writes wait for a replica, a ledger enqueues again what is missing."""
    servers: Failover = field.server
    worker = field.worker(commit_replicas=1)
    # A server that hangs must not hold up who looks on.
    with Client(field.url) as producer, connect(field.url, timeout_s=2.0) as onlooker:
        for number in range(field.rounds):
            base = len(field.sent)
            ids = [f"{field.prefix}-{base + n}" for n in range(field.jobs)]
            field.note(ids)
            asked = [{"image": field.chance.choice(field.images), "id": job_id} for job_id in ids]
            list(producer.enqueue_many(asked, replicas=1))
            field.wait_answers(base + field.chance.randrange(1, max(2, field.jobs // 2)))
            old = servers.pause_primary() if number % 2 else servers.kill_primary()
            servers.wait_failover(old, timeout_s=60)
            field.time_until(partial(_some_progress, onlooker, ids), timeout_s=60)
            # The ledger pattern: what has no answer is enqueued again under its id, which is always safe.
            missing = _missing(onlooker, ids)
            again = [one for one in asked if one["id"] in missing]
            wait_until(partial(_sent, producer, again), timeout_s=30, every_s=0.2)
            wait_until(partial(lambda ids: not _missing(onlooker, ids), ids), timeout_s=120, every_s=0.25)
            servers.bring_back(old)
    outcome = field.finish("failover", promised_s=FOLLOWS_S)
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
    """Whether an answer more has come, or all are there."""
    try:
        before = _missing(client, ids)
        return not before or bool(
            wait_until(lambda: len(_missing(client, ids)) < len(before), timeout_s=2.0, every_s=0.02)
        )
    except (RedisError, TimeoutError):
        return False
