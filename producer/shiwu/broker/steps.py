"""Steps: what to ask of Redis and what to make of its replies, apart from the client that sends it.

Steps are a generator that yields calls and pauses, and gets the replies. `run` makes the calls with a blocking client.
The asyncio client has a function of its own for that, so that both share the steps and no logic exists twice.

    def size_steps(key: str) -> Steps[int]:
        length = yield lambda client: client.llen(key)
        return int(length)

    run(redis.Redis(), size_steps("shiwu.bulk"))
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
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


Call: TypeAlias = Callable[[Any], Any]
"""Gets a client, blocking or asyncio, and makes one call. Both clients of redis-py have the same methods; those of the
asyncio client return what has to be awaited, and no type describes both."""
Step: TypeAlias = Call | Pause | OnOneConnection
Steps: TypeAlias = Generator[Step, Any, T]


def run(client: redis.Redis, steps: Steps[T]) -> T:
    """Make the calls of these steps one after the other, and return their result.

    An error of Redis or of the connection is raised within the steps, at the call that it belongs to.

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


def iterate(client: redis.Redis, next_steps: Callable[[], Steps[Sequence[T] | None]]) -> Iterator[T]:
    """Yield the values of each page; `next_steps` gives the steps of the next one, whose result is None at the end."""
    while (page := run(client, next_steps())) is not None:
        yield from page


def _make(client: redis.Redis, step: Step) -> Any:
    if isinstance(step, Pause):
        return Event().wait(step.seconds)
    if isinstance(step, OnOneConnection):
        with client.client() as connected:  # type: ignore[no-untyped-call]  # redis' own
            return [run_on_connection(connected, command)[0] for command in step.commands]
    return step(client)
