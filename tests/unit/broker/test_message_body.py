"""Bodies of messages: compression, growth, content types, and the forms that clients give them."""

from __future__ import annotations

import base64
import gzip
import json
import random
import zlib
from typing import Any

import pytest

from shiwu.broker.message_reader import ANY_RATIO_BYTES, MAX_RATIO, read_message
from shiwu.contract import MAX_MESSAGE_BYTES, REQUEST_FIELDS, ErrorCode, RequestError
from tests.support.messages import BODY, message_with_body, outer_message


@pytest.mark.parametrize("packed", [gzip.compress(BODY), zlib.compress(BODY)], ids=["gzip", "zlib"])
def test_message_reader_reads_gzip_and_zlib(packed: bytes) -> None:
    """The gzip of kombu is the zlib format; other clients send gzip."""
    assert read_message(message_with_body(packed, compression="application/x-gzip")).fields == {"image": "s3://b/k"}


@pytest.mark.parametrize(
    ("metadata", "is_read"),
    [("x" * 12_000, True), ("x" * 200_000, False), (list(range(30_000)), True)],
    ids=["small", "one letter", "numbers"],
)
def test_message_reader_limits_how_much_a_body_grows(metadata: Any, is_read: bool) -> None:
    """A message of 1 KB must not become an answer of 200 KB; real messages shrink to a tenth at best."""
    body = json.dumps([["s3://b/k"], {"metadata": metadata}, {}]).encode()
    raw = message_with_body(zlib.compress(body), compression="gzip")
    if is_read:
        assert read_message(raw).fields["metadata"] == metadata
    else:
        with pytest.raises(RequestError, match="grows at most 32 times") as caught:
            read_message(raw)
        assert caught.value.code is ErrorCode.MESSAGE_TOO_LARGE


def test_unknown_compression_is_named() -> None:
    """Also where the body could be read as another one."""
    with pytest.raises(RequestError, match="expected compression gzip or zlib, got 'bz2'"):
        read_message(message_with_body(zlib.compress(BODY), compression="bz2"))


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
        assert len(read_message(message_with_body(packed(size)[0], compression="gzip")).fields["metadata"]) > size - 1
    else:
        with pytest.raises(RequestError, match="grows at most 32 times"):
            read_message(message_with_body(packed(size + extra)[0], compression="gzip"))


def test_all_fields_may_come_by_position() -> None:
    """In their order; one more is refused, and a field that comes twice."""
    values = ["s3://b/k", *[None] * (len(REQUEST_FIELDS) - 1)]
    assert read_message(message_with_body(json.dumps([values, {}, {}]).encode())).fields == dict(
        zip(REQUEST_FIELDS, values, strict=True)
    )
    with pytest.raises(RequestError, match=f"at most {len(REQUEST_FIELDS)} positional arguments") as caught:
        read_message(message_with_body(json.dumps([[*values, 1], {}, {}]).encode()))
    assert caught.value.code is ErrorCode.INVALID_REQUEST
    mixed = read_message(message_with_body(json.dumps([["s3://b/k"], {"top_k": 3}, {}]).encode()))
    assert mixed.fields == {"image": "s3://b/k", "top_k": 3}


@pytest.mark.parametrize("empty", [None, [], {}])
def test_empty_parts_of_a_body_may_be_null_or_lists(empty: Any) -> None:
    """PHP writes an empty object as a list."""
    body = json.dumps([["s3://b/k"], empty, empty]).encode()
    assert read_message(message_with_body(body)).fields == {"image": "s3://b/k"}
    body = json.dumps([empty or [], {"image": "s3://b/k"}, empty]).encode()
    assert read_message(message_with_body(body)).fields == {"image": "s3://b/k"}
    for wrong in ([["a"], [1], {}], [["a"], {}, [1]], [{"a": 1}, {}, {}], ["a", {}, {}]):
        with pytest.raises(RequestError) as caught:
            read_message(message_with_body(json.dumps(wrong).encode()))
        assert caught.value.code is ErrorCode.MALFORMED_MESSAGE
