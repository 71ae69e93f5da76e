"""Real consumer processes of the results stream that die between reading and acknowledging."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from shiwu.broker.answers import AnswerEntry
from shiwu.contract import RESULT_STREAM, Answer, Status
from tests.support.processes import Process, clean_environment
from tests.support.redis_parts import make_answer_store
from tests.support.waiting import wait_until

CONSUMER = """
import signal, sys
from shiwu import Client

url, name, acks, leaves, idle_s = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
with Client(url) as client:
    items = client.results(group="g", consumer=name, batch=20, block_s=0.1, reclaim_idle_s=idle_s)
    for number, item in enumerate(items):
        print("got", item.result.id, flush=True)
        if number < acks:
            item.ack()
            print("acked", item.result.id, flush=True)
        elif number >= acks + leaves:
            signal.pause()
"""
"""Acknowledges so many, reads some more without, and then hangs with what it has in hand."""
Consume = Callable[..., Process]


@pytest.fixture
def consume(redis_url: str, tmp_path: Path) -> Iterator[Consume]:
    """Start a consumer; all are stopped at the end."""
    started: list[Process] = []

    def start(name: str, *, acks: int, leaves: int = 0, reclaim_idle_s: float = 0.5) -> Process:
        command = [sys.executable, "-c", CONSUMER, redis_url, name, str(acks), str(leaves), str(reclaim_idle_s)]
        started.append(Process(command, name=name, folder=tmp_path, env=clean_environment({})).start())
        return started[-1]

    yield start
    for process in started:
        process.stop(timeout_s=1)


def said(process: Process, word: str) -> list[str]:
    """The ids that a consumer said this word about."""
    lines = [line.split() for line in process.log_text().splitlines()]
    return [line[1] for line in lines if len(line) == 2 and line[0] == word]


def answered(client: redis.Redis, count: int) -> list[str]:
    """So many answers in the stream."""
    ids = [f"job-{number}" for number in range(count)]
    answers = [Answer(id=job_id, status=Status.TAGGED, attempts=1) for job_id in ids]
    make_answer_store(client, "w").write([AnswerEntry(id=one.id, answer=one) for one in answers])
    return ids


def test_what_a_dead_consumer_had_read_goes_to_another(redis_client: redis.Redis, consume: Consume) -> None:
    """SIGKILL with entries in hand: another one gets them, none is missed, none that was acknowledged comes again."""
    ids = answered(redis_client, 100)
    crashing = consume("crashing", acks=30, leaves=5)
    wait_until(lambda: len(said(crashing, "got")) == 36, timeout_s=30)
    crashing.kill()
    pending = redis_client.xpending(RESULT_STREAM, "g")["pending"]
    assert pending == 10, "the rest of its second portion"
    successor = consume("successor", acks=1000)
    acked = said(crashing, "acked")
    wait_until(lambda: len(set(said(successor, "acked"))) == len(ids) - len(acked), timeout_s=30)
    wait_until(lambda: redis_client.xpending(RESULT_STREAM, "g")["pending"] == 0, timeout_s=10)
    assert sorted([*acked, *said(successor, "acked")]) == sorted(ids), "each once"


def test_a_consumer_that_comes_back_gets_its_own_first(redis_client: redis.Redis, consume: Consume) -> None:
    """Started again under its name it reads immediately what it had not acknowledged, in order, then the rest.

    Entries are idle for an hour before another consumer may have them, so they cannot come as those of a dead one.
    """
    ids = answered(redis_client, 60)
    crashing = consume("same", acks=5, leaves=5, reclaim_idle_s=3600)
    wait_until(lambda: len(said(crashing, "got")) == 11, timeout_s=30)
    crashing.kill()
    before = len(said(crashing, "got"))
    again = consume("same", acks=1000, reclaim_idle_s=3600)
    wait_until(lambda: len(said(again, "acked")) == len(ids), timeout_s=30)
    assert said(again, "got")[before:] == ids[5:]
    assert said(again, "acked") == ids
