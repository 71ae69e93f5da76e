"""Cancelled tasks of `shiwu.aio`: they end at whatever step they are, also where redis-py swallows the cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
import redis

from shiwu.aio import Client

LIMIT_S = 60.0
WAIT_S = 600.0
STEPS = range(90)
"""Of the event loop, after which a wait was cancelled; connecting and subscribing take some 80."""


async def end_at_each_step(end: Callable[[Client, asyncio.Task[object]], Awaitable[None]], *, redis_url: str) -> None:
    """Begin a wait for an answer that never comes, and end it after 0, 1, 2, … steps."""
    for steps in STEPS:
        async with asyncio.timeout(LIMIT_S), Client(redis_url) as client:
            wait: asyncio.Task[object] = asyncio.create_task(client.wait("a", timeout_s=WAIT_S))
            await asyncio.sleep(0)
            for _ in range(steps):
                await asyncio.sleep(0)
            await end(client, wait)


def test_close_ends_a_wait_at_each_of_its_steps(redis_url: str) -> None:
    """It raises an error instead of waiting for its time-out, and the client is closed by then."""

    async def close(client: Client, wait: asyncio.Task[object]) -> None:
        await client.aclose()
        with pytest.raises(redis.ConnectionError, match="closed"):
            await wait

    asyncio.run(end_at_each_step(close, redis_url=redis_url))


def test_cancellation_ends_a_wait_at_each_of_its_steps(redis_url: str) -> None:
    """As that of a caller's own time-out."""

    async def cancel(_client: Client, wait: asyncio.Task[object]) -> None:
        wait.cancel()
        with pytest.raises(asyncio.CancelledError):
            await wait

    asyncio.run(end_at_each_step(cancel, redis_url=redis_url))


def test_cancellation_ends_a_call_at_each_of_its_steps(redis_url: str) -> None:
    """It has sent its job or not; the connection serves the next call in either case."""

    async def test() -> None:
        sent: set[str] = set()
        async with Client(redis_url, max_connections=1) as client:
            for steps in STEPS:
                async with asyncio.timeout(LIMIT_S):
                    call = asyncio.create_task(client.enqueue(f"s3://b/{steps}", id=f"k{steps}"))
                    for _ in range(steps):
                        await asyncio.sleep(0)
                    if call.cancel():
                        with pytest.raises(asyncio.CancelledError):
                            await call
                    else:
                        sent.add(await call)
                    assert (await client.queue_state()).waiting
        assert len(sent) < len(STEPS)

    asyncio.run(test())
