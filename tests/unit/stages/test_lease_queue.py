"""What a worker asks of the claim scripts, and what it makes of their replies, without a server."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import redis

from shiwu.contract import Lane, result_key
from shiwu_worker.jobs.job import Release
from shiwu_worker.policy.limits import LeaseOptions
from shiwu_worker.stages.claim import lease_queue as module
from shiwu_worker.stages.claim.lease_queue import LAST_CLAIM_KEPT_MS, MAX_CLAIM, LeaseQueue
from tests.support.clock import Clock

BULK, INTERACTIVE = 5, 1
"""Numbers of lanes in the reply."""


class Parts:
    """The claims of one worker over scripts that give what the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.clock = Clock()
        monkeypatch.setattr(module.time, "monotonic", self.clock.monotonic)
        self.claims: list[list[Any]] = []
        self.replies: list[Any] = []
        self.released: list[list[Any]] = []
        self.ended: list[list[Any]] = []
        self.renewed: list[list[Any]] = []
        self.last_ids: list[str] = []
        self.is_failing = False
        self.answers_ms: list[float] = []
        self.announced: list[tuple[list[str], list[Any]]] = []
        monkeypatch.setattr(module, "load_script", lambda _, name, **__: getattr(self, f"_{name}"))
        monkeypatch.setattr(module, "answered_before", self._answered_before)
        lease = LeaseOptions(**({"lease_s": 60.0, "bulk_share": 0.1} | options))
        client: Any = SimpleNamespace()
        self.queue = LeaseQueue(client, lease, token="t", worker="w", result_ttl_s=77)

    def _answered_before(self, worker: str, *, now_ms: float) -> bytes:
        assert worker == "w"
        self.answers_ms.append(now_ms)
        return b"answer"

    def _claim(self, *, keys: list[str], args: list[Any]) -> Any:
        self.claims.append(args)
        reply = self.replies.pop(0) if self.replies else [b"1000", 0, []]
        if isinstance(reply, Exception):
            raise reply
        return reply

    def _renew(self, *, keys: list[str], args: list[Any]) -> Any:
        self.renewed.append(args)
        return [b"lost"]

    def _release(self, *, keys: list[str], args: list[Any]) -> int:
        self.released.append(args)
        return (len(args) - 11) // 4

    def _answer_duplicates(self, *, keys: list[str], args: list[Any]) -> None:
        self.announced.append((keys, args))
        if self.is_failing:
            raise redis.ConnectionError("lost")

    def _end_claims(self, *, keys: list[str], args: list[Any]) -> bytes:
        self.ended.append(args)
        return msgspec.json.encode(self.last_ids)

    def reply(self, *lanes: int, is_quarantine_owner: int = 0, duplicates: tuple[bytes, ...] = ()) -> None:
        """Let the next claim give a job of each of these lanes."""
        jobs = [[f"j{n}".encode(), n + 1, 0, lane, b"raw", n % 2, b"", 3] for n, lane in enumerate(lanes)]
        self.replies.append([b"1000.5", is_quarantine_owner, [*duplicates], *(field for job in jobs for field in job)])


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    """A worker that serves both lanes, and bulk with a tenth of each claim."""
    return Parts(monkeypatch)


def test_claim_passes_its_limits_to_the_script(parts: Parts) -> None:
    """The lease in ms, the share of bulk, and whether nothing is held."""
    parts.queue.claim(40, bulk_limit=30)
    parts.queue.claim(5, bulk_limit=30, held=["a"])
    parts.queue.claim(MAX_CLAIM + 1)
    first, second, third = parts.claims
    assert first[:4] == ["t", 40, 4, 60_000]
    assert (first[4], second[4], third[4]) == (1, 0, 1)
    assert [args[6:9] for args in parts.claims] == [[1, 1, 30], [1, 1, 5], [1, 1, MAX_CLAIM]]
    assert [args[10] for args in parts.claims] == [1, 2, 3]
    assert third[1] == MAX_CLAIM


@pytest.mark.parametrize(
    ("lanes", "flags"), [((Lane.BULK,), [0, 1]), ((Lane.INTERACTIVE,), [1, 0]), (tuple(Lane), [1, 1])]
)
def test_only_served_lanes_are_claimed(
    monkeypatch: pytest.MonkeyPatch, lanes: tuple[Lane, ...], flags: list[int]
) -> None:
    """As the options name them."""
    parts = Parts(monkeypatch, lanes=lanes)
    parts.queue.claim(1)
    assert parts.claims[0][6:8] == flags


def test_bulk_share_adds_up_to_two_of_them(parts: Parts) -> None:
    """Claims with only interactive jobs leave bulk its share; empty claims add nothing."""
    owed = []
    for _ in range(4):
        parts.reply(INTERACTIVE)
        parts.queue.claim(40)
    owed += [args[2] for args in parts.claims]
    assert owed == [4, 8, 8, 8]
    parts.reply(BULK, BULK, INTERACTIVE)
    parts.queue.claim(40)
    parts.queue.claim(40)
    assert [args[2] for args in parts.claims[4:]] == [8, 8]
    parts.reply(*[BULK] * 20)
    parts.queue.claim(40)
    parts.queue.claim(40)
    assert [args[2] for args in parts.claims[6:]] == [8, 4]
    parts.queue.claim(40)
    assert parts.claims[8][2] == 4


def test_small_claims_owe_bulk_two_jobs_at_most(parts: Parts) -> None:
    """A tenth of a claim of one job."""
    for _ in range(30):
        parts.reply(INTERACTIVE)
        parts.queue.claim(1)
    owed = [args[2] for args in parts.claims]
    assert owed[8] == 0
    assert owed[11] == 1
    assert owed[-1] == 2


def test_jobs_are_read_from_the_reply(parts: Parts) -> None:
    """All fields, and the clocks of server and worker at the claim."""
    parts.reply(INTERACTIVE, BULK)
    result = parts.queue.claim(5)
    first, second = result.jobs
    assert (first.id, first.attempt, first.deaths, first.raw, first.history) == ("j0", 1, 0, b"raw", b"")
    assert (first.key, second.key) == (Lane.INTERACTIVE.keys[0], Lane.BULK.keys[0])
    assert (first.is_revoked, second.is_revoked) == (False, True)
    assert (first.claimed_ms, first.claimed_s, first.generation) == (1000.5, parts.clock.now_s, 3)
    assert result.is_quarantine_owner is False


def test_owner_of_the_quarantine_takes_turns(parts: Parts) -> None:
    """With the lanes, where it holds nothing; while it holds jobs, the turn stays."""
    for held, owns in (([], 1), ([], 1), (["a"], 1), ([], 0), ([], 1)):
        parts.reply(is_quarantine_owner=owns)
        assert parts.queue.claim(5, held=held).is_quarantine_owner is bool(owns)
    assert [args[5] for args in parts.claims] == [1, 0, 1, 1, 1]


def test_lost_reply_is_released_before_the_next_claim(parts: Parts) -> None:
    """Without what this worker holds; the last one of a release comes first in its lane."""
    assert not parts.queue.has_lost_reply
    parts.replies.append(redis.ConnectionError("lost"))
    with pytest.raises(redis.ConnectionError):
        parts.queue.claim(5)
    assert parts.queue.has_lost_reply
    parts.last_ids = ["a", "b", "c"]
    parts.queue.claim(5, held=["b"])
    assert parts.ended == [[1, LAST_CLAIM_KEPT_MS]]
    [args] = parts.released
    assert args[11::4] == ["c", "a"]
    assert args[12:15] == [0, 0, ""]
    assert not parts.queue.has_lost_reply
    parts.queue.claim(5)
    assert len(parts.ended) == 1


def test_duplicates_are_announced_under_their_keys(parts: Parts) -> None:
    """By a call of its own, only where there are any; if it fails, the claim counts as lost."""
    parts.queue.claim(5)
    assert parts.announced == []
    parts.reply(INTERACTIVE, duplicates=(b"a", b"b"))
    assert len(parts.queue.claim(5).jobs) == 1
    [(keys, args)] = parts.announced
    assert keys[2:] == [result_key("a"), result_key("b")]
    assert args == ["t", 77, b"answer", "a", "b"]
    assert parts.answers_ms == [1000.5], "by the server's clock"
    parts.reply(INTERACTIVE, duplicates=(b"a",))
    parts.is_failing = True
    with pytest.raises(redis.ConnectionError):
        parts.queue.claim(5)
    assert parts.queue.has_lost_reply


def test_nothing_is_claimed_after_the_end(parts: Parts) -> None:
    """And what the last claim brought goes back, but for what is held."""
    parts.last_ids = ["a", "b"]
    assert parts.queue.end(["a"]) == 1
    assert parts.queue.claim(5).jobs == ()
    assert parts.claims == []


def test_release_says_how_each_job_goes_back(parts: Parts) -> None:
    """Delay in ms, whether the attempt counts, and how it ended. Nothing is asked for no jobs."""
    assert parts.queue.release([]) == 0
    assert parts.queue.renew([]) == []
    assert (parts.released, parts.renewed) == ([], [])
    releases = [Release("a", delay_s=1.5, counts=True, ending="x|"), Release("b", counts=False)]
    assert parts.queue.release(releases) == 2
    [args] = parts.released
    assert args[0] == "t"
    assert args[11:15] == ["a", 1500, 1, "x|"]
    assert args[15:18] == ["b", 0, 0]
    assert parts.queue.renew(["a", "b"]) == ["lost"]
    assert parts.renewed == [["t", 60_000, "a", "b"]]


def test_short_delay_of_a_release_stays_a_delay(parts: Parts) -> None:
    """An attempt that counts and has no delay would be a worker death, and the second one quarantines the job."""
    parts.queue.release([Release("a", delay_s=0.0004, counts=True), Release("b", delay_s=0.0021), Release("c")])
    assert parts.released[0][12::4] == [1, 3, 0]
