"""Dead letters: jobs that ended without tags, kept with message and answer until requeued, dropped or too old."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Any, Final

from shiwu.broker.answers import DeadMessage
from shiwu.broker.chunks import chunks
from shiwu.broker.script_loader import call_repeatable_script
from shiwu.broker.server_clock import server_time_steps
from shiwu.broker.steps import Steps, on_shards
from shiwu.client.arguments import read_seconds
from shiwu.client.results import TagResult, read_answer
from shiwu.contract import (
    ATTEMPTS,
    CLAIMS,
    COUNTERS,
    DEAD,
    DEAD_ANSWERS,
    DEAD_MESSAGES,
    DELAYED_MESSAGES,
    MARKS,
    Lane,
    done_key,
    result_key,
)

CHUNK_SIZE: Final = 500
_REQUEUE_KEYS: Final = (DEAD, DEAD_ANSWERS, DEAD_MESSAGES, ATTEMPTS, COUNTERS, CLAIMS, DELAYED_MESSAGES)
_LANE_KEYS: Final = tuple(key for lane in Lane for key in lane.keys)


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A job that ended `rejected` or `failed`, with its message and its answer."""

    id: str
    """The job id, or `~` and a digest where the message has none."""
    died_ms: float
    """When the job ended, in ms since 1970 by Redis' clock."""
    result: TagResult
    """The answer: status, error with code and stage, attempts, worker, times."""
    message: bytes
    """The Celery message as it was sent, or its first bytes where it was too large to be accepted."""
    lane: Lane | None
    """The lane that `requeue` puts it into; None where this version does not know the lane, then bulk."""
    size: int = 0
    """Bytes of the whole message."""
    sha256: str | None = None
    """Digest of the whole message where `message` is only its beginning. Such a letter cannot be requeued."""


@dataclass(frozen=True, slots=True)
class DeadFilter:
    """Selects dead letters: all fields that are set must match."""

    code: str | None = None
    """Error code, such as `source_not_found`."""
    stage: str | None = None
    """Stage in which the job failed, such as `fetch`."""
    status: str | None = None
    """`rejected` or `failed`."""
    worker: str | None = None
    """Name of the worker that answered."""
    image: str | None = None
    """Part of the image's reference."""
    older_s: float | None = None
    """Ended longer ago than this, in seconds."""
    newer_s: float | None = None
    """Ended within this time, in seconds."""

    def __post_init__(self) -> None:
        """Check the ages.

        Raises:
            RequestError: an age is not a number of seconds.
        """
        for name in ("older_s", "newer_s"):
            if (value := getattr(self, name)) is not None:
                read_seconds(name, value)

    def admits(self, letter: DeadLetter) -> bool:
        """Whether a dead letter matches all fields except the ages, which Redis compares."""
        result = letter.result
        error = result.error
        return (
            (self.code is None or (error is not None and error.code == self.code))
            and (self.stage is None or (error is not None and error.stage == self.stage))
            and (self.status is None or result.status == self.status)
            and (self.worker is None or result.worker == self.worker)
            and (self.image is None or (result.image is not None and self.image in result.image.reference))
        )


class DeadPages:
    """The dead letters that a filter selects, newest first, page by page.

    Those that are added or removed while the pages are read may be missing.
    """

    def __init__(self, where: DeadFilter, *, limit: int | None) -> None:
        self._where = where
        self._left = math.inf if limit is None else limit
        self._portions: Iterator[Sequence[tuple[bytes, float]]] | None = None

    def next_steps(self) -> Steps[list[DeadLetter] | None]:
        """Read the next page, which may be empty; None after the last one."""
        if self._portions is None:
            found = yield from self._find_steps()
            self._portions = chunks(found, CHUNK_SIZE)
        portion = next(self._portions, None) if self._left > 0 else None
        if portion is None:
            return None
        letters = yield from _load_steps(portion)
        page = [letter for letter in letters if self._where.admits(letter)]
        page = page[: int(min(self._left, len(page)))]
        self._left -= len(page)
        return page

    def _find_steps(self) -> Steps[list[tuple[bytes, float]]]:
        now_ms = yield from server_time_steps()
        where = self._where
        newest = now_ms - where.older_s * 1000 if where.older_s is not None else "+inf"
        oldest = now_ms - where.newer_s * 1000 if where.newer_s is not None else "-inf"
        found: list[tuple[bytes, float]] = yield lambda client: client.zrevrangebyscore(
            DEAD, newest, oldest, withscores=True
        )
        return found


class MergedDeadPages:
    """As `DeadPages`, of all shards together."""

    def __init__(self, where: DeadFilter, *, limit: int | None, shards: int) -> None:
        self._left = math.inf if limit is None else limit
        self._unread = {shard: DeadPages(where, limit=limit) for shard in range(shards)}
        """Shards that may have more pages."""
        self._read: dict[int, deque[DeadLetter]] = {shard: deque() for shard in range(shards)}

    def next_steps(self) -> Steps[list[DeadLetter] | None]:
        """Read the next page, which may be empty; None after the last one."""
        if self._left <= 0:
            return None
        wanted = [shard for shard in self._unread if not self._read[shard]]
        pages = yield from on_shards({shard: self._unread[shard].next_steps() for shard in wanted})
        for shard, page in pages.items():
            if page is None:
                del self._unread[shard]
            else:
                self._read[shard].extend(page)
        # A shard whose next letter is not known may have the newest one.
        merged: list[DeadLetter] = []
        heap = [(-letters[0].died_ms, shard) for shard, letters in self._read.items() if letters]
        heapify(heap)
        while heap and len(merged) < self._left and all(self._read[shard] for shard in self._unread):
            shard = heappop(heap)[1]
            merged.append(self._read[shard].popleft())
            if self._read[shard]:
                heappush(heap, (-self._read[shard][0].died_ms, shard))
        self._left -= len(merged)
        return merged if merged or self._unread else None


def show_steps(job_id: str) -> Steps[DeadLetter | None]:
    """Read one dead letter; None where there is none."""
    died_ms = yield lambda client: client.zscore(DEAD, job_id)
    letters = [] if died_ms is None else (yield from _load_steps([(job_id.encode(), died_ms)]))
    return letters[0] if letters else None


def requeue_steps(job_ids: Iterable[str]) -> Steps[list[str]]:
    """Put dead letters at the back of their lane, with the same ids; return the ids that were requeued.

    Attempts start at one again. The old answer is removed, so a wait for the id waits for the new one. A late answer of
    an earlier generation is discarded. An id that was sent again, and is claimed or delayed now, is not requeued: its
    new answer replaces the dead letter. Neither is one of which only the digest is kept.
    """
    requeued: list[str] = []
    for portion in chunks(list(job_ids), CHUNK_SIZE):
        reply = yield call_repeatable_script(
            "requeue",
            keys=[*_REQUEUE_KEYS, *MARKS, *_LANE_KEYS, *map(result_key, portion), *map(done_key, portion)],
            args=[*_LANE_KEYS, *portion],
        )
        requeued += [job_id.decode() for job_id in reply]
    return requeued


def drop_steps(job_ids: Iterable[str]) -> Steps[int]:
    """Delete dead letters; return how many were deleted. Their answers are not deleted."""
    dropped = 0
    for portion in chunks(list(job_ids), CHUNK_SIZE):
        dropped += yield call_repeatable_script("drop", keys=[DEAD, DEAD_ANSWERS, DEAD_MESSAGES], args=portion)
    return dropped


def _load_steps(found: Sequence[tuple[bytes, float]]) -> Steps[list[DeadLetter]]:
    ids: list[str] = [job_id.decode() for job_id, _ in found]

    def read_both(client: Any) -> Any:
        pipe = client.pipeline(transaction=True)
        pipe.hmget(DEAD_ANSWERS, ids)
        pipe.hmget(DEAD_MESSAGES, ids)
        return pipe.execute()

    answers, messages = yield read_both
    letters = []
    for (_, died_ms), job_id, answer, message in zip(found, ids, answers, messages, strict=True):
        if answer is not None and message is not None:
            kept = DeadMessage.read(message)
            lane = next((lane for lane in Lane if kept.lane_key in lane.keys), None)
            result = read_answer(answer, job_id=job_id)
            letters.append(DeadLetter(job_id, died_ms, result, kept.message, lane, kept.size, kept.sha256))
    return letters
