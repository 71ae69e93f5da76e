"""Steps: what to ask of Redis and what to make of its replies, apart from the client that sends it.

Steps are a generator that yields calls and pauses, and gets the replies. `run` makes the calls with a blocking client.
The asyncio client has a function of its own for that, so that both share the steps and no logic exists twice.

    def size_steps(key: str) -> Steps[int]:
        length = yield lambda client: client.llen(key)
        return int(length)

    run(redis.Redis(), size_steps("shiwu.bulk"))

Where jobs are spread over shards, `run` gets a client for each shard. A step goes to the first one, except for steps
that are yielded as `OnShards`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any, TypeAlias, TypeVar

import redis

from shiwu.broker.connection import run_on_connection

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Pause:
    """A pause before the next call."""

    seconds: float


@dataclass(frozen=True, slots=True)
class OnOneConnection:
    """Commands for one connection, one after the other; the reply is the list of their replies.

    `WAIT` counts only the writes of its own connection, so no command of these is repeated.
    """

    commands: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True, slots=True)
class OnShards:
    """Steps for shards, by the index of the shard.

    The reply is index → result of the steps, or the redis.RedisError or OSError that they let pass.
    """

    steps: Mapping[int, Steps[Any]]


Call: TypeAlias = Callable[[Any], Any]
"""Gets a client, blocking or asyncio, and makes one call. Both clients of redis-py have the same methods; those of the
asyncio client return what has to be awaited, and no type describes both."""
Step: TypeAlias = Call | Pause | OnOneConnection | OnShards
Steps: TypeAlias = Generator[Step, Any, T]
Clients: TypeAlias = redis.Redis | tuple[redis.Redis, ...]
"""One client, or one for each shard in the order of their indexes."""


def on_shard(shard: int, steps: Steps[T]) -> Steps[T]:
    """Run these steps in one shard."""
    outcomes: Mapping[int, T | Exception] = yield OnShards({shard: steps})
    return results_of(outcomes)[shard]


def on_shards(steps: Mapping[int, Steps[T]]) -> Steps[dict[int, T]]:
    """Run the steps of each shard to their end; return index → result.

    Raises:
        redis.RedisError: the error of one shard. The steps of the others were run too.
    """
    return results_of((yield OnShards(steps)))


def results_of(outcomes: Mapping[int, T | Exception]) -> dict[int, T]:
    """The results among the replies to `OnShards`.

    Raises:
        redis.RedisError: the error of one shard.
    """
    results: dict[int, T] = {}
    for shard, outcome in outcomes.items():
        if isinstance(outcome, Exception):
            raise outcome
        results[shard] = outcome
    return results


def run(client: Clients, steps: Steps[T]) -> T:
    """Make the calls of these steps one after the other, and return their result.

    An error of Redis or of the connection is raised within the steps, at the call that it belongs to.

    Args:
        client: one client, or one for each shard in the order of their indexes.

    Raises:
        redis.RedisError: the steps let an error of a call pass.
    """
    try:
        step = next(steps)
        while True:
            try:
                reply = _make(client, step)
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


def iterate(client: Clients, next_steps: Callable[[], Steps[Sequence[T] | None]]) -> Iterator[T]:
    """Yield the values of each page; `next_steps` gives the steps of the next one, whose result is None at the end."""
    while (page := run(client, next_steps())) is not None:
        yield from page


def _make(client: Clients, step: Step) -> Any:
    if isinstance(step, Pause):
        return Event().wait(step.seconds)
    clients = client if isinstance(client, tuple) else (client,)
    if isinstance(step, OnShards):
        return {shard: _outcome(clients[shard], steps) for shard, steps in step.steps.items()}
    if isinstance(step, OnOneConnection):
        with clients[0].client() as connected:  # type: ignore[no-untyped-call]  # redis' own
            return [run_on_connection(connected, command)[0] for command in step.commands]
    return step(clients[0])


def _outcome(client: redis.Redis, steps: Steps[T]) -> T | Exception:
    try:
        return run(client, steps)
    except (redis.RedisError, OSError) as error:
        return error
