"""Runs steps with an asyncio client, as `shiwu.broker.steps.run` does with a blocking one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import redis
import redis.asyncio

from shiwu.aio.cancellation import cancellable
from shiwu.broker.steps import OnOneConnection, OnShards, Pause, Step, Steps

T = TypeVar("T")
Clients: TypeAlias = redis.asyncio.Redis | tuple[redis.asyncio.Redis, ...]
"""One client, or one for each shard in the order of their indexes."""


async def run(client: Clients, steps: Steps[T]) -> T:
    """Make the calls of these steps one after the other, and return their result.

    A cancellation ends the steps, and closes the connection of the call that it interrupts.

    Raises:
        redis.RedisError: the steps let an error of a call pass.
    """
    try:
        step = next(steps)
        while True:
            try:
                with cancellable():
                    reply = await _make(client, step)
            except (redis.RedisError, OSError) as error:
                step = steps.throw(error)
            else:
                step = steps.send(reply)
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        # After any other error, so that their own `finally` does not wait for the garbage collector.
        steps.close()


async def iterate(client: Clients, next_steps: Callable[[], Steps[Sequence[T] | None]]) -> AsyncGenerator[T, None]:
    """Yield the values of each page; `next_steps` gives the steps of the next one, whose result is None at the end."""
    while (page := await run(client, next_steps())) is not None:
        for value in page:
            yield value


async def _make(client: Clients, step: Step) -> Any:
    if isinstance(step, Pause):
        return await asyncio.sleep(step.seconds)
    clients = client if isinstance(client, tuple) else (client,)
    if isinstance(step, OnShards):
        return await _run_on_shards(clients, step.steps)
    if isinstance(step, OnOneConnection):
        async with clients[0].client() as connected:
            return [await _run_on_connection(connected, command) for command in step.commands]
    return await step(clients[0])


async def _run_on_shards(clients: Sequence[redis.asyncio.Redis], steps: Mapping[int, Steps[Any]]) -> dict[int, Any]:
    """Run the steps of all shards at the same time; a cancellation ends all of them."""
    runs = [_outcome(clients[shard], each) for shard, each in steps.items()]
    outcomes = [await runs[0]] if len(runs) == 1 else await asyncio.gather(*runs, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException) and not isinstance(outcome, redis.RedisError | OSError):
            raise outcome
    return dict(zip(steps, outcomes, strict=True))


async def _outcome(client: redis.asyncio.Redis, steps: Steps[T]) -> T | Exception:
    try:
        return await run(client, steps)
    except (redis.RedisError, OSError) as error:
        return error


async def _run_on_connection(connected: redis.asyncio.Redis, command: Sequence[Any]) -> Any:
    """The reply to one command on the connection that this client holds; it is not repeated on another one."""
    connection: Any = connected.connection
    await connection.send_packed_command(connection.pack_commands([command]), check_health=False)
    return await connection.read_response()
