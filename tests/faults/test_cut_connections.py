"""Connections that break at every byte of a claim, a renewal and a commit: nothing is lost, nothing counts twice."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple, TypeVar

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from shiwu.broker.answers import AnswerEntry
from shiwu.contract import CLAIMS, COUNTERS, DELAYED, DELAYED_MESSAGES, LEASES, QUARANTINE, RESULT_STREAM, Lane
from tests.support.fault_proxy import FaultProxy, Side
from tests.support.redis_parts import LANES, answer, make_answer_store, make_lease_queue, make_maintenance, message
from tests.support.waiting import wait_until

T = TypeVar("T")
NAME: Final = "cutter"
"""The worker behind the proxy: its token, and the name of its connections."""
EDGE: Final = 64
STEP: Final = 7
TRIES: Final = 5


class Cut(NamedTuple):
    """Where a connection breaks."""

    side: Side
    at: int

    def arm(self, proxy: FaultProxy) -> None:
        """Let the next traffic run into it."""
        (proxy.cut_request_after if self.side == "request" else proxy.cut_reply_after)(self.at)


def far_client(proxy: FaultProxy, *, timeout_s: float) -> redis.Redis:
    """A client through the proxy that tries everything once."""
    return redis.Redis.from_url(proxy.url, socket_timeout=timeout_s, retry=Retry(NoBackoff(), 0), client_name=NAME)


@pytest.fixture
def proxy(redis_url: str) -> Iterator[FaultProxy]:
    """A proxy before the real server, without faults."""
    with FaultProxy(redis_url) as running:
        yield running


@pytest.fixture
def far(proxy: FaultProxy) -> Iterator[redis.Redis]:
    """The worker's client through the proxy."""
    with far_client(proxy, timeout_s=2) as client:
        yield client


def measure(proxy: FaultProxy, call: Callable[[], object]) -> list[Cut]:
    """Where to cut a call that succeeds now: all of the request, all but the end of the reply."""
    sent_bytes, reply_bytes = proxy.sent_bytes, proxy.reply_bytes
    call()
    request, reply = proxy.sent_bytes - sent_bytes, proxy.reply_bytes - reply_bytes
    assert request > 0
    assert reply > 0
    return [*(Cut("request", at) for at in places(request, request + 1)), *(Cut("reply", at) for at in places(reply))]


def places(length: int, end: int | None = None) -> list[int]:
    """The positions below `end`: all near both ends of a message of this length, some between."""
    return [at for at in range(end or length) if at <= EDGE or at >= length - EDGE or at % STEP == 0]


def call_cut(proxy: FaultProxy, far: redis.Redis, near: redis.Redis, cut: Cut, call: Callable[[], T]) -> T | None:
    """The call over an open connection that breaks, None where it failed; the server is done with it on return."""
    far.ping()
    cuts = proxy.cuts
    cut.arm(proxy)
    try:
        return call()
    except redis.RedisError:
        settled(near)
        return None
    finally:
        proxy.heal()
        assert proxy.cuts == cuts + 1, f"expected {cut} to fire"


def settled(near: redis.Redis) -> None:
    """Wait until the server has seen the end of the broken connections, and so has executed all that came by them."""
    wait_until(
        lambda: all(each["name"] != NAME for each in near.client_list()),
        timeout_s=5,
        what="the end of the broken connections",
        every_s=0.001,
    )


def until_success(call: Callable[[], T]) -> T:
    """The call, tried again after errors as a worker does."""
    for _ in range(TRIES - 1):
        try:
            return call()
        except redis.RedisError:
            continue
    return call()


def where(near: redis.Redis) -> tuple[Counter[str], dict[str, str]]:
    """How often each id waits in a lane or among the suspects, and who holds which id under a lease."""
    with near.pipeline() as pipe:
        for _, key in LANES:
            pipe.lrange(key, 0, -1)
        pipe.lrange(QUARANTINE, 0, -1)
        pipe.hgetall(CLAIMS)
        pipe.zrange(LEASES, 0, -1)
        pipe.hkeys(DELAYED_MESSAGES)
        pipe.zrange(DELAYED, 0, -1)
        *lanes, suspects, claims, leased, stored, delayed = pipe.execute()
    assert not stored
    assert not delayed
    assert set(claims) == set(leased)
    raws = [raw for lane in lanes for raw in lane] + [each.partition(b"|")[2] for each in suspects]
    waiting = Counter(str(json.loads(raw)["headers"]["id"]) for raw in raws)
    return waiting, {job_id.decode(): record.partition(b"|")[0].decode() for job_id, record in claims.items()}


def send(near: redis.Redis, number: int) -> list[str]:
    """Two jobs, one in each lane; their ids have one length, so that each round is as long as the measured one."""
    ids = [f"{lane.name.lower()[0]}-{number:05}" for lane in Lane]
    for job_id, lane in zip(ids, Lane, strict=True):
        near.lpush(lane.keys[0], message(job_id, lane))
    return ids


def answered(near: redis.Redis) -> Counter[str]:
    """How many entries of the results stream each id has."""
    entries: Any = near.xrange(RESULT_STREAM)
    return Counter(fields[b"id"].decode() for _, fields in entries)


def counted(near: redis.Redis) -> int:
    """The counter of answers."""
    count: Any = near.hget(COUNTERS, "answered")
    return int(count or 0)


@pytest.mark.slow
def test_a_cut_claim_loses_nothing(proxy: FaultProxy, far: redis.Redis, redis_client: redis.Redis) -> None:
    """Jobs whose claim was cut wait in their lanes or are claimed; a claim whose reply was lost ends with its lease."""
    claims = make_lease_queue(far, NAME, lease_s=0.0, bulk_share=0.0)
    successor, committer = make_lease_queue(redis_client, "successor"), make_answer_store(redis_client, "successor")
    another = make_lease_queue(redis_client, "another")
    maintenance = make_maintenance(redis_client)
    sent: list[str] = []

    def answer_by_successor(ids: list[str]) -> None:
        jobs = successor.claim(10).jobs
        assert sorted(job.id for job in jobs) == sorted(ids)
        assert committer.write([answer(job) for job in jobs]) == set()
        assert where(redis_client) == (Counter(), {})
        sent.extend(ids)

    claims.claim(2)  # loads the script
    ids = send(redis_client, 0)
    found = measure(proxy, lambda: claims.claim(2))
    assert maintenance.run_once().reaped == 2
    answer_by_successor(ids)
    for number, cut in enumerate(found, start=1):
        # A new one each time: after a lost reply a worker first asks what it had claimed.
        claims = make_lease_queue(far, NAME, lease_s=0.0, bulk_share=0.0)
        ids = send(redis_client, number)
        taken = call_cut(proxy, far, redis_client, cut, lambda: claims.claim(2))  # noqa: B023 called in this turn of the loop
        if taken is not None:
            assert sorted(job.id for job in taken.jobs) == sorted(ids), cut
        waiting, held = where(redis_client)
        assert waiting + Counter(list(held)) == Counter(ids), f"{cut}: each job is in one place"
        assert held in ({}, dict.fromkeys(ids, NAME)), f"{cut}: all or none"
        if taken is not None or cut.side == "reply":
            assert held, f"{cut}: the server had executed it"
            send(redis_client, number)  # copies, of a producer whose own connection broke
            assert another.claim(2).jobs == (), f"{cut}: claimed jobs are handed out once"
        maintenance.run_once()
        assert where(redis_client) == (Counter(ids), {}), cut
        answer_by_successor(ids)
    assert answered(redis_client) == Counter(sent)


@pytest.mark.slow
def test_a_cut_renewal_that_is_tried_again_holds(
    proxy: FaultProxy, far: redis.Redis, redis_client: redis.Redis
) -> None:
    """Leases hold after the second try, and who lost a job is told then."""
    claims = make_lease_queue(far, NAME, lease_s=60.0)
    ids = send(redis_client, 0)
    asked = [*ids, "job-of-another"]
    assert {job.id for job in claims.claim(2).jobs} == set(ids)
    claims.renew(asked)  # loads the script
    for cut in measure(proxy, lambda: claims.renew(asked)):
        redis_client.zadd(LEASES, dict.fromkeys(ids, 1.0))
        lost = call_cut(proxy, far, redis_client, cut, lambda: claims.renew(asked))
        if cut.side == "reply":
            assert leases_hold(redis_client, ids), f"{cut}: the reply alone was lost"
        if lost is None:
            lost = until_success(lambda: claims.renew(asked))
        assert lost == ["job-of-another"], cut
        assert leases_hold(redis_client, ids), cut
        assert make_maintenance(redis_client).run_once().reaped == 0, cut
        assert where(redis_client) == (Counter(), dict.fromkeys(ids, NAME)), cut


def leases_hold(near: redis.Redis, ids: list[str]) -> bool:
    """Whether these leases, and no others, last longer than half a minute from now by the server's clock."""
    seconds, _ = near.time()
    leases: Any = near.zrange(LEASES, 0, -1, withscores=True)
    return {job_id.decode() for job_id, ends_ms in leases if ends_ms > (seconds + 30) * 1000} == set(ids)


def cut_commits(
    proxy: FaultProxy, far: redis.Redis, near: redis.Redis, *, has_rival: bool
) -> Iterator[tuple[Cut, list[str], set[str]]]:
    """Commit two claimed jobs, cut at each place and tried until it succeeds: the ids, and those answered before.

    A rival has answered the first of the two already.
    """
    claims, committer, rival = (
        make_lease_queue(near, NAME),
        make_answer_store(far, NAME),
        make_answer_store(near, "rival"),
    )

    def claimed(number: int) -> list[AnswerEntry]:
        ids = send(near, number)
        jobs = claims.claim(2).jobs
        assert [job.id for job in jobs] == ids
        if has_rival:
            assert rival.write([answer(jobs[0])]) == set()
        return [answer(job) for job in jobs]

    known = claimed(0)
    committer.write(known)  # loads the script
    known = claimed(1)
    found = measure(proxy, lambda: committer.write(known))
    near.delete(RESULT_STREAM, COUNTERS)
    for number, cut in enumerate(found, start=2):
        entries = claimed(number)
        again = call_cut(proxy, far, near, cut, lambda: committer.write(entries))  # noqa: B023 called in this turn of the loop
        if again is None:
            again = until_success(lambda: committer.write(entries))  # noqa: B023 called in this turn of the loop
        yield cut, [entry.id for entry in entries], again


@pytest.mark.slow
@pytest.mark.parametrize("has_rival", [False, True], ids=["alone", "rival"])
def test_a_cut_commit_that_is_tried_again_answers_once(
    proxy: FaultProxy, far: redis.Redis, redis_client: redis.Redis, has_rival: bool
) -> None:
    """Each id has one entry in the stream, and the second try takes no answer of its own for another's."""
    sent: list[str] = []
    for cut, ids, again in cut_commits(proxy, far, redis_client, has_rival=has_rival):
        assert again == (set(ids[:1]) if has_rival else set()), cut
        assert where(redis_client) == (Counter(), {}), cut
        sent += ids
    assert answered(redis_client) == Counter(sent)


@pytest.mark.slow
@pytest.mark.parametrize("has_rival", [False, True], ids=["alone", "rival"])
def test_a_cut_commit_that_is_tried_again_counts_once(
    proxy: FaultProxy, far: redis.Redis, redis_client: redis.Redis, has_rival: bool
) -> None:
    """The counter of answers rises by the number of ids, however often their commit was tried."""
    wrong: dict[Cut, int] = {}
    before = 0
    for cut, ids, _ in cut_commits(proxy, far, redis_client, has_rival=has_rival):
        risen = counted(redis_client) - before
        before += risen
        if risen != len(ids):
            wrong[cut] = risen
    assert wrong == {}, "expected the counter to rise by 2 each time"


@pytest.mark.parametrize("what", ["claim", "renew", "commit"])
def test_a_black_hole_is_a_time_out_and_then_over(proxy: FaultProxy, redis_client: redis.Redis, what: str) -> None:
    """Silence is an error within the client's own time; when the route is back the same call succeeds."""
    with far_client(proxy, timeout_s=1) as far:
        claims, committer = make_lease_queue(far, NAME, lease_s=0.0), make_answer_store(far, NAME)
        assert claims.claim(2).jobs == (), "expected an empty server; this opens the connection"
        ids = send(redis_client, 0)
        jobs = claims.claim(2).jobs if what != "claim" else ()
        calls: dict[str, Callable[[], object]] = {
            "claim": lambda: sorted(job.id for job in claims.claim(2).jobs),
            "renew": lambda: claims.renew(ids),
            "commit": lambda: committer.write([answer(job) for job in jobs]),
        }
        expected: dict[str, object] = {"claim": sorted(ids), "renew": [], "commit": set()}
        proxy.black_hole()
        started_s = time.monotonic()
        with pytest.raises(redis.TimeoutError):
            calls[what]()
        assert 0.9 < time.monotonic() - started_s < 20
        proxy.heal()
        settled(redis_client)
        if what == "claim":
            # The swallowed claim has arrived after all; no worker knows of it until its lease ends.
            assert where(redis_client) == (Counter(), dict.fromkeys(ids, NAME))
            make_maintenance(redis_client).run_once()
        assert calls[what]() == expected[what]
        assert answered(redis_client) == Counter(ids if what == "commit" else [])


def _least_ping_s(far: redis.Redis) -> float:
    """A busy machine can make any one of them slow."""
    times = []
    for _ in range(5):
        started_s = time.monotonic()
        assert far.ping()
        times.append(time.monotonic() - started_s)
    return min(times)


def test_the_proxy_refuses_delays_and_heals(proxy: FaultProxy, far: redis.Redis) -> None:
    """The faults that no test above has seen are what they are called."""
    assert far.ping()
    proxy.refuse()
    for _ in range(2):
        with pytest.raises(redis.ConnectionError):
            far.ping()
    proxy.heal()
    assert far.ping()
    proxy.delay(0.2)
    assert _least_ping_s(far) >= 0.2
    proxy.heal()
    assert _least_ping_s(far) < 0.2
    assert proxy.cuts == 0
