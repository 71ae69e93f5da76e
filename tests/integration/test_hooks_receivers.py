"""Receivers of webhooks that fail, hang, throttle or are slow, and what `shiwu-hooks` makes of them."""

from __future__ import annotations

import pytest
import redis
from standardwebhooks import Webhook

from shiwu.contract import HOOKS_DELIVERIES
from shiwu.hooks.delivery_queue import DeliveryQueue
from tests.support.hooks import (
    SECRET,
    StartHooks,
    answer,
    commit,
    unread,
)
from tests.support.waiting import wait_until
from tests.support.webhook_receiver import Answered, WebhookReceiver


def test_failed_try_is_repeated_with_the_same_id_and_body(
    start_hooks: StartHooks, receiver: WebhookReceiver, redis_client: redis.Redis
) -> None:
    """Each try has a signature of its own time."""
    replies = iter([Answered(500), Answered(302, {"Location": "/elsewhere"}), Answered(204)])
    receiver.behave = lambda _: next(replies)
    process = start_hooks({"name": "a", "url": receiver.url})
    commit(redis_client, answer("k"))
    wait_until(lambda: len(receiver.received) == 3, timeout_s=20)
    wait_until(lambda: redis_client.hlen(HOOKS_DELIVERIES) == 0, timeout_s=10)
    assert {(got.id, got.body, got.path) for got in receiver.received} == {("k.0", receiver.received[0].body, "/hook")}
    for got in receiver.received:
        Webhook(SECRET).verify(got.body, dict(got.headers))
    reasons = [(event["reason"], event["attempt"]) for event in process.events("delivery_failed")]
    assert reasons == [("http_500", 1), ("redirect", 2)]


def test_delivery_is_dead_after_its_schedule(
    start_hooks: StartHooks, receiver: WebhookReceiver, redis_client: redis.Redis, deliveries: DeliveryQueue
) -> None:
    """With its reason, and can be revived."""
    receiver.behave = lambda _: Answered(503)
    start_hooks({"name": "a", "url": receiver.url}, schedule="0s,0.1s,0.1s")
    commit(redis_client, answer("k"))
    [dead] = wait_until(lambda: list(deliveries.dead()), timeout_s=20)
    assert (dead.reason, dead.delivery.id, dead.delivery.failed) == ("http_503", "k.0", 3)
    assert receiver.ids() == ["k.0"] * 3
    receiver.behave = lambda _: Answered()
    assert deliveries.revive([("a", "k.0")]) == 1
    wait_until(lambda: receiver.ids() == ["k.0"] * 4, timeout_s=20)


def test_gone_endpoint_is_disabled(
    start_hooks: StartHooks, receiver: WebhookReceiver, redis_client: redis.Redis, deliveries: DeliveryQueue
) -> None:
    """It gets no request any more, and another endpoint is not affected."""
    receiver.behave = lambda got: Answered(410 if got.path.endswith("gone") else 204)
    start_hooks({"name": "gone", "url": f"{receiver.url}/gone"}, {"name": "b", "url": receiver.url})
    commit(redis_client, answer("k1"))
    wait_until(lambda: deliveries.health().get("gone"), timeout_s=20)
    commit(redis_client, answer("k2"), answer("k3"))
    wait_until(lambda: deliveries.dead_count() == 3, timeout_s=20)
    wait_until(lambda: len(receiver.received) == 4, timeout_s=20)
    assert [got.id for got in receiver.received if got.path.endswith("gone")] == ["k1.0"]


def test_retry_after_pauses_the_endpoint(
    start_hooks: StartHooks, receiver: WebhookReceiver, redis_client: redis.Redis, deliveries: DeliveryQueue
) -> None:
    """For as long as the receiver says, for all its deliveries."""
    receiver.behave = lambda _: Answered(429, {"Retry-After": "3"}) if len(receiver.received) == 1 else Answered()
    process = start_hooks({"name": "a", "url": receiver.url})
    commit(redis_client, answer("k1"))
    [event] = wait_until(lambda: process.events("delivery_failed"), timeout_s=20)
    assert event["retry_in_s"] == 3.0
    wait_until(lambda: deliveries.health().get("a"), timeout_s=5)
    paused = deliveries.health()["a"]
    assert paused.failures == 1
    assert 2900 < paused.not_before_ms - paused.last_failure_ms <= 3000
    commit(redis_client, answer("k2"))
    wait_until(lambda: unread(redis_client) == 0, timeout_s=10)
    wait_until(lambda: sorted(receiver.ids()) == ["k1.0", "k1.0", "k2.0"], timeout_s=20)
    seconds, microseconds = redis_client.time()
    assert seconds * 1000 + microseconds / 1000 >= paused.not_before_ms


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param(Answered(hang=True), id="hang"),
        pytest.param(Answered(is_dripping=True, pause_s=0.05), id="drip"),
    ],
)
def test_receiver_that_never_answers_costs_one_timeout(
    start_hooks: StartHooks, receiver: WebhookReceiver, redis_client: redis.Redis, behaviour: Answered
) -> None:
    """Whether it is silent, or sends a byte now and then."""
    receiver.behave = lambda _: behaviour
    process = start_hooks({"name": "a", "url": receiver.url}, timeout_s=1, schedule="0s,9m")
    commit(redis_client, answer("k"))
    [event] = wait_until(lambda: process.events("delivery_failed"), timeout_s=20)
    assert event["reason"] == "timeout"
    assert 900 < event["ms"] < 5000


@pytest.mark.parametrize("status", [200, 500])
def test_huge_reply_is_not_read(
    start_hooks: StartHooks, receiver: WebhookReceiver, redis_client: redis.Redis, status: int
) -> None:
    """The status counts, the body does not."""
    parts = [b"x" * 65_536] * 1000
    receiver.behave = lambda _: Answered(status, parts=parts, pause_s=0.01)
    process = start_hooks({"name": "a", "url": receiver.url}, schedule="0s,9m", timeout_s=5, lease_s=9)
    commit(redis_client, answer("k"))
    name = "delivered" if status == 200 else "delivery_failed"
    [event] = wait_until(lambda: process.events(name), timeout_s=20)
    assert event["status"] == status
    assert event["ms"] < 4500


def test_slow_endpoint_has_eight_tries_at_a_time(
    start_hooks: StartHooks, receiver: WebhookReceiver, redis_client: redis.Redis
) -> None:
    """And another one gets its deliveries meanwhile."""
    receiver.behave = lambda got: Answered(hang=got.path.endswith("slow"))
    start_hooks(
        {"name": "slow", "url": f"{receiver.url}/slow"},
        {"name": "quick", "url": receiver.url},
        timeout_s=20,
        lease_s=30,
    )
    commit(redis_client, *(answer(f"k{number}") for number in range(30)))
    wait_until(lambda: sum(not got.path.endswith("slow") for got in receiver.received) == 30, timeout_s=20)
    assert sum(got.path.endswith("slow") for got in receiver.received) == 8
    receiver.release()


def test_failing_endpoint_fills_no_backlog_of_others(
    start_hooks: StartHooks, receiver: WebhookReceiver, redis_client: redis.Redis, deliveries: DeliveryQueue
) -> None:
    """Its deliveries beyond the limit are dead ones, and can be revived; the other endpoint gets everything."""
    receiver.behave = lambda got: Answered(500 if got.path.endswith("bad") else 204)
    start_hooks(
        {"name": "bad", "url": f"{receiver.url}/bad"},
        {"name": "good", "url": receiver.url},
        schedule="0s,9m",
        max_pending=20,
    )
    commit(redis_client, *(answer(f"a{number}") for number in range(15)))
    wait_until(lambda: (found := deliveries.health().get("bad")) and found.failures >= 10, timeout_s=20)
    for number in range(3):
        commit(redis_client, *(answer(f"b{number}-{each}") for each in range(15)))
        wait_until(lambda: unread(redis_client) == 0, timeout_s=20)
    wait_until(lambda: sum(not got.path.endswith("bad") for got in receiver.received) == 60, timeout_s=20)
    assert {dead.reason for dead in deliveries.dead()} == {"backlog_full"}
    assert deliveries.pending(["bad"])["bad"] + deliveries.dead_count() == 60


def test_slow_endpoint_pauses_the_reading(
    start_hooks: StartHooks, receiver: WebhookReceiver, redis_client: redis.Redis, deliveries: DeliveryQueue
) -> None:
    """Where it works, so that nothing is given up."""
    receiver.behave = lambda _: Answered(200, parts=[b"x"], pause_s=0.05)
    start_hooks({"name": "a", "url": receiver.url}, max_pending=10, in_flight=2)
    for number in range(4):
        commit(redis_client, *(answer(f"k{number}-{each}") for each in range(15)))
    wait_until(lambda: len(set(receiver.ids())) == 60, timeout_s=40)
    assert deliveries.dead_count() == 0


def test_sigterm_finishes_the_tries_under_way(
    start_hooks: StartHooks, receiver: WebhookReceiver, redis_client: redis.Redis
) -> None:
    """And exits with 0; the rest waits for the next process."""
    receiver.behave = lambda _: Answered(200, parts=[b"x"], pause_s=0.3)
    process = start_hooks({"name": "a", "url": receiver.url}, in_flight=2)
    commit(redis_client, *(answer(f"k{number}") for number in range(20)))
    wait_until(lambda: len(receiver.received) >= 3, timeout_s=20)
    assert process.stop() == 0
    got = len(receiver.received)
    assert got < 20
    assert len(process.events("delivered")) == got
    assert redis_client.hlen(HOOKS_DELIVERIES) == 20 - got
    start_hooks({"name": "a", "url": receiver.url}, name="second")
    wait_until(lambda: redis_client.hlen(HOOKS_DELIVERIES) == 0, timeout_s=20)
    assert sorted(receiver.ids()) == sorted(f"k{number}.0" for number in range(20))
