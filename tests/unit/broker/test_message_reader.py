"""Celery's message: ours is what Celery writes, and what any Celery client writes is understood."""

from __future__ import annotations

import base64
import contextlib
import json
import time
import zlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from celery import Celery
from hypothesis import given
from hypothesis import strategies as st

from shiwu.broker.message_reader import read_canvas, read_message
from shiwu.broker.message_writer import build_message
from shiwu.contract import REQUEST_FIELDS, ErrorCode, Lane, Request, RequestError, parse_request
from tests.support.messages import BODY, message_with_body, outer_message
from tests.support.requests import REQUESTS

GOLDEN = Path(__file__).parents[2] / "golden"
BOMB = json.dumps([["s3://b/k"], {"metadata": "x" * 50_000_000}, {}]).encode()


def send(redis_url: str, **options: Any) -> bytes:
    """Let real Celery enqueue, and take what it wrote."""
    import redis  # noqa: PLC0415 used only here

    app = Celery("plain", broker=redis_url)
    with redis.Redis.from_url(redis_url) as client:
        app.send_task("shiwu.tag", queue="shiwu.bulk", **options)
        app.close()
        found: Any = [client.lpop(key) for key in Lane.BULK.keys]
        return next(raw for raw in found if raw)


@given(REQUESTS, st.sampled_from(list(Lane)))
def test_message_of_the_client_reads_back(request_: Request, lane: Lane) -> None:
    """read(build(request)) is the request, with its times."""
    raw = build_message(request_, job_id="x", lane=lane, sent_ms=1.5, expires_ms=2000.0, eta_ms=1000.0)
    envelope = read_message(raw)
    assert parse_request(envelope.fields) == request_
    assert (envelope.sent_ms, envelope.expires_ms, envelope.eta_ms) == (1.5, 2000.0, 1000.0)


def test_message_of_the_client_has_celerys_fields(redis_url: str) -> None:
    """It has the outer fields, headers (except for stamps) and properties of Celery's own message."""
    celerys = json.loads(send(redis_url, kwargs={"image": "s3://b/k"}))
    ours = json.loads(build_message(Request(image="s3://b/k"), job_id="x", lane=Lane.BULK))
    assert ours.keys() == celerys.keys()
    assert set(celerys["headers"]) - set(ours["headers"]) <= {"stamped_headers", "stamps", "replaced_task_nesting"}
    assert set(celerys["properties"]) == set(ours["properties"])
    assert json.loads(base64.b64decode(ours["body"]))[1] == json.loads(base64.b64decode(celerys["body"]))[1]
    assert read_message(send(redis_url, kwargs={"image": "s3://b/k"})).has_reply_to
    assert not read_message(build_message(Request(image="s3://b/k"), job_id="x", lane=Lane.BULK)).has_reply_to


def test_message_reader_reads_all_celery_options(redis_url: str) -> None:
    """Positional and keyword arguments, compression, eta, expires, priority, ignore_result, callbacks."""
    assert read_message(send(redis_url, args=["s3://b/k", "six-zh", 3])).fields == {
        "image": "s3://b/k",
        "labels": "six-zh",
        "top_k": 3,
    }
    assert read_message(send(redis_url, kwargs={"image": "s3://b/k"}, compression="gzip")).fields == {
        "image": "s3://b/k"
    }
    assert read_message(send(redis_url, args=["s3://b/k"], priority=9)).fields == {"image": "s3://b/k"}
    assert read_message(send(redis_url, args=["s3://b/k"], ignore_result=True)).ignore_result
    later = read_message(send(redis_url, args=["s3://b/k"], countdown=10, expires=20))
    now_ms = datetime.now(UTC).timestamp() * 1000
    assert later.eta_ms == pytest.approx(now_ms + 10_000, abs=3000)
    assert later.expires_ms == pytest.approx(now_ms + 20_000, abs=3000)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("message_*.json")), ids=lambda path: path.stem)
def test_message_reader_reads_released_messages(path: Path) -> None:
    """Golden messages are only added."""
    golden = json.loads(path.read_text(encoding="utf-8"))
    envelope = read_message(json.dumps(golden["message"]).encode())
    assert envelope.id == golden["id"]
    assert parse_request(envelope.fields).model_dump(mode="json", exclude_defaults=True) == golden["request"]


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "malformed_message"),
        (b"null", "malformed_message"),
        (b'{"headers":{"task":"shiwu.tag"}}', "malformed_message"),
        (b'{"headers":{"task":"shiwu.tag","id":"' + b"x" * 256 + b'"}}', "invalid_id"),
        (b'{"headers":{"task":"celery.map","id":"ab"}}', "unknown_task"),
        (b'{"headers":{"task":"shiwu.tag","id":"ab"}}', "malformed_message"),
        (message_with_body(b"{}"), "malformed_message"),
        (message_with_body(b"[1,2,3]"), "malformed_message"),
        (message_with_body(b"not json"), "malformed_message"),
        (message_with_body(BODY, compression="bz2"), "malformed_message"),
        (message_with_body(b"junk", compression="gzip"), "malformed_message"),
        (message_with_body(BODY, expires="tomorrow"), "malformed_message"),
        (message_with_body(BODY, eta=7), "malformed_message"),
        (message_with_body(zlib.compress(BOMB), compression="gzip"), "message_too_large"),
        (b"x" * 300_000, "message_too_large"),
        (message_with_body(json.dumps([["s3://b/k"], {"image": "s3://b/k"}, {}]).encode()), "invalid_request"),
        (message_with_body(json.dumps([["x"] * (len(REQUEST_FIELDS) + 1), {}, {}]).encode()), "invalid_request"),
    ],
    ids=[
        "empty",
        "null",
        "no id",
        "id too long",
        "another task",
        "no body",
        "body is no list",
        "body of three numbers",
        "body is no JSON",
        "unknown compression",
        "not compressed",
        "expires is no time",
        "eta is no time",
        "bomb",
        "too long",
        "image given twice",
        "too many arguments",
    ],
)
def test_unreadable_message_has_an_error_code(raw: bytes, code: str) -> None:
    """The reader raises RequestError only."""
    with pytest.raises(RequestError) as caught:
        read_message(raw)
    assert caught.value.code.value == code


@given(st.binary(max_size=200))
def test_random_bytes_raise_request_error_only(raw: bytes) -> None:
    """The reader raises RequestError only."""
    with pytest.raises(RequestError):
        read_message(raw)


@pytest.mark.parametrize("sent", ["1" + "0" * 400, "-Infinity", "1e999", "NaN", '"x"', "true", "[1]", "-1e16"])
def test_invalid_time_of_sending_is_ignored(sent: str) -> None:
    """A number that is no time neither ends the reader nor appears in an answer."""
    raw = build_message(Request(image="s3://b/k"), job_id="j", lane=Lane.BULK, sent_ms=12345.0)
    assert read_message(raw.replace(b"12345.0", sent.encode())).sent_ms is None
    with pytest.raises(RequestError):
        read_message(raw.replace(b'"eta":null', f'"eta":{sent}'.encode()))


@given(
    st.dictionaries(
        st.sampled_from(["eta", "expires", "shiwu_sent_ms", "ignore_result", "compression", "id", "task", "group"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
            max_leaves=4,
        ),
    )
)
def test_message_with_any_header_is_read_or_refused(headers: dict[str, Any]) -> None:
    """Headers may hold any JSON."""
    outer = json.loads(build_message(Request(image="s3://b/k"), job_id="j", lane=Lane.BULK))
    outer["headers"] |= headers
    with contextlib.suppress(RequestError):
        read_message(json.dumps(outer).encode())


@pytest.mark.parametrize(("zone", "hours"), [("UTC", 0), ("Asia/Tokyo", 9)])
@pytest.mark.parametrize("name", ["eta", "expires"])
def test_time_without_zone_is_not_in_the_machines(
    monkeypatch: pytest.MonkeyPatch, name: str, zone: str, hours: int
) -> None:
    """It is in the zone of the settings, also where the machine has another one."""
    raw = build_message(Request(image="s3://b/k"), job_id="j", lane=Lane.BULK)
    raw = raw.replace(f'"{name}":null'.encode(), f'"{name}":"2026-11-29T12:00:00"'.encode())
    expected_ms = datetime(2026, 11, 29, 12 - hours, tzinfo=UTC).timestamp() * 1000
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Shanghai")
        time.tzset()
        envelope = read_message(raw, zone=ZoneInfo(zone))
    time.tzset()
    assert getattr(envelope, f"{name}_ms") == expected_ms


@pytest.mark.parametrize(
    ("expires", "answer_by", "found"),
    [
        (None, None, (None, None)),
        (9e12, None, (9e12, None)),
        (None, 8e12, (8e12, 8e12)),
        (9e12, 8e12, (8e12, 8e12)),
        (7e12, 8e12, (7e12, 8e12)),
    ],
)
def test_job_expires_at_the_earlier_time(
    expires: float | None, answer_by: float | None, found: tuple[float | None, float | None]
) -> None:
    """Celery's `expires`, or the time by which the caller must have an answer."""
    envelope = read_message(message_with_body(BODY, expires=expires, shiwu_answer_by_ms=answer_by))
    assert (envelope.expires_ms, envelope.answer_by_ms) == found


def protocol_1(headers: dict[str, Any] | None = None, **body: Any) -> bytes:
    """A message of Celery's first task protocol: all is in the body."""
    text = json.dumps({"task": "shiwu.tag", "id": "one", "args": ["s3://b/k"], "kwargs": {}} | body)
    return outer_message(headers=headers or {}, body=text, properties={"correlation_id": "other"})


def test_message_of_protocol_1_is_read() -> None:
    """Task and id from the body, or from headers, which come first; the correlation id where there is no other."""
    assert (read_message(protocol_1()).id, read_message(protocol_1()).fields) == ("one", {"image": "s3://b/k"})
    assert read_message(protocol_1({"id": "two"})).id == "two"
    assert read_message(protocol_1({"id": ""})).id == "one"
    assert read_message(protocol_1(id=None)).id == "other"
    assert read_message(protocol_1(id=5)).id == "5"
    assert read_message(protocol_1(expires=9e12, eta=8e12)).eta_ms == 8e12
    assert read_message(protocol_1({"expires": 7e12}, expires=9e12)).expires_ms == 7e12
    found = read_message(protocol_1(callbacks=[{"task": "a"}], chord=None))
    assert found.canvas == ("callbacks",)
    assert read_canvas(protocol_1(taskset="g")).group == "g"
    assert read_canvas(protocol_1(taskset="g", group="h")).group == "h"
    with pytest.raises(RequestError, match=r"or an object with args and kwargs"):
        read_message(outer_message(body='{"kwargs":{}}', properties=None))
    with pytest.raises(RequestError) as caught:
        read_message(protocol_1(task="another"))
    assert caught.value.code is ErrorCode.UNKNOWN_TASK


def test_fields_of_an_envelope_are_those_of_the_message() -> None:
    """What is not there is None; `ignore_result` must be true itself."""
    plain = read_message(message_with_body(BODY))
    assert (plain.sent_ms, plain.eta_ms, plain.expires_ms, plain.answer_by_ms) == (None, None, None, None)
    assert plain.ignore_result is False
    assert read_message(message_with_body(BODY, ignore_result=1)).ignore_result is False
    assert read_message(message_with_body(BODY, ignore_result=True)).ignore_result is True
