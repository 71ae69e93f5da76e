"""Connections and scripts that Redis drops in the middle of the work: nothing is run again, nothing is forgotten."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from typing import Any, Final

import redis
from celery import Celery

from shiwu import Client
from shiwu.broker.answers import AnswerEntry
from shiwu.broker.foreign_values import ForeignValues
from shiwu.broker.known_labels import KnownLabels, KnownLabelStore
from shiwu.contract import CANVAS, CANVAS_DUE, CLAIMS, RESULT_STREAM, Lane
from shiwu_worker.celery_worker.callbacks import CallbackSender
from shiwu_worker.celery_worker.revoke import Revoker
from shiwu_worker.jobs.job import Claimed, Release
from shiwu_worker.policy.callback_rules import CallbackRules
from shiwu_worker.stages.claim.lease_queue import LeaseQueue
from tests.faults.conftest import Fleet
from tests.support import drill
from tests.support.redis_parts import (
    DeadLetters,
    answer,
    make_answer_store,
    make_lease_queue,
    make_maintenance,
    message,
)
from tests.support.servers import WorkerProcess
from tests.support.waiting import wait_until

KILLS: Final = 3


def test_client_kill_in_the_middle_runs_nothing_again(fleet: Fleet, near: WorkerProcess) -> None:
    """All connections of a busy worker are killed three times: every job is answered at its first try."""
    ids = fleet.send(400, prefix="cut")
    for number in range(1, KILLS + 1):
        wait_until(lambda n=number: drill.answered(fleet.client) > 80 * n, timeout_s=30, every_s=0.002)
        killed = fleet.client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        killed += fleet.client.execute_command("CLIENT", "KILL", "TYPE", "pubsub", "SKIPME", "yes")
        # A quick worker answers so many before all its connections are back.
        assert killed >= (4 if number == 1 else 2), "claim and commit; the first time heartbeat and listener, too"
    result = fleet.counted(ids)
    assert (result.attempts, result.statuses) == ({1: 400}, {"tagged": 400})
    assert (result.reaped, result.discarded) == (0, 0)
    assert near.is_running


def test_script_flush_during_the_work(fleet: Fleet, near: WorkerProcess) -> None:
    """A server that forgets its scripts again and again: every job is answered at its first try."""
    ids = fleet.send(300, prefix="flush")
    flushes = 0

    def flushed() -> bool:
        nonlocal flushes
        flushes += 1
        fleet.client.script_flush()
        return drill.answered(fleet.client) >= len(ids)

    wait_until(flushed, timeout_s=60, every_s=0.01)
    assert flushes > 30
    result = fleet.counted(ids)
    assert (result.attempts, result.statuses) == ({1: 300}, {"tagged": 300})
    assert (result.reaped, result.discarded) == (0, 0)
    assert near.is_running


def make_uses(client: redis.Redis, url: str) -> dict[str, Callable[[], Any]]:
    """Script → a call that uses it and says something true; in this order they find what they need."""
    claims, committer, maintenance = (
        make_lease_queue(client, "w"),
        make_answer_store(client, "w"),
        make_maintenance(client, stream_length=1),
    )
    client.lpush(Lane.BULK.queue, *[message(f"job-{n}", Lane.BULK) for n in range(5)])
    held, failed = claims.claim(2).jobs
    dead = AnswerEntry(id=failed.id, answer=answer(failed).answer, message=b"shiwu.bulk|" + failed.raw, is_dead=True)
    with Client(url) as producer:
        producer.enqueue("s3://b/k.jpg", id="late", lane=Lane.BULK, expires_s=0.001)
    client.hset(CANVAS, "linked", b"2|{}shiwu.bulk|{}")
    client.zadd(CANVAS_DUE, {"linked": 1.0})
    callbacks = CallbackSender(
        Celery("nobody", broker="memory://", set_as_default=False), client, rules=CallbackRules()
    )
    return {
        "claim": lambda: claims.claim(1).jobs,
        "renew": lambda: claims.renew([held.id, "lost"]) == ["lost"],
        "revoke": lambda: Revoker(client, committer).revoke([held.id, "foreign"]),
        "release": lambda: claims.release([Release(failed.id)]),
        "end_claims": lambda: claims.release_lost(held=[held.id]) == 1,
        "commit": lambda: committer.write([answer(held), dead]) == {held.id},
        "answer_duplicates": lambda: claim_copy(client, claims, held),
        "move_foreign": lambda: ForeignValues(client).move() == [],
        "trim_dead": lambda: make_maintenance(client, dead_bytes=0).trim_dead(bytes_over=0) == 0,
        "requeue": lambda: DeadLetters(client).requeue([failed.id]),
        "drop": lambda: DeadLetters(client).drop(["none"]) == 0 and client.exists(RESULT_STREAM),
        "maintain": lambda: maintenance.run_once(count_waiting=True).waiting,
        "take_late": lambda: wait_until(maintenance.expire_waiting, timeout_s=5),
        "drop_answered": lambda: drop_cancelled(client, url),
        "note_labels": lambda: note_labels(client),
        "trim": lambda: maintenance.trim() == {} and client.xlen(RESULT_STREAM) == 1,
        "take_callbacks": lambda: callbacks._send_chunk([]) == 3 and not client.exists(CANVAS),
        "hold_callbacks": lambda: callbacks._hold(keys=[CANVAS_DUE], args=["1.5", 1, "none"])[1:] == [],
        "drop_callbacks": lambda: callbacks._drop(keys=[CANVAS, CANVAS_DUE], args=["none", ""]) == 0,
        # The first answer is held again before it is handed out; the consumer is removed at the end of its loop.
        "hold_entries": lambda: consume(url) == 1,
        "drop_consumers": lambda: consume(url) == 0 and client.xinfo_consumers(RESULT_STREAM, "g") == [],
    }


def claim_copy(client: redis.Redis, claims: LeaseQueue, job: Claimed) -> bool:
    """Claim a copy of an answered job; whether it ended with the announcement of the answer."""
    client.rpush(Lane.BULK.queue, job.raw)
    return claims.claim(1).jobs == () and not client.hexists(CLAIMS, job.id)


def drop_cancelled(client: redis.Redis, url: str) -> bool:
    """Cancel a job in its lane; whether a sweep removes its message."""
    with Client(url) as producer:
        producer.enqueue("s3://b/k.jpg", id="cancelled", lane=Lane.BULK)
        producer.cancel("cancelled")
        before = client.llen(Lane.BULK.queue)
        make_maintenance(client).expire_waiting()
    return client.llen(Lane.BULK.queue) == before - 1


def note_labels(client: redis.Redis) -> bool:
    """Store a label set; whether it is found by its digest."""
    notes, known = KnownLabelStore(client), KnownLabels(digest="d", labels=("猫",))
    notes.note([known])
    return notes.find("d") == known


def consume(url: str) -> int:
    """Read all answers by a consumer of its own; how many there were."""
    with Client(url) as client:
        seen = 0
        for item in client.results(group="g", block_s=0.05, reclaim_idle_s=0.0, stop_when_idle=True):
            item.ack()
            seen += 1
        return seen


def test_every_script_is_sent_again(redis_url: str, redis_client: redis.Redis) -> None:
    """SCRIPT FLUSH, or a replica that never knew a script, costs one more round trip; no script is forgotten here."""
    uses = make_uses(redis_client, redis_url)
    folders = [files(package).joinpath("scripts") for package in ("shiwu.broker", "shiwu_worker.stages.claim")]
    names = [path.name for folder in folders for path in folder.iterdir()]
    assert {f"{name}.lua" for name in uses} == set(names)
    for name, use in uses.items():
        redis_client.script_flush()
        assert use(), name
