"""The asyncio client: many waits on few connections, cancellations, and a Redis that is away.

What it has in common with the blocking client is tested with both: see the fixture `open_client`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Any

import pytest
import redis

from shiwu import RequestError, WaitTimeout
from shiwu.aio import Client, waiter
from shiwu.broker.answers import AnswerEntry
from shiwu.contract import RESULT_STREAM, Answer, Lane, Status, result_key
from tests.support.redis_parts import make_answer_store
from tests.support.servers import Valkey
from tests.support.waiting import wait_until

LIMIT_S = 120.0
OUTAGE_S = 10.0


def run(test: Coroutine[Any, Any, None]) -> None:
    """Run a test in an event loop, and see that it leaves no task behind."""

    async def limited() -> None:
        await asyncio.wait_for(test, LIMIT_S)
        left = [task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert left == []

    asyncio.run(limited())


async def until(condition: Callable[[], Any], *, timeout_s: float = 20.0) -> None:
    """Wait for a condition without blocking the event loop."""
    await asyncio.to_thread(wait_until, condition, timeout_s=timeout_s)


def tagged(client: redis.Redis, *ids: str) -> None:
    """Answer jobs, as a worker does."""
    entries = [AnswerEntry(answer=Answer(id=job_id, status=Status.TAGGED, attempts=1), id=job_id) for job_id in ids]
    make_answer_store(client, "w").write(entries)


@pytest.fixture
def connections(redis_client: redis.Redis) -> Callable[[], int]:
    """Counts the connections that were opened since the test began; other tests may leave some in their pools."""

    def ids() -> list[int]:
        clients: Any = redis_client.client_list()
        return [int(one["id"]) for one in clients]

    newest = max(ids())
    return lambda: sum(number > newest for number in ids())


def subscriptions(client: redis.Redis) -> list[bytes]:
    """Channels that have a subscriber."""
    channels: Any = client.pubsub_channels()
    return sorted(channels)


def test_5000_waits_need_three_connections(
    redis_url: str, redis_client: redis.Redis, connections: Callable[[], int]
) -> None:
    """One sends, one looks for keys, and one listens; all answers come, and nothing stays subscribed."""

    async def test() -> None:
        async with Client(redis_url) as client:
            ids = [job_id async for job_id in client.enqueue_many(f"s3://b/{n}" for n in range(5000))]
            waits = [asyncio.create_task(client.wait(job_id, timeout_s=100)) for job_id in ids]
            await until(lambda: len(subscriptions(redis_client)) == 5000)
            assert connections() <= 3
            await asyncio.to_thread(tagged, redis_client, *ids)
            answers = await asyncio.gather(*waits)
            assert [answer.id for answer in answers] == ids
            assert connections() <= 3
            await until(lambda: subscriptions(redis_client) == [])

    run(test())


def test_cancelled_wait_leaves_no_subscription(redis_url: str, redis_client: redis.Redis) -> None:
    """Also one with a time-out around it; other waits go on, and one for the same id keeps its subscription."""

    async def test() -> None:
        async with Client(redis_url) as client:
            waits = [asyncio.create_task(client.wait(job_id, timeout_s=60)) for job_id in ("a", "b", "c", "c")]
            await until(lambda: len(subscriptions(redis_client)) == 3)
            for number in (0, 2):
                waits[number].cancel()
            await until(lambda: subscriptions(redis_client) == [result_key(job_id).encode() for job_id in "bc"])
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.wait_many(["d", "b"], timeout_s=60), timeout=0.1)
            await asyncio.to_thread(tagged, redis_client, "b", "c")
            assert [(await waits[number]).id for number in (1, 3)] == ["b", "c"]
            for number in (0, 2):
                with pytest.raises(asyncio.CancelledError):
                    await waits[number]
            await until(lambda: subscriptions(redis_client) == [])
            loop = asyncio.get_running_loop()
            await until(lambda: not any(task.get_name() == "shiwu-waiter" for task in asyncio.all_tasks(loop)))

    run(test())


def test_loop_that_leaves_early_leaves_no_subscription(redis_url: str, redis_client: redis.Redis) -> None:
    """After one of two answers."""

    async def test() -> None:
        async with Client(redis_url) as client:
            await asyncio.to_thread(tagged, redis_client, "a")
            async with aclosing(client.as_answered(["b", "a"], timeout_s=60)) as answers:
                assert (await anext(answers))[0] == "a"
                assert subscriptions(redis_client) != []
            await until(lambda: subscriptions(redis_client) == [])

    run(test())


def test_one_answer_serves_all_waits_for_its_id(redis_url: str, redis_client: redis.Redis) -> None:
    """Those that began before it, and one that begins after it."""

    async def test() -> None:
        async with Client(redis_url) as client:
            waits = [asyncio.create_task(client.wait("a", timeout_s=60)) for _ in range(20)]
            await until(lambda: subscriptions(redis_client))
            assert redis_client.pubsub_numsub(result_key("a"))[0][1] == 1
            await asyncio.to_thread(tagged, redis_client, "a")
            assert {(await wait).id for wait in waits} == {"a"}
            assert (await client.wait("a", timeout_s=0)).id == "a"

    run(test())


def test_wait_outlives_the_connection_that_listens(
    redis_url: str, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is opened again with all subscriptions, so that the answer comes without a look for its key."""
    monkeypatch.setattr(waiter, "LISTENING_POLL_S", 12.0)

    async def test() -> None:
        async with Client(redis_url) as client:
            waits = [asyncio.create_task(client.wait(job_id, timeout_s=60)) for job_id in ("a", "b")]
            for job_id in ("a", "b"):
                await until(lambda: len(subscriptions(redis_client)) == 1 + (not waits[0].done()))
                assert redis_client.client_kill_filter(_type="pubsub") == 1
                await until(lambda: len(subscriptions(redis_client)) == 1 + (not waits[0].done()))
                began_s = time.monotonic()
                await asyncio.to_thread(tagged, redis_client, job_id)
                assert (await waits[job_id == "b"]).id == job_id
                assert time.monotonic() - began_s < 10

    run(test())


def test_idle_connection_that_was_closed_is_opened_again(
    redis_url: str, redis_client: redis.Redis, connections: Callable[[], int]
) -> None:
    """Between two waits, as a server with a time limit for idle connections does."""

    async def test() -> None:
        async with Client(redis_url) as client:
            await asyncio.to_thread(tagged, redis_client, "a", "b")
            await client.wait("a", timeout_s=10)
            assert connections() == 2
            redis_client.client_kill_filter(skipme=True)
            assert (await client.wait("b", timeout_s=10)).id == "b"

    run(test())


@pytest.mark.slow
def test_client_outlives_a_redis_that_is_away_for_ten_seconds(valkey: Valkey) -> None:
    """Waits and loops over the results go on; what is enqueued with `wait_s` is enqueued afterwards."""

    async def test() -> None:
        async with Client(valkey.url, timeout_s=1) as client:
            waits = [asyncio.create_task(client.wait(f"j{n}", timeout_s=100)) for n in range(100)]
            loop = client.results(group="g", block_s=0.1)
            item = asyncio.create_task(anext(loop))
            with valkey.client() as near:
                await until(lambda: len(subscriptions(near)) == 100)
            valkey.kill()
            went_s = time.monotonic()
            with pytest.raises(redis.RedisError):
                await client.enqueue("s3://b/k")
            sent = asyncio.create_task(anext(client.enqueue_many(["s3://b/k"], wait_s=60)))
            with pytest.raises(WaitTimeout):
                await client.wait("other", timeout_s=max(0.1, OUTAGE_S - (time.monotonic() - went_s)))
            assert time.monotonic() - went_s >= OUTAGE_S
            await asyncio.to_thread(valkey.restart)
            with valkey.client() as near:
                await asyncio.to_thread(tagged, near, *(f"j{n}" for n in range(100)))
                answers = await asyncio.gather(*waits)
                assert [answer.id for answer in answers] == [f"j{n}" for n in range(100)]
                await (await item).ack(away_s=10)
                await sent
                assert near.llen(Lane.BULK.queue) == 1
            await loop.aclose()

    run(test())


def test_cancelled_loop_gives_up_its_answers(redis_url: str, redis_client: redis.Redis) -> None:
    """Another consumer gets them immediately."""

    async def test() -> None:
        async with Client(redis_url) as client:
            await asyncio.to_thread(tagged, redis_client, *(f"j{n}" for n in range(10)))
            seen: list[str] = []

            async def read() -> None:
                async with aclosing(client.results(group="g")) as items:
                    async for item in items:
                        await item.ack()
                        seen.append(item.result.id)
                        if len(seen) == 3:
                            await asyncio.Event().wait()

            reading = asyncio.create_task(read())
            await until(lambda: len(seen) == 3)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            [held] = redis_client.xpending_range(RESULT_STREAM, "g", min="-", max="+", count=1)
            assert held["time_since_delivered"] > 60_000, "the next consumer does not have to wait"
            others = [item async for item in client.results(group="g", stop_when_idle=True, block_s=0.01)]
            assert sorted([*seen, *(item.result.id for item in others)]) == [f"j{n}" for n in range(10)]

    run(test())


def test_images_may_come_from_an_asynchronous_iterator(redis_url: str, redis_client: redis.Redis) -> None:
    """They are sent in portions; what is not iterable is refused immediately."""

    async def images() -> AsyncIterator[str]:
        for number in range(5):
            yield f"s3://b/{number}"

    async def test() -> None:
        async with Client(redis_url) as client:
            loop = client.enqueue_many(images(), batch_size=2)
            await anext(loop)
            assert redis_client.llen(Lane.BULK.queue) == 2
            assert len([job_id async for job_id in loop]) == 4
            assert redis_client.llen(Lane.BULK.queue) == 5
            single: Any = "s3://b/k"
            with pytest.raises(TypeError):
                client.enqueue_many(single)
            with pytest.raises(RequestError):
                client.enqueue_many(images(), batch_size=0)

    run(test())


def test_close_ends_the_waits(redis_url: str, redis_client: redis.Redis, connections: Callable[[], int]) -> None:
    """They raise an error instead of waiting for their time-out."""

    async def test() -> None:
        async with Client(redis_url) as client:
            wait = asyncio.create_task(client.wait("a", timeout_s=100))
            await until(lambda: subscriptions(redis_client))
        with pytest.raises(redis.ConnectionError, match="closed"):
            await wait
        await until(lambda: connections() == 0)

    run(test())


def test_client_waits_again_after_it_was_closed(redis_url: str, redis_client: redis.Redis) -> None:
    """Also after a close before the task that listens has taken its first step."""

    async def close_at_once() -> None:
        client = Client(redis_url)
        waiting = asyncio.create_task(client.wait("k1", timeout_s=20))
        await asyncio.sleep(0)
        await client.aclose()
        with pytest.raises(redis.ConnectionError, match="closed during the wait"):
            await waiting
        tagged(redis_client, "k1")
        async with client:
            assert (await client.wait("k1", timeout_s=20)).id == "k1"

    run(close_at_once())
