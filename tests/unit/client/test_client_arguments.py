"""Arguments of the client work or are refused with an error; none is ignored. No test needs a Redis."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from shiwu import Client, RequestError
from shiwu.broker.steps import Steps
from shiwu.client.sender import Sender, SendOptions
from tests.support.both_clients import OpenClient

IMAGE = "s3://b/k"


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], SendOptions]]:
    """What would have been sent: ids and options of each portion."""
    calls: list[tuple[list[str], SendOptions]] = []

    def send(_: Sender, jobs: Any, options: SendOptions) -> Steps[list[str]]:
        yield from ()
        ids = [job_id for _, job_id in jobs]
        calls.append((ids, options))
        return ids

    monkeypatch.setattr(Sender, "send_steps", send)
    return calls


@pytest.fixture
def client(open_client: OpenClient) -> Iterator[Client]:
    """A client whose Redis is not there."""
    with open_client("redis://127.0.0.1:1/0") as made:
        yield made


WRONG_CALLS = [
    ({"label": ["猫"]}, TypeError, r"'label' \(did you mean 'labels'\?\)"),
    ({"countdown": 5}, TypeError, "'countdown'.*'countdown_s'"),
    ({"topk": 5}, TypeError, "'top_k'"),
    ({"id": "x"}, TypeError, "id: expected in each item"),
    ({"batch_size": 0}, RequestError, "batch_size: expected a whole number, 1 to"),
    ({"max_waiting": 0}, RequestError, "max_waiting: expected a whole number, 1 to"),
    ({"wait_s": float("nan")}, RequestError, "wait_s: expected a number of seconds, 0 to"),
    ({"id_from": "image"}, RequestError, "id_from: expected 'reference'"),
    ({"id_from": "reference", "coalesce": True}, RequestError, "id_from: expected None with coalesce"),
    ({"expires_s": 9, "coalesce": True}, RequestError, "expires_s: expected None with coalesce"),
    ({"answer_by_s": 9, "coalesce": True}, RequestError, "answer_by_s: expected None with coalesce"),
    ({"countdown_s": 9, "coalesce": True}, RequestError, "countdown_s: expected None with coalesce"),
    ({"lane": "bluk"}, RequestError, "lane: expected interactive or bulk, got 'bluk'"),
    ({"expires_s": -1}, RequestError, "expires_s: expected a number of seconds"),
    ({"answer_by_s": float("nan")}, RequestError, "answer_by_s: expected a number of seconds"),
    ({"countdown_s": 1e12}, RequestError, "countdown_s: expected a number of seconds"),
    ({"countdown_s": 60, "expires_s": 60}, RequestError, "countdown_s: expected less than the 60 s"),
    ({"countdown_s": 60, "answer_by_s": 30, "expires_s": 90}, RequestError, "less than the 30 s"),
    ({"priority": 10}, RequestError, "priority: expected a whole number, 0 to 9"),
    ({"replicas": -1}, RequestError, "replicas: expected a whole number, 0 to"),
]


@pytest.mark.parametrize(("arguments", "error", "words"), WRONG_CALLS)
def test_enqueue_many_refuses_arguments_without_effect(
    client: Client, sent: list[Any], arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    """By `enqueue_many` itself, before its result is iterated; `enqueue` and `tag` refuse them too."""
    with pytest.raises(error, match=words):
        client.enqueue_many([IMAGE], **arguments)
    if not arguments.keys() & {"id", "batch_size", "max_waiting", "wait_s", "id_from"}:
        with pytest.raises(error):
            client.enqueue(IMAGE, **arguments)
        with pytest.raises(error):
            client.tag(IMAGE, timeout_s=0.1, **arguments)
    assert sent == []


WRONG_ITEMS = [
    ({"label": ["猫"]}, r"'label' \(did you mean 'labels'\?\)"),
    ({"url": IMAGE}, "'url'"),
    ({"lane": "bulk"}, "lane: expected as an argument of enqueue_many"),
    ({"expires_s": 5}, "expires_s: expected as an argument of enqueue_many"),
    ({"priority": 3}, "priority: expected as an argument of enqueue_many"),
    ({"countdown_s": 3}, "countdown_s: expected as an argument of enqueue_many"),
]


@pytest.mark.parametrize(("fields", "words"), WRONG_ITEMS)
def test_enqueue_many_refuses_item_fields_without_effect(
    client: Client, sent: list[Any], fields: dict[str, Any], words: str
) -> None:
    """With the whole portion of the item, so that nothing of it is sent."""
    with pytest.raises(RequestError, match=words) as caught:
        list(client.enqueue_many([IMAGE, {"image": IMAGE, **fields}]))
    assert caught.value.code.value == "invalid_request"
    assert sent == []


@pytest.mark.parametrize("images", [IMAGE, b"s3://b/k", {"image": IMAGE}])
def test_enqueue_many_refuses_a_single_reference(client: Client, images: Any) -> None:
    """The characters of a reference are not references."""
    with pytest.raises(TypeError, match="use enqueue or"):
        client.enqueue_many(images)


def test_enqueue_many_passes_all_arguments(client: Client, sent: list[tuple[list[str], SendOptions]]) -> None:
    """Also a countdown for many images, and the fields and ids of items."""
    items = [{"image": IMAGE, "id": "a", "labels": ["猫"]}, IMAGE]
    ids = list(client.enqueue_many(items, countdown_s=5, expires_s=9, priority=3, top_k=2, min_cosine=0.1))
    ((sent_ids, options),) = sent
    assert (ids, ids[0]) == (sent_ids, "a")
    assert (options.countdown_s, options.expires_s, options.priority) == (5, 9, 3)


@pytest.mark.parametrize(("batch_size", "max_waiting", "sizes"), [(4, 100, [4, 4, 2]), (100, 3, [3, 3, 3, 1])])
def test_portions_are_no_larger_than_the_lane_may_be(
    client: Client, sent: list[tuple[list[str], SendOptions]], batch_size: int, max_waiting: int, sizes: list[int]
) -> None:
    """A larger one would never find enough space."""
    ids = list(client.enqueue_many([IMAGE] * 10, batch_size=batch_size, max_waiting=max_waiting))
    assert [len(portion) for portion, _ in sent] == sizes
    assert ids == [job_id for portion, _ in sent for job_id in portion]
