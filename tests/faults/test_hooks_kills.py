"""`shiwu-hooks` is killed at random moments: each answer is delivered at least once, under one webhook id."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import redis
from standardwebhooks import Webhook

from shiwu.contract import HOOKS_DELIVERIES, HOOKS_HEALTH, RESULT_STREAM
from shiwu.hooks.delivery_queue import COMMON_KEYS
from tests.support.hooks import SECRET, HooksProcess, answer, commit, unread, write_endpoints
from tests.support.waiting import wait_until
from tests.support.webhook_receiver import Answered, Received, WebhookReceiver

PER_KILL = 150
"""Answers that come between two kills."""


class Crowd:
    """What receivers got: webhook id → ids of answers, and how often each came."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, str], tuple[str, ...]] = {}
        self.times: Counter[tuple[str, str]] = Counter()

    def add(self, got: Received) -> None:
        """Check the signature, and that a webhook id always has the same answers."""
        data = Webhook(SECRET).verify(got.body, dict(got.headers))["data"]
        ids = tuple(each["id"] for each in (data if isinstance(data, list) else [data]))
        key = (got.path, got.id)
        assert self.answers.setdefault(key, ids) == ids
        self.times[key] += 1

    def ids(self, path: str) -> list[str]:
        """The answers that a receiver got, each once for each webhook id."""
        return sorted(each for (where, _), ids in self.answers.items() if where == path for each in ids)


@pytest.mark.parametrize("kills", [pytest.param(4, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.long)])
def test_killed_process_loses_no_delivery(
    kills: int,
    redis_url: str,
    redis_client: redis.Redis,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Single deliveries and batches, to a receiver that also fails now and then."""
    seed = random.SystemRandom().randrange(10**6)
    chance = random.Random(seed)
    crowd = Crowd()

    def behave(_: Received) -> Answered:
        return Answered(chance.choice([204, 204, 204, 500]))

    with WebhookReceiver(behave) as receiver:
        single, many = f"{receiver.url}/single", f"{receiver.url}/many"
        file = write_endpoints(tmp_path, [{"name": "single", "url": single}, {"name": "many", "url": many, "batch": 7}])
        process = HooksProcess(
            redis_url=redis_url, file=file, timeout_s=0.5, lease_s=1, schedule="0s," + ",".join(["0.1s"] * 40)
        )
        process.start().wait_started()
        count = 0
        for _ in range(kills):
            for _ in range(PER_KILL // 10):
                commit(redis_client, *(answer(f"k{count + each}") for each in range(10)))
                count += 10
            goal = len(receiver.received) + chance.randrange(1, PER_KILL // 2)
            wait_until(lambda goal=goal: len(receiver.received) >= goal, timeout_s=60, every_s=0.001)
            process.kill()
            process.start()
        wait_until(
            lambda: redis_client.hlen(HOOKS_DELIVERIES) == 0 and unread(redis_client) == 0,
            timeout_s=120,
            what=f"all deliveries are made (seed {seed})",
        )
        assert process.stop() == 0
        for got in receiver.received:
            crowd.add(got)
    expected = sorted(f"k{number}" for number in range(count))
    assert crowd.ids("/hook/single") == expected, seed
    assert crowd.ids("/hook/many") == expected, seed
    assert [key for key in COMMON_KEYS if redis_client.exists(key) and key != HOOKS_HEALTH] == [], seed
    record_property("ran", f"{kills} kills of shiwu-hooks, {crowd.times.total()} requests, {len(crowd.times)} webhooks")


def test_lost_acknowledgement_repeats_the_delivery(redis_url: str, redis_client: redis.Redis, tmp_path: Path) -> None:
    """As after a failover to a replica that lacks it, and here after the group was deleted: under the same id."""
    with WebhookReceiver() as receiver:
        file = write_endpoints(tmp_path, [{"name": "a", "url": receiver.url}])
        with HooksProcess(redis_url=redis_url, file=file) as process:
            process.wait_started()
            commit(redis_client, answer("k1"))
            wait_until(lambda: receiver.ids() == ["k1.0"] and redis_client.hlen(HOOKS_DELIVERIES) == 0, timeout_s=20)
            assert redis_client.xgroup_destroy(RESULT_STREAM, "hooks") == 1
            wait_until(lambda: receiver.ids() == ["k1.0"] * 2, timeout_s=20)
            wait_until(lambda: unread(redis_client) == 0, timeout_s=10)
