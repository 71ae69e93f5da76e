"""Where the answer of a message goes: the claim script and the worker find the id that its client looks for."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from shiwu.broker.message_ids import find_id
from shiwu.broker.message_reader import read_message
from shiwu.contract import ATTEMPTS, CLAIMS, LEASES, RequestError, done_key, is_digest, result_key
from shiwu_worker.jobs.job import open_job
from shiwu_worker.stages.commit import to_entries
from tests.compat.shapes import ODD_IDS, protocol_1, protocol_2, shapes
from tests.support.redis_parts import forget_mark, make_answer_store, make_lease_queue

IMAGE = "s3://b/k"
SHAPES = shapes(IMAGE)
BY_WORKER = {
    *("large number", "protocol 1, packed", "protocol 1, long body", "protocol 1, id behind arguments"),
    *("lone surrogate in the id", "lone surrogate next to the id", "5 MB", "5 MB, protocol 1", "5 MB, plain body"),
    *("256 bytes", "form of a digest"),
}
"""Shapes whose id only the worker finds; all others are found by the claim, so that copies and revokes meet there."""


@pytest.fixture(scope="module")
def client(valkey_session: Any) -> Iterator[redis.Redis]:
    """A client of the real server."""
    with valkey_session.client() as connected:
        connected.flushall()
        yield connected


def claim(client: redis.Redis, raw: bytes) -> Any:
    """Claim this one message, and leave nothing behind."""
    client.delete(CLAIMS, LEASES, "shiwu.bulk")
    client.lpush("shiwu.bulk", raw)
    [claimed] = make_lease_queue(client, "w").claim(1).jobs
    return claimed


@pytest.mark.parametrize("name", SHAPES)
def test_answer_is_stored_under_the_id_of_the_caller(client: redis.Redis, name: str) -> None:
    """Whatever the form of the message."""
    raw, expected, outcome = SHAPES[name]
    claimed = claim(client, raw)
    job = open_job(claimed)
    assert job.log_id == expected
    assert (str(job.error.code) if job.error else "tagged") == outcome
    assert is_digest(claimed.id) == (name in BY_WORKER)
    assert find_id(raw) == expected, "the worker's reader finds every id, also those that the claim finds"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"not json \xff",
        b'{"headers":{"task":"shiwu.tag"}}',
        b'{"headers":{"id":"' + b"x" * 5000 + b'"}}',
        b'{"headers":{"id":{"a":1}},"properties":{"correlation_id":""},"body":"e30=}"}',
        b'{"body":"' + b"x" * 5_000_000,
        b'{"body":"{\\"id\\":\\"\\\\x\\"' + b"x" * 5_000_000 + b'"}',
    ],
)
def test_message_without_an_id_gives_none(raw: bytes) -> None:
    """Nothing is raised, and no id is invented."""
    assert find_id(raw) is None


IDS = st.one_of(
    st.none(),
    st.sampled_from([*ODD_IDS, "", "~" + "0a" * 20, "y" * 256, "é" * 128]),
    st.text(max_size=6),
    st.integers(-(2**54), 2**54),
    st.floats(allow_nan=False),
    st.booleans(),
    st.just(["list"]),
)
ARGS = st.sampled_from([[IMAGE], [IMAGE, "six-zh"], None, []])


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """Messages of both protocols with ids of all kinds in all places."""
    fields = {"task": "shiwu.tag", "id": draw(IDS)}
    headers = draw(st.sampled_from([fields, {}, [], None, {"task": "shiwu.tag"}, {"id": fields["id"]}]))
    body: Any = draw(
        st.sampled_from(
            [{**fields, "id": draw(IDS), "args": draw(ARGS), "kwargs": {}}, [draw(ARGS), {}, {}], {}, 7, "text"]
        )
    )
    text = draw(st.sampled_from(["", " ", "\n\t"])) + json.dumps(body)
    is_base64 = draw(st.booleans())
    outer = {
        "body": base64.b64encode(text.encode()).decode() if is_base64 else text,
        "content-type": "application/json",
        "headers": headers,
        "properties": {"body_encoding": "base64" if is_base64 else "utf-8", "correlation_id": draw(IDS)},
    }
    return json.dumps(outer, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")


@given(messages())
@settings(max_examples=150)
def test_claim_script_and_reader_find_the_same_id(client: redis.Redis, raw: bytes) -> None:
    """A sweep uses the id of the reader, and a worker that of the script."""
    claimed = claim(client, raw)
    log_id = open_job(claimed).log_id
    try:
        read = read_message(raw).id
    except RequestError:
        assert is_digest(log_id) or log_id == find_id(raw)
    else:
        assert read == log_id
        assert is_digest(claimed.id) or claimed.id == read


def test_duplicates_of_both_protocols_are_one_job(client: redis.Redis) -> None:
    """The claim recognises duplicates by their id, whichever protocol each was sent in."""
    client.delete(CLAIMS, LEASES, "shiwu.bulk")
    client.lpush(
        "shiwu.bulk", protocol_1("same", IMAGE), protocol_2("same", IMAGE), protocol_1("same", IMAGE, retries=1)
    )
    assert [job.id for job in make_lease_queue(client, "w").claim(10).jobs] == ["same"]


@pytest.mark.parametrize("name", sorted(BY_WORKER))
def test_answer_ends_a_claim_named_by_digest(client: redis.Redis, name: str) -> None:
    """The claim has the digest and the answer has the id; neither claim nor lease is left."""
    raw, expected, _ = SHAPES[name]
    claimed = claim(client, raw)
    forget_mark(client, expected)
    client.hset(ATTEMPTS, claimed.id, "1:0")
    make_answer_store(client, "w").write(to_entries([open_job(claimed)], worker="w", now_s=time.monotonic()))
    assert (client.hlen(CLAIMS), client.zcard(LEASES), client.hexists(ATTEMPTS, claimed.id)) == (0, 0, False)
    assert client.exists(result_key(expected), done_key(expected)) == 2
