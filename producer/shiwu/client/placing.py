"""Finds the shards of jobs: the shard of an id, or another one that knows the id.

Clients of shiwu put a job into the shard of its id. A stock Celery application puts its jobs into the one shard that it
was given, so an id that its own shard does not know is looked for in the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeAlias, TypeVar

from shiwu.broker.chunks import chunks
from shiwu.broker.redis_errors import info_of
from shiwu.broker.sharding import by_shard, shard_of
from shiwu.broker.steps import Call, OnShards, Steps, on_shard, on_shards
from shiwu.contract import CLAIMS, DEAD, DELAYED_MESSAGES, result_key

T = TypeVar("T")
CHUNK_SIZE: Final = 500
Knows: TypeAlias = Callable[[Sequence[str]], Steps[set[str]]]
"""Asks one shard which of these ids it knows."""


def find_steps(job_id: str, *, shards: int, find: Callable[[], Steps[T | None]]) -> Steps[T | None]:
    """What the shard of an id finds, otherwise what another one finds, or None.

    Args:
        find: the steps for one shard.

    Raises:
        redis.RedisError: the shard of the id is unavailable, or another shard is and no shard finds anything.
    """
    if shards == 1:
        return (yield from find())
    own = shard_of(job_id, shards=shards)
    if (found := (yield from on_shard(own, find()))) is not None:
        return found
    outcomes = yield OnShards({shard: find() for shard in range(shards) if shard != own})
    for outcome in outcomes.values():
        if outcome is not None and not isinstance(outcome, Exception):
            return outcome  # type: ignore[no-any-return]  # a T
    for outcome in outcomes.values():
        if isinstance(outcome, Exception):
            raise outcome
    return None


def place_steps(ids: Iterable[str], *, shards: int, knows: Knows) -> Steps[dict[int, list[str]]]:
    """Shard → the ids to be handled there, in their order: those that it knows, and its own that no shard knows.

    Raises:
        redis.RedisError: a shard is unavailable; an id is not sought in others that are.
    """
    groups = by_shard(ids, shards=shards, id_of=str)
    if shards == 1:
        return groups
    known = yield from on_shards({shard: knows(group) for shard, group in groups.items()})
    missing = {shard: [job_id for job_id in group if job_id not in known[shard]] for shard, group in groups.items()}
    wanted = {
        shard: [job_id for own, ids in missing.items() if own != shard for job_id in ids] for shard in range(shards)
    }
    outcomes = yield OnShards({shard: knows(ids) for shard, ids in wanted.items() if ids})
    moved: dict[str, int] = {}
    for shard, outcome in outcomes.items():
        if not isinstance(outcome, Exception):
            moved |= dict.fromkeys(outcome, shard)
        elif not info_of(outcome).is_temporary:
            raise outcome
    placed: dict[int, list[str]] = {}
    for own, group in groups.items():
        for job_id in group:
            placed.setdefault(moved.get(job_id, own), []).append(job_id)
    return placed


def jobs_steps(ids: Sequence[str]) -> Steps[set[str]]:
    """Which of these ids this shard knows without a search of its lanes: claimed, delayed or answered ones."""

    def read(client: Any, portion: Sequence[str]) -> Any:
        pipe = client.pipeline(transaction=False)
        for job_id in portion:
            pipe.hget(CLAIMS, job_id)
            pipe.hget(DELAYED_MESSAGES, job_id)
            pipe.get(result_key(job_id))
        return pipe.execute()

    return (yield from _known_steps(ids, read, replies=3))


def dead_letters_steps(ids: Sequence[str]) -> Steps[set[str]]:
    """Which of these ids are dead letters of this shard."""

    def read(client: Any, portion: Sequence[str]) -> Any:
        pipe = client.pipeline(transaction=False)
        for job_id in portion:
            pipe.zscore(DEAD, job_id)
        return pipe.execute()

    return (yield from _known_steps(ids, read, replies=1))


def _known_steps(ids: Sequence[str], read: Callable[[Any, Sequence[str]], Any], *, replies: int) -> Steps[set[str]]:
    """The ids with a value in one of their replies.

    Args:
        read: gets a client and some ids; gives as many replies for each id, in their order.
    """
    known: set[str] = set()
    for portion in chunks(ids, CHUNK_SIZE):
        values = yield _reading(read, portion)
        for at, job_id in enumerate(portion):
            if any(value is not None for value in values[at * replies : (at + 1) * replies]):
                known.add(job_id)
    return known


def _reading(read: Callable[[Any, Sequence[str]], Any], ids: Sequence[str]) -> Call:
    return lambda client: read(client, ids)
