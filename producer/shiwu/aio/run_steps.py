"""Runs steps with an asyncio client, as `shiwu.broker.steps.run` does with a blocking one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, TypeVar

import redis
import redis.asyncio

from shiwu.broker.steps import OnOneConnection, Pause, Step, Steps

T = TypeVar("T")


async def run(client: redis.asyncio.Redis, steps: Steps[T]) -> T:
    """Make the calls of these steps one after the other, and return their result.

    A cancellation ends the steps, and closes the connection of the call that it interrupts.

    Raises:
        redis.RedisError: the steps let an error of a call pass.
    """
    try:
        step = next(steps)
        while True:
            try:
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


async def iterate(
    client: redis.asyncio.Redis, next_steps: Callable[[], Steps[Sequence[T] | None]]
) -> AsyncGenerator[T, None]:
    """Yield the values of each page; `next_steps` gives the steps of the next one, whose result is None at the end."""
    while (page := await run(client, next_steps())) is not None:
        for value in page:
            yield value


async def _make(client: redis.asyncio.Redis, step: Step) -> Any:
    if isinstance(step, Pause):
        return await asyncio.sleep(step.seconds)
    if isinstance(step, OnOneConnection):
        async with client.client() as connected:
            return [await _run_on_connection(connected, command) for command in step.commands]
    return await step(client)


async def _run_on_connection(connected: redis.asyncio.Redis, command: Sequence[Any]) -> Any:
    """The reply to one command on the connection that this client holds; it is not repeated on another one."""
    connection: Any = connected.connection
    await connection.send_packed_command(connection.pack_commands([command]), check_health=False)
    return await connection.read_response()
