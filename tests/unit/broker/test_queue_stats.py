"""What is counted of the queues, without a server."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import redis

from shiwu.broker import queue_stats as module
from shiwu.broker.message_writer import build_message
from shiwu.broker.queue_stats import QueueSnapshot, QueueState, count_waiting, read_state, read_workers, shared_snapshot
from shiwu.contract import CLAIMS, COUNTERS, DEAD, DELAYED, QUARANTINE, WORKERS, Lane, Request

NOW_MS = 100_000.0
INTERACTIVE, BULK = Lane


class Parts:
    """The keys of a server."""

    def __init__(self) -> None:
        self.lengths: dict[str, int] = {}
        self.claims: dict[bytes, bytes] = {}
        self.counters: dict[bytes, bytes] = {}
        self.oldest: dict[str, Any] = {}
        self.kept: bytes | None = None
        self.stored: list[tuple[bytes, int]] = []
        self.asked_ms: list[Any] = []
        self.client: Any = SimpleNamespace(
            pipeline=lambda transaction: self._pipe(is_one_step=transaction),
            hscan=self._scan,
            time=lambda: (NOW_MS // 1000, 0),
            zrangebyscore=self._workers,
            get=lambda _: self.kept,
            set=lambda _, raw, px: self.stored.append((raw, px)),
        )

    def _scan(self, key: str, cursor: int, *, count: int) -> tuple[int, dict[bytes, bytes]]:
        """Half of the claims in each of two steps."""
        assert (key, count > 1) == (CLAIMS, True)
        half = len(self.claims) // 2
        claims = list(self.claims.items())
        return (0, dict(claims[half:])) if cursor else (7, dict(claims[:half]))

    def _workers(self, key: str, begin: float, end: str) -> list[bytes]:
        assert (key, end) == (WORKERS, "+inf")
        self.asked_ms.append(begin)
        return [b"w1", b"w\xff"]

    def _pipe(self, *, is_one_step: bool) -> Any:
        assert not is_one_step
        found: list[Any] = []

        def length(key: str) -> None:
            found.append(self.lengths.get(key, 0))

        def oldest(key: str, index: int) -> None:
            assert index == -1
            found.append(self.oldest.get(key))

        def counters(key: str) -> None:
            assert key == COUNTERS
            found.append(self.counters)

        def execute(**_: Any) -> list[Any]:
            return found

        return SimpleNamespace(llen=length, zcard=length, lindex=oldest, hgetall=counters, execute=execute)


@pytest.fixture
def parts() -> Parts:
    """A server without messages."""
    return Parts()


def message(sent_ms: float | None) -> bytes:
    """A message that was sent then."""
    return build_message(Request(image="s3://b/k"), job_id="a", lane=Lane.BULK, sent_ms=sent_ms)


def test_messages_of_all_priorities_are_counted(parts: Parts) -> None:
    """Those of each lane that is asked for."""
    parts.lengths = {key: 10**n for n, key in enumerate((*BULK.keys, *INTERACTIVE.keys))}
    assert count_waiting(parts.client, [BULK]) == {BULK: 1111}
    assert count_waiting(parts.client, list(Lane)) == {INTERACTIVE: 11_110_000, BULK: 1111}


def test_state_has_all_counts(parts: Parts) -> None:
    """Claims that name no lane, as of another program, count as bulk; counters that are no numbers as 0."""
    parts.lengths = {BULK.keys[1]: 3, DELAYED: 4, QUARANTINE: 5, DEAD: 6}
    keys = [INTERACTIVE.keys[3], BULK.keys[0], BULK.keys[2], "another"]
    parts.claims = {key.encode(): b"t|1|" + key.encode() + b"|raw|more" for key in keys} | {b"odd": b"short"}
    digits = b"9" * module.MAX_DIGITS
    parts.counters = {b"reaped": b"7", b"answered": b"12", b"odd": b"x", b"long": digits, b"fits": digits[1:]}
    parts.oldest = {
        INTERACTIVE.keys[0]: message(NOW_MS - 2000),
        INTERACTIVE.keys[2]: message(NOW_MS - 9000),
        INTERACTIVE.keys[3]: message(NOW_MS - 5000),
        BULK.keys[0]: message(None),
        BULK.keys[1]: b"junk",
        BULK.keys[2]: redis.ResponseError("no"),
    }
    state = read_state(parts.client)
    assert state == QueueState(
        waiting={INTERACTIVE: 0, BULK: 3},
        claimed={INTERACTIVE: 1, BULK: 4},
        delayed=4,
        quarantined=5,
        dead=6,
        workers=("w1", "w\N{REPLACEMENT CHARACTER}"),
        counters={"answered": 12, "fits": int(digits[1:]), "long": 0, "odd": 0, "reaped": 7},
        oldest_age_s={INTERACTIVE: 9.0},
    )
    assert list(state.counters) == sorted(state.counters)
    parts.oldest = {BULK.keys[0]: message(NOW_MS + 5000)}
    assert read_state(parts.client).oldest_age_s == {BULK: 0.0}, "a clock was set back"


def test_running_workers_had_a_heartbeat_lately(parts: Parts) -> None:
    """Within the last ten seconds, by the server's clock or a time that is known."""
    read_workers(parts.client)
    read_workers(parts.client, now_ms=50_000.0)
    assert parts.asked_ms == [90_000.0, 40_000.0]


def snapshot(at_ms: float) -> bytes:
    """A snapshot that another worker has made."""
    made = QueueSnapshot(
        at_ms=at_ms, waiting={BULK: 77}, claimed={}, oldest_ms={}, delayed=0, quarantined=0, dead=0, answered=0
    )
    return msgspec.json.encode(made)


@pytest.mark.parametrize(
    ("kept", "is_used"),
    [
        (snapshot(NOW_MS), True),
        (snapshot(NOW_MS - 1999), True),
        (snapshot(NOW_MS - 2000), False),
        (snapshot(NOW_MS + 1), False),
        (b"junk", False),
        (None, False),
    ],
)
def test_snapshot_of_another_worker_is_used_while_it_is_new(parts: Parts, kept: bytes | None, *, is_used: bool) -> None:
    """Otherwise the queues are counted, and the others get what was counted."""
    parts.kept = kept
    parts.lengths = {BULK.keys[0]: 3, DELAYED: 4, QUARANTINE: 5, DEAD: 6}
    parts.counters = {b"answered": b"12"}
    parts.oldest = {BULK.keys[0]: message(NOW_MS - 9000)}
    found = shared_snapshot(parts.client, max_age_s=2.0)
    if is_used:
        assert (found.waiting, parts.stored) == ({BULK: 77}, [])
        return
    assert (found.waiting[BULK], found.delayed, found.quarantined, found.dead, found.answered) == (3, 4, 5, 6, 12)
    assert (found.at_ms, found.oldest_ms) == (NOW_MS, {BULK: NOW_MS - 9000})
    [(raw, px)] = parts.stored
    assert (msgspec.json.decode(raw, type=QueueSnapshot), px) == (found, 2000)


def test_snapshot_without_counters_has_no_answers(parts: Parts) -> None:
    """A new database. The shortest time that the server keeps a key is a millisecond."""
    assert shared_snapshot(parts.client, max_age_s=0.0).answered == 0
    assert parts.stored[0][1] == 1
