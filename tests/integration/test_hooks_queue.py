"""Deliveries of webhooks in a real Valkey: none is lost or added twice, leases, tries, health, dead ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import redis

from shiwu.contract import HOOKS_DELIVERIES, HOOKS_DUE, RESULT_STREAM
from shiwu.hooks.delivery_queue import (
    COMMON_KEYS,
    Delivery,
    DeliveryQueue,
    EndpointHealth,
    NewDelivery,
    Payload,
    QueueOptions,
    pending_key,
)
from tests.support.waiting import wait_until

OPTIONS = QueueOptions(lease_s=60.0, alone_after=3, alone_every_s=60.0, max_age_s=3600.0, max_dead=100)
GROUP = "hooks"


def make_queue(client: redis.Redis, **changes: float) -> DeliveryQueue:
    """A queue with some options changed."""
    return DeliveryQueue(client, replace(OPTIONS, **changes))  # type: ignore[arg-type]  # fields of QueueOptions


def new(number: int, endpoint: str = "a", *, dead_reason: str = "") -> NewDelivery:
    """A delivery to add."""
    return NewDelivery(
        endpoint=endpoint, id=f"k{number}.0", payload=Payload(1), body=b'{"n":1}\n|', dead_reason=dead_reason
    )


def read_entries(client: redis.Redis, count: int) -> list[str]:
    """Entries of the stream that the group has read and not acknowledged."""
    if not client.exists(RESULT_STREAM):
        client.xgroup_create(RESULT_STREAM, GROUP, id="0", mkstream=True)
    for _ in range(count):
        client.xadd(RESULT_STREAM, {"id": "k", "answer": "{}"})
    [[_, entries]] = client.xreadgroup(GROUP, "me", {RESULT_STREAM: ">"}, count=count)
    return [entry_id.decode() for entry_id, _ in entries]


def fill(client: redis.Redis, count: int, *, endpoint: str = "a") -> None:
    """Add deliveries k0 to k<count - 1>."""
    entries = read_entries(client, count)
    made = [new(number, endpoint) for number in range(count)]
    assert make_queue(client).add(made, group=GROUP, entry_ids=entries) == count


def due(client: redis.Redis) -> list[str]:
    """Endpoints that are due now."""
    seconds, microseconds = client.time()
    return make_queue(client).due_endpoints(now_ms=seconds * 1000 + microseconds / 1000)


def test_entries_are_acknowledged_with_their_deliveries(redis_client: redis.Redis) -> None:
    """In one step; a repeated call, as after a lost reply, adds nothing, also when the delivery was made meanwhile."""
    queue, entries = make_queue(redis_client), read_entries(redis_client, 2)
    both = [new(1), new(1, "b"), new(2)]
    assert queue.add(both, group=GROUP, entry_ids=entries) == 3
    assert redis_client.xpending(RESULT_STREAM, GROUP)["pending"] == 0
    assert queue.pending(["a", "b", "c"]) == {"a": 2, "b": 1, "c": 0}
    assert sorted(due(redis_client)) == ["a", "b"]
    for delivery in queue.take("a", count=5):
        queue.delivered(delivery)
    assert queue.add(both, group=GROUP, entry_ids=entries) == 0
    assert queue.pending(["a", "b"]) == {"a": 0, "b": 1}


def test_answer_that_comes_twice_is_one_delivery(redis_client: redis.Redis) -> None:
    """As after the group was created again."""
    queue = make_queue(redis_client)
    assert queue.add([new(1)], group=GROUP, entry_ids=read_entries(redis_client, 1)) == 1
    assert queue.add([new(1)], group=GROUP, entry_ids=read_entries(redis_client, 1)) == 0
    assert queue.pending(["a"]) == {"a": 1}


def test_taken_delivery_is_as_it_was_added(redis_client: redis.Redis) -> None:
    """And no other process takes it before its lease expires."""
    fill(redis_client, 3)
    queue = make_queue(redis_client)
    [first, second] = queue.take("a", count=2)
    assert [first.id, second.id] == ["k0.0", "k1.0"]
    assert (first.payload, first.body, first.failed, first.take) == (Payload(1), b'{"n":1}\n|', 0, 1)
    assert [each.id for each in make_queue(redis_client).take("a", count=5)] == ["k2.0"]
    assert queue.take("a", count=5) == []
    assert due(redis_client) == []
    assert queue.endpoints_with_deliveries() == ["a"]


def test_delivery_of_a_crashed_process_is_taken_again(redis_client: redis.Redis) -> None:
    """After its lease, with the same id, and without a failed try."""
    fill(redis_client, 1)
    [lost] = make_queue(redis_client, lease_s=0.05).take("a", count=1)
    wait_until(lambda: due(redis_client) == ["a"], timeout_s=5)
    queue = make_queue(redis_client)
    [again] = queue.take("a", count=1)
    assert (again.id, again.take, again.failed) == (lost.id, 2, 0)
    # The first process goes on, and its failure changes nothing.
    queue.retry(lost, reason="timeout", delay_s=0.0)
    assert queue.take("a", count=1) == []
    # Its success does: the delivery was made.
    queue.delivered(lost)
    queue.retry(again, reason="timeout", delay_s=0.0)
    assert redis_client.hlen(HOOKS_DELIVERIES) == 0
    assert redis_client.exists(HOOKS_DUE, pending_key("a")) == 0


def test_retry_waits_for_its_delay(redis_client: redis.Redis) -> None:
    """And counts the failed tries."""
    fill(redis_client, 1)
    queue = make_queue(redis_client)
    [delivery] = queue.take("a", count=1)
    queue.retry(delivery, reason="http_500", delay_s=0.1)
    assert queue.take("a", count=1) == []
    [again] = wait_until(lambda: queue.take("a", count=1), timeout_s=5)
    assert (again.id, again.failed, again.take) == (delivery.id, 1, 2)
    assert queue.health()["a"].failures == 1


def test_repeated_call_counts_a_failed_try_once(redis_client: redis.Redis) -> None:
    """As after a lost reply, or over shards where the copy of the health failed: no try of the schedule is skipped."""
    fill(redis_client, 1)
    queue = make_queue(redis_client)
    [delivery] = queue.take("a", count=1)
    for _ in range(3):
        queue.retry(delivery, reason="http_500", delay_s=0.0)
    assert queue.health()["a"].failures == 1
    [again] = queue.take("a", count=1)
    assert (again.failed, again.take) == (1, 2)
    queue.retry(again, reason="http_500", delay_s=0.0)
    [last] = queue.take("a", count=1)
    assert last.failed == 2


def fail(queue: DeliveryQueue, times: int) -> None:
    """Let tries of endpoint a fail."""
    for _ in range(times):
        [delivery] = queue.take("a", count=1)
        queue.retry(delivery, reason="timeout", delay_s=600.0)


def test_failing_endpoint_gets_one_try_at_a_time(redis_client: redis.Redis) -> None:
    """After so many failures in a row, with a pause in between; a success ends that."""
    fill(redis_client, 9)
    queue = make_queue(redis_client, alone_every_s=0.2)
    fail(queue, 3)
    [alone] = queue.take("a", count=5)
    assert queue.take("a", count=5) == []
    assert due(redis_client) == []
    [second] = wait_until(lambda: queue.take("a", count=5), timeout_s=5)
    assert second.id != alone.id
    queue.delivered(second)
    assert queue.health()["a"].failures == 0
    assert len(queue.take("a", count=5)) == 4


def test_throttled_endpoint_gets_a_pause(redis_client: redis.Redis) -> None:
    """Its other deliveries wait too."""
    fill(redis_client, 2)
    queue = make_queue(redis_client)
    [delivery] = queue.take("a", count=1)
    queue.retry(delivery, reason="http_429", delay_s=0.0, pause_s=0.2)
    assert queue.take("a", count=5) == []
    assert queue.health()["a"].not_before_ms > 0
    assert len(wait_until(lambda: queue.take("a", count=5), timeout_s=5)) == 2


def test_disabled_endpoint_gets_no_try(redis_client: redis.Redis) -> None:
    """All its deliveries become dead ones, later ones too, until they are revived."""
    fill(redis_client, 3)
    queue = make_queue(redis_client)
    [delivery] = queue.take("a", count=1)
    queue.give_up(delivery, reason="http_410", is_disabling=True)
    assert due(redis_client) == ["a"]
    assert queue.take("a", count=5) == []
    assert queue.pending(["a"]) == {"a": 0}
    assert [each.reason for each in queue.dead()] == ["endpoint_disabled", "endpoint_disabled", "http_410"]
    assert queue.health()["a"].disabled_ms > 0
    assert queue.revive([(each.delivery.endpoint, each.delivery.id) for each in queue.dead()]) == 3
    assert queue.health() == {}
    assert [(each.id, each.failed) for each in queue.take("a", count=5)] == [(f"k{n}.0", 0) for n in (0, 1, 2)]
    assert (queue.dead_count(), list(queue.dead())) == (0, [])


@pytest.mark.parametrize("count", [0, 5])
def test_old_delivery_is_given_up(redis_client: redis.Redis, count: int) -> None:
    """Also where no process knows its endpoint any more."""
    fill(redis_client, 2)
    queue = make_queue(redis_client, max_age_s=-1.0)
    assert queue.take("a", count=count) == []
    assert queue.pending(["a"]) == {"a": 0}
    assert {each.reason for each in queue.dead()} == {"too_old"}


def test_dead_deliveries_have_a_limit(redis_client: redis.Redis) -> None:
    """The oldest are dropped; the list can be limited, and read by endpoint."""
    queue = make_queue(redis_client, max_dead=3)
    entries = read_entries(redis_client, 5)
    for number, entry in enumerate(entries):
        made = new(number, "ab"[number % 2], dead_reason="backlog_full")
        before = redis_client.time()
        wait_until(lambda before=before: redis_client.time() > (before[0], before[1] + 1000), timeout_s=5)
        queue.add([made], group=GROUP, entry_ids=[entry])
    assert sorted(each.delivery.id for each in queue.dead()) == ["k2.0", "k3.0", "k4.0"]
    assert [each.delivery.id for each in queue.dead(endpoint="b")] == ["k3.0"]
    assert len(list(queue.dead(limit=2))) == 2
    assert queue.dead_count() == 3
    assert queue.pending(["a"]) == {"a": 0}


def test_revive_without_deliveries_enables_the_endpoint(redis_client: redis.Redis) -> None:
    """And says that there were none."""
    fill(redis_client, 1)
    queue = make_queue(redis_client)
    fail(queue, 1)
    assert queue.health()["a"] == replace(queue.health()["a"], failures=1, reason="timeout")
    assert queue.revive([], endpoints=["a"]) == 0
    assert queue.revive([("a", "gone.0")]) == 0
    assert queue.health() == {}


def test_unreadable_health_counts_as_none(redis_client: redis.Redis) -> None:
    """Of a newer version, or written by hand."""
    fill(redis_client, 1)
    redis_client.hset(COMMON_KEYS[2], mapping={"a": "x|y", "b": "1|2"})
    queue = make_queue(redis_client)
    assert queue.health() == {"a": EndpointHealth(), "b": EndpointHealth()}
    [delivery] = queue.take("a", count=1)
    assert isinstance(delivery, Delivery)


@pytest.mark.parametrize("key", [*COMMON_KEYS, pending_key("a")])
def test_key_of_a_wrong_type_stops_before_the_first_write(redis_client: redis.Redis, key: str) -> None:
    """The entries stay pending, so that nothing is lost."""
    entries = read_entries(redis_client, 1)
    redis_client.delete(key)
    redis_client.set(key, "x")
    with pytest.raises(redis.ResponseError):
        make_queue(redis_client).add([new(1)], group=GROUP, entry_ids=entries)
    assert redis_client.xpending(RESULT_STREAM, GROUP)["pending"] == 1


def test_health_of_an_origin_is_forgotten_with_its_deliveries(redis_client: redis.Redis) -> None:
    """Requests can name any number; an endpoint of the operator keeps its health."""
    queue = make_queue(redis_client)
    for name in ("https://h:443", "a"):
        fill(redis_client, 2, endpoint=name)
        first, second = queue.take(name, count=2)
        queue.give_up(first, reason="timeout")
        assert queue.health()[name].failures == 1
        queue.give_up(second, reason="timeout")
    assert list(queue.health()) == ["a"]
