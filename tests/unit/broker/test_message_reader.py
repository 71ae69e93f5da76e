"""Celery's message: ours is what Celery writes, and what any Celery client writes is understood."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import random
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

from shiwu.broker.message_reader import ANY_RATIO_BYTES, MAX_GROUP, MAX_RATIO, read_canvas, read_message
from shiwu.broker.message_writer import build_message
from shiwu.contract import (
    MAX_MESSAGE_BYTES,
    REQUEST_FIELDS,
    ErrorCode,
    Lane,
    Request,
    RequestError,
    parse_request,
)
from tests.support.requests import REQUESTS

GOLDEN = Path(__file__).parents[2] / "golden"


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


def _with_body(body: bytes, **headers: Any) -> bytes:
    message = json.loads(build_message(Request(image="s3://b/k"), job_id="x", lane=Lane.BULK))
    message["body"] = base64.b64encode(body).decode()
    message["headers"] |= headers
    return json.dumps(message).encode()


BODY = json.dumps([["s3://b/k"], {}, {}]).encode()
BOMB = json.dumps([["s3://b/k"], {"metadata": "x" * 50_000_000}, {}]).encode()


@pytest.mark.parametrize("packed", [gzip.compress(BODY), zlib.compress(BODY)], ids=["gzip", "zlib"])
def test_message_reader_reads_gzip_and_zlib(packed: bytes) -> None:
    """The gzip of kombu is the zlib format; other clients send gzip."""
    assert read_message(_with_body(packed, compression="application/x-gzip")).fields == {"image": "s3://b/k"}


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "malformed_message"),
        (b"null", "malformed_message"),
        (b'{"headers":{"task":"shiwu.tag"}}', "malformed_message"),
        (b'{"headers":{"task":"shiwu.tag","id":"' + b"x" * 256 + b'"}}', "invalid_id"),
        (b'{"headers":{"task":"celery.map","id":"ab"}}', "unknown_task"),
        (b'{"headers":{"task":"shiwu.tag","id":"ab"}}', "malformed_message"),
        (_with_body(b"{}"), "malformed_message"),
        (_with_body(b"[1,2,3]"), "malformed_message"),
        (_with_body(b"not json"), "malformed_message"),
        (_with_body(BODY, compression="bz2"), "malformed_message"),
        (_with_body(b"junk", compression="gzip"), "malformed_message"),
        (_with_body(BODY, expires="tomorrow"), "malformed_message"),
        (_with_body(BODY, eta=7), "malformed_message"),
        (_with_body(zlib.compress(BOMB), compression="gzip"), "message_too_large"),
        (b"x" * 300_000, "message_too_large"),
        (_with_body(json.dumps([["s3://b/k"], {"image": "s3://b/k"}, {}]).encode()), "invalid_request"),
        (_with_body(json.dumps([["x"] * 9, {}, {}]).encode()), "invalid_request"),
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
        "nine arguments",
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
    ("metadata", "is_read"),
    [("x" * 12_000, True), ("x" * 200_000, False), (list(range(30_000)), True)],
    ids=["small", "one letter", "numbers"],
)
def test_message_reader_limits_how_much_a_body_grows(metadata: Any, is_read: bool) -> None:
    """A message of 1 KB must not become an answer of 200 KB; real messages shrink to a tenth at best."""
    body = json.dumps([["s3://b/k"], {"metadata": metadata}, {}]).encode()
    raw = _with_body(zlib.compress(body), compression="gzip")
    if is_read:
        assert read_message(raw).fields["metadata"] == metadata
    else:
        with pytest.raises(RequestError, match="grows at most 32 times") as caught:
            read_message(raw)
        assert caught.value.code is ErrorCode.MESSAGE_TOO_LARGE


@pytest.mark.parametrize(
    ("embed", "parts"),
    [
        ({}, ()),
        ({"callbacks": [], "errbacks": None, "chain": [], "chord": None}, ()),
        ({"callbacks": [{"task": "a"}], "errbacks": None, "chain": [], "chord": None}, ("callbacks",)),
        (
            {
                "callbacks": [{"task": "a"}],
                "errbacks": [{"task": "b"}],
                "chain": [{"task": "c"}],
                "chord": {"task": "d"},
            },
            ("callbacks", "errbacks", "chain", "chord"),
        ),
    ],
)
def test_parts_of_a_canvas_are_named(embed: dict[str, Any], parts: tuple[str, ...]) -> None:
    """Those that hold something; a job without them is not checked for callbacks."""
    raw = json.loads(build_message(Request(image="s3://b/k"), job_id="x", lane=Lane.BULK))
    args, kwargs, _ = json.loads(base64.b64decode(raw["body"]))
    raw["body"] = base64.b64encode(json.dumps([args, kwargs, embed]).encode()).decode()
    assert set(read_message(json.dumps(raw).encode()).canvas) == set(parts)


def canvas_message(embed: dict[str, Any], **headers: Any) -> bytes:
    """A message with callbacks."""
    raw = json.loads(build_message(Request(image="s3://b/k"), job_id="x", lane=Lane.BULK))
    args, kwargs, _ = json.loads(base64.b64decode(raw["body"]))
    raw["body"] = base64.b64encode(json.dumps([args, kwargs, embed]).encode()).decode()
    raw["headers"] |= headers
    return json.dumps(raw).encode()


def test_canvas_is_read_as_it_was_sent() -> None:
    """All parts, and where the job stands in its group; what is missing is empty."""
    a, b, c, d = ({"task": name} for name in "abcd")
    embed = {"callbacks": [a], "errbacks": [b], "chain": [c, a], "chord": d}
    canvas = read_canvas(canvas_message(embed, group="g", group_index=0, root_id="r"))
    assert (canvas.callbacks, canvas.errbacks, canvas.chain, canvas.chord) == ((a,), (b,), (c, a), d)
    assert (canvas.group, canvas.group_index, canvas.root_id) == ("g", 0, "r")
    empty = read_canvas(canvas_message({"callbacks": None}))
    assert (empty.callbacks, empty.errbacks, empty.chain, empty.chord) == ((), (), (), None)
    assert read_canvas(canvas_message(embed, group_index=-1)).group_index is None


@pytest.mark.parametrize(
    ("embed", "headers", "text"),
    [
        ({"callbacks": {"task": "a"}}, {}, "callbacks, errbacks and chain as lists of signatures"),
        ({"chain": ["a"]}, {}, "callbacks, errbacks and chain as lists of signatures"),
        ({"chord": [{"task": "a"}]}, {}, "expected chord as a signature"),
        ({}, {"group": "g" * 256}, "group and root_id as texts of at most 255 bytes"),
        ({}, {"root_id": "猫" * 86}, "group and root_id as texts of at most 255 bytes"),
        ({}, {"root_id": 5}, "group and root_id as texts of at most 255 bytes"),
    ],
)
def test_canvas_that_is_none_is_refused(embed: dict[str, Any], headers: dict[str, Any], text: str) -> None:
    """With what is wrong."""
    with pytest.raises(RequestError, match=text) as caught:
        read_canvas(canvas_message(embed, **headers))
    assert caught.value.code is ErrorCode.MALFORMED_MESSAGE


def test_unknown_compression_is_named() -> None:
    """Also where the body could be read as another one."""
    with pytest.raises(RequestError, match="expected compression gzip or zlib, got 'bz2'"):
        read_message(_with_body(zlib.compress(BODY), compression="bz2"))


def outer_message(**changes: Any) -> bytes:
    """A message of our own client with other parts of its envelope."""
    outer = json.loads(build_message(Request(image="s3://b/k"), job_id="x", lane=Lane.BULK))
    return json.dumps(outer | changes).encode()


@pytest.mark.parametrize(
    ("content_type", "is_read"),
    [
        ("application/json", True),
        ("application/json; charset=utf-8", True),
        ('Application/JSON ;Charset="UTF-8"', True),
        ("application/json;charset=us-ascii", True),
        ("application/json; version=1", True),
        ("application/json; version=1; charset=latin-1", False),
        ("application/json; charset=latin-1", False),
        ("application/x-yaml", False),
        ("application/x-yaml; charset=utf-8", False),
        (None, False),
    ],
)
def test_only_json_in_utf_8_is_read(content_type: str | None, *, is_read: bool) -> None:
    """However its type is written."""
    raw = outer_message(**{"content-type": content_type})
    if is_read:
        assert read_message(raw).fields == {"image": "s3://b/k"}
    else:
        with pytest.raises(RequestError, match="expected content-type application/json in UTF-8"):
            read_message(raw)


@pytest.mark.parametrize(
    ("body", "properties", "is_read"),
    [
        (BODY.decode(), None, True),
        (BODY.decode(), {"body_encoding": None}, True),
        (base64.b64encode(BODY).decode(), {"body_encoding": "base64"}, True),
        ("!", {"body_encoding": "base64"}, False),
        (base64.b64encode(BODY).decode(), None, False),
    ],
)
def test_body_is_text_or_base64(body: str, properties: dict[str, Any] | None, *, is_read: bool) -> None:
    """As the properties say."""
    raw = outer_message(body=body, properties=properties)
    if is_read:
        assert read_message(raw).fields == {"image": "s3://b/k"}
    else:
        with pytest.raises(RequestError):
            read_message(raw)


def test_message_may_have_its_largest_size() -> None:
    """And not a byte more."""
    raw = outer_message(padding="")
    largest = raw.replace(b'"padding": ""', b'"padding": "%s"' % (b"x" * (MAX_MESSAGE_BYTES - len(raw))))
    assert len(largest) == MAX_MESSAGE_BYTES
    assert read_message(largest).id == "x"
    with pytest.raises(RequestError) as caught:
        read_message(largest + b" ")
    assert caught.value.code is ErrorCode.MESSAGE_TOO_LARGE


@pytest.mark.parametrize(("extra", "is_read"), [(0, True), (2 * MAX_RATIO, False)])
@pytest.mark.parametrize("is_small", [True, False])
def test_growth_of_a_body_has_an_exact_limit(extra: int, *, is_read: bool, is_small: bool) -> None:
    """16 KiB whatever the ratio, or 32 times the size."""
    noise = "" if is_small else random.Random(1).randbytes(2000).hex()

    def packed(size: int) -> tuple[bytes, int]:
        body = json.dumps([["s3://b/k"], {"metadata": noise + "x" * size}, {}]).encode()
        return zlib.compress(body, 9), len(body)

    size = ANY_RATIO_BYTES - packed(0)[1] if is_small else 0
    # More letters let the compressed body grow too, and with it what it may become.
    while not is_small and (left := MAX_RATIO * len(packed(size)[0]) - packed(size)[1]) > 0:
        size += left
    if is_read:
        assert len(read_message(_with_body(packed(size)[0], compression="gzip")).fields["metadata"]) > size - 1
    else:
        with pytest.raises(RequestError, match="grows at most 32 times"):
            read_message(_with_body(packed(size + extra)[0], compression="gzip"))


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
    envelope = read_message(_with_body(BODY, expires=expires, shiwu_answer_by_ms=answer_by))
    assert (envelope.expires_ms, envelope.answer_by_ms) == found


@pytest.mark.parametrize("index", [0, 5, MAX_GROUP - 1, MAX_GROUP, -1, True, "5", 1.0, None])
def test_index_in_a_group_is_a_whole_number(index: Any) -> None:
    """Within bounds; anything else counts as none."""
    is_index = type(index) is int and 0 <= index < 2**31
    found = read_canvas(canvas_message({}, group_index=index)).group_index
    assert found == (index if is_index else None)
    assert not isinstance(found, bool)


def test_names_of_a_canvas_may_have_255_bytes() -> None:
    """As the ids of jobs."""
    canvas = read_canvas(canvas_message({}, group="g" * 255, root_id="猫" * 85))
    assert (canvas.group, canvas.root_id) == ("g" * 255, "猫" * 85)


def test_all_fields_may_come_by_position() -> None:
    """In their order; one more is refused, and a field that comes twice."""
    values = ["s3://b/k", *[None] * (len(REQUEST_FIELDS) - 1)]
    assert read_message(_with_body(json.dumps([values, {}, {}]).encode())).fields == dict(
        zip(REQUEST_FIELDS, values, strict=True)
    )
    with pytest.raises(RequestError, match=f"at most {len(REQUEST_FIELDS)} positional arguments") as caught:
        read_message(_with_body(json.dumps([[*values, 1], {}, {}]).encode()))
    assert caught.value.code is ErrorCode.INVALID_REQUEST
    mixed = read_message(_with_body(json.dumps([["s3://b/k"], {"top_k": 3}, {}]).encode()))
    assert mixed.fields == {"image": "s3://b/k", "top_k": 3}


@pytest.mark.parametrize("empty", [None, [], {}])
def test_empty_parts_of_a_body_may_be_null_or_lists(empty: Any) -> None:
    """PHP writes an empty object as a list."""
    body = json.dumps([["s3://b/k"], empty, empty]).encode()
    assert read_message(_with_body(body)).fields == {"image": "s3://b/k"}
    body = json.dumps([empty or [], {"image": "s3://b/k"}, empty]).encode()
    assert read_message(_with_body(body)).fields == {"image": "s3://b/k"}
    for wrong in ([["a"], [1], {}], [["a"], {}, [1]], [{"a": 1}, {}, {}], ["a", {}, {}]):
        with pytest.raises(RequestError) as caught:
            read_message(_with_body(json.dumps(wrong).encode()))
        assert caught.value.code is ErrorCode.MALFORMED_MESSAGE


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
    plain = read_message(_with_body(BODY))
    assert (plain.sent_ms, plain.eta_ms, plain.expires_ms, plain.answer_by_ms) == (None, None, None, None)
    assert plain.ignore_result is False
    assert read_message(_with_body(BODY, ignore_result=1)).ignore_result is False
    assert read_message(_with_body(BODY, ignore_result=True)).ignore_result is True
