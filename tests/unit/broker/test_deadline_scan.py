"""A pass over quarantine and lanes finds each late message once, while workers take messages from their heads."""

from __future__ import annotations

import random
from datetime import UTC
from types import SimpleNamespace
from typing import Any

import pytest

from shiwu.broker import deadline_scan
from shiwu.broker.deadline_scan import MAX_SEARCHED, PORTION, DeadlineScan, late_messages
from shiwu.broker.message_writer import build_message
from shiwu.contract import QUARANTINE, ErrorCode, Lane, Request, RequestError

LISTS = (QUARANTINE, *(key for lane in Lane for key in lane.keys))
BULK = Lane.BULK.queue
NOW_MS = 5000.0


class Lists:
    """Lists of a server: the oldest message is the last one."""

    def __init__(self) -> None:
        self.lists: dict[str, list[bytes]] = {}
        self.reads: list[tuple[str, int]] = []

    def lrange(self, key: str, first: int, last: int) -> list[bytes]:
        """As the command with negative indexes."""
        values = self.lists.get(key, [])
        begin = max(0, len(values) + first) if first < 0 else first
        found = values[begin : max(0, len(values) + last + 1)]
        assert len(found) <= PORTION, "a longer read would block the server"
        self.reads.append((key, len(found)))
        return found

    def lindex(self, key: str, index: int) -> bytes | None:
        """As the command."""
        values = self.lists.get(key, [])
        return values[index] if -len(values) <= index < len(values) else None

    def push(self, key: str, count: int, *, first: int = 0) -> list[str]:
        """Add messages at the back; return them, the oldest first."""
        names = [f"{key}/{number}" for number in range(first, first + count)]
        self.lists[key] = [*(name.encode() for name in reversed(names)), *self.lists.get(key, [])]
        return names


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch) -> Lists:
    """Lists whose messages are all late, and are their ids."""

    def read(raw: bytes, **_: Any) -> Any:
        return SimpleNamespace(id=raw.decode(), expires_ms=0.0)

    monkeypatch.setattr(deadline_scan, "read_message", read)
    return Lists()


def make_scan(lists: Lists) -> DeadlineScan:
    """A scan of these lists."""
    client: Any = lists
    return DeadlineScan(client)


def step(scan: DeadlineScan, limit: int, *, now_ms: float = NOW_MS) -> list[str]:
    """Ids that one step finds, list by list, the oldest message first."""
    return sorted((envelope.id for envelope in scan.step(now_ms=now_ms, limit=limit, zone=UTC)), key=rank)


def rank(name: str) -> tuple[int, int]:
    """The place of a message in a pass."""
    key, _, number = name.rpartition("/")
    return LISTS.index(key), int(number)


@pytest.mark.parametrize("seed", range(12))
def test_each_late_message_is_found_once(lists: Lists, seed: int) -> None:
    """Whatever the limit of a step, and however many messages workers take between two steps."""
    chance = random.Random(seed)
    expected = {key: lists.push(key, chance.choice([0, 1, 99, 100, 101, 450])) for key in LISTS[1:]}
    scan, found, taken = make_scan(lists), list[str](), set[str]()
    for _ in range(2000):
        limit = chance.choice([1, 7, 100, 250])
        portion = step(scan, limit)
        assert len(portion) <= limit
        found += portion
        if scan.finished_ms:
            break
        for key in LISTS[1:]:
            for _ in range(min(chance.choice([0, 0, 3, 40]), len(lists.lists[key]))):
                taken.add(lists.lists[key].pop().decode())
            # Those that come meanwhile may be found too, or in the next pass.
            lists.push(key, chance.choice([0, 2]), first=10_000 + 10 * len(found))
    else:
        pytest.fail("the pass did not end")
    assert len(found) == len(set(found))
    assert {name for names in expected.values() for name in names} <= set(found) | taken
    assert found == sorted(found, key=rank)


def test_message_is_found_again_by_its_place(lists: Lists) -> None:
    """Also many portions further to the head; a lost place, and only that, begins the list again."""
    names = lists.push(BULK, 1000)
    scan = make_scan(lists)
    assert step(scan, LISTS.index(BULK) + 700) == names[:700]
    del lists.lists[BULK][-650:]
    assert step(scan, 100) == names[700:800]
    assert step(scan, 10) == names[800:810]
    del lists.lists[BULK][-170:]
    assert step(scan, 10) == names[820:830]
    del lists.lists[BULK][-9:]
    assert len(lists.lists[BULK]) == 171
    assert step(scan, 10) == names[830:840], "the last message of the step before is the oldest one"


def test_search_for_the_place_is_bounded(lists: Lists) -> None:
    """A list that moved too far is read from its head."""
    first = MAX_SEARCHED * PORTION + 1000
    names = lists.push(BULK, first + 500)
    scan = make_scan(lists)
    assert len(step(scan, LISTS.index(BULK) + first)) == first
    del lists.lists[BULK][-(first - 10) :]
    lists.reads.clear()
    assert step(scan, 5) == names[first - 10 : first - 5]
    assert len(lists.reads) == MAX_SEARCHED + 1
    assert lists.reads[0][1] <= PORTION


def test_empty_lists_cost_a_read_each(lists: Lists) -> None:
    """A step has a bound; a pass is finished as of its begin, and the next one begins with the first list again."""
    scan = make_scan(lists)
    assert scan.finished_ms == 0.0
    for number in range(len(LISTS)):
        assert scan.finished_ms == 0.0
        assert step(scan, 1, now_ms=NOW_MS + number) == []
    assert [key for key, _ in lists.reads] == list(LISTS)
    assert scan.finished_ms == NOW_MS
    lists.reads.clear()
    step(scan, 100, now_ms=NOW_MS + 50)
    assert [key for key, _ in lists.reads] == list(LISTS)
    assert scan.finished_ms == NOW_MS + 50


def test_full_portion_is_followed_by_the_rest_of_its_list(lists: Lists) -> None:
    """A list of exactly one portion is left after a look at its end."""
    names = lists.push(BULK, PORTION)
    scan = make_scan(lists)
    index = LISTS.index(BULK)
    assert step(scan, index + PORTION) == names
    lists.push(BULK, 1, first=PORTION)
    assert step(scan, 1) == [f"{BULK}/{PORTION}"]
    assert step(scan, 1) == []
    assert scan._list == index + 1


def test_message_is_late_from_its_deadline_on() -> None:
    """In quarantine a record names its lane first. Messages that cannot be read, or have no deadline, are skipped."""

    def raw(job_id: str, **times: float) -> bytes:
        return build_message(Request(image="s3://b/k"), job_id=job_id, lane=Lane.BULK, **times)

    records = [raw("before", expires_ms=NOW_MS - 1), raw("never"), b"junk", raw("now", expires_ms=NOW_MS)]
    records.append(raw("later", expires_ms=NOW_MS + 1))
    for key, prefix in ((BULK, b""), (QUARANTINE, b"shiwu.bulk|")):
        found = late_messages(key, [prefix + record for record in records], now_ms=NOW_MS, zone=UTC)
        assert [envelope.id for envelope in found] == ["before", "now"]


def test_unreadable_message_is_left_to_a_worker(lists: Lists, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scan goes on behind it."""

    def read(raw: bytes, **_: Any) -> Any:
        if raw.endswith(b"/0"):
            raise RequestError(ErrorCode.MALFORMED_MESSAGE, "junk")
        return SimpleNamespace(id=raw.decode(), expires_ms=0.0)

    monkeypatch.setattr(deadline_scan, "read_message", read)
    names = lists.push(BULK, 3)
    assert step(make_scan(lists), 1000) == names[1:]
