"""The contract: what is read back is what was written, and each kind of bad input has its stable code."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given

from shiwu.contract import (
    CODES,
    MAX_IMAGE_CHARS,
    RETRIABLE,
    RETRIED,
    Answer,
    ErrorCode,
    ErrorInfo,
    Lane,
    Request,
    RequestError,
    Retry,
    S3Reference,
    Status,
    check_id,
    error_codes,
    parse_request,
    reference_error,
    source_of,
    split_s3,
    status_of,
    without_logins,
    without_query,
)
from tests.support.requests import REQUESTS


@given(REQUESTS)
def test_request_survives_json(request_: Request) -> None:
    """parse(json(request)) is the request."""
    assert Request.model_validate_json(request_.to_json()) == request_


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "invalid_reference"),
    ({"image": "cat.jpg"}, "invalid_reference"),
    ({"image": "ftp://h/x"}, "invalid_reference"),
    ({"image": "s3://bucket"}, "invalid_reference"),
    ({"image": "s3:///key"}, "invalid_reference"),
    ({"image": "https://user:pw@h/x"}, "invalid_reference"),
    ({"image": "https:///x"}, "invalid_reference"),
    ({"image": "http://[::1/x"}, "invalid_reference"),
    ({"image": "http://h:99999/x"}, "invalid_reference"),
    ({"image": "file://host/x"}, "invalid_reference"),
    ({"image": "s3://b/k\n"}, "invalid_reference"),
    ({"image": "s3://b/" + "k" * 5000}, "invalid_reference"),
    ({"image": "s3://b/k?versionId=&x=1"}, "invalid_reference"),
    ({"image": "s3://b/?versionId=1"}, "invalid_reference"),
    ({"image": "s3://b?x/k"}, "invalid_reference"),
    ({"image": "s3:b/k"}, "invalid_reference"),
    ({"image": "s3://b/"}, "invalid_reference"),
    ({"image": "file:a"}, "invalid_reference"),
    ({"image": "file://"}, "invalid_reference"),
    ({"image": 7}, "invalid_reference"),
    ({"image": "s3://b/k", "labels": []}, "invalid_labels"),
    ({"image": "s3://b/k", "labels": ["a", "a"]}, "invalid_labels"),
    ({"image": "s3://b/k", "labels": ["a", ""]}, "invalid_labels"),
    ({"image": "s3://b/k", "labels": ["词"] * 200_000}, "invalid_labels"),
    ({"image": "s3://b/k", "labels": "no such name!"}, "invalid_labels"),
    ({"image": "s3://b/k", "metadata": "x" * 5000}, "metadata_too_large"),
    ({"image": "s3://b/k", "top_k": 0}, "invalid_request"),
    ({"image": "s3://b/k", "threshold": 2}, "invalid_request"),
    ({"image": "s3://b/k", "threshold": "sets"}, "invalid_request"),
    ({"image": "s3://b/k", "head": "relu"}, "invalid_request"),
    ({"image": "s3://b/k", "want": ["everything"]}, "invalid_request"),
]


@pytest.mark.parametrize(("fields", "code"), BAD)
def test_invalid_field_has_its_error_code(fields: dict[str, Any], code: str) -> None:
    """One field at a time is wrong in one way."""
    with pytest.raises(RequestError) as caught:
        parse_request(fields)
    assert caught.value.code.value == code
    assert len(str(caught.value)) < 600


def test_threshold_may_be_that_of_the_set() -> None:
    """The word is the same as 0 and is sent as 0, so workers of earlier versions read it; another word is refused."""
    request = parse_request({"image": "s3://b/k", "threshold": "set"})
    assert request == parse_request({"image": "s3://b/k"}) == Request.model_validate_json(request.to_json())
    assert b'"threshold":0.0' in request.to_json()
    with pytest.raises(RequestError, match=r"""expected a number from 0 to 1, or "set" .*, got 'sets'"""):
        parse_request({"image": "s3://b/k", "threshold": "sets"})


@pytest.mark.parametrize("job_id", ["a b", "~x", "-x", "x" * 255, "a\n", "é", "user@host", "a/b|c", '"', "\x00", "*"])
def test_check_id_accepts_ids_of_celery(job_id: str) -> None:
    """Any text of 1 to 255 bytes."""
    assert check_id(job_id) == job_id


@pytest.mark.parametrize("job_id", ["", "x" * 256, "猫" * 86, "a\ud800", "~" + "0a" * 20, None, 7])
def test_check_id_refuses_invalid_ids(job_id: Any) -> None:
    """Too long, not UTF-8, not a text, or the name of a message without an id."""
    with pytest.raises(RequestError) as caught:
        check_id(job_id)
    assert caught.value.code.value == "invalid_id"


@pytest.mark.parametrize(("text", "written"), [("猫", "猫"), ("a\udcff", "a\\udcff"), ("", "")])
def test_error_text_with_surrogates_is_encodable(text: str, written: str) -> None:
    """Errors quote file names that are not UTF-8, which JSON cannot contain."""
    answer = Answer(id="x", status=Status.FAILED, error=ErrorInfo(code=ErrorCode.PICTURE_BROKEN, message=text))
    read = Answer.from_json(answer.to_json())
    assert read == answer
    assert read.error is not None
    assert read.error.message == written


def test_error_codes_have_one_row_each() -> None:
    """A code without a row would get the default status."""
    assert set(CODES) == set(ErrorCode)
    for code, info in CODES.items():
        assert info.meaning.endswith("."), code
        assert info.remedy.endswith("."), code
        is_wait_for_labels = code is ErrorCode.UNKNOWN_LABEL_SET
        assert (info.status is Status.FAILED) or info.retry is Retry.NEVER or is_wait_for_labels, code
    told_to_callers = {ErrorCode.QUEUE_FULL, ErrorCode.ANSWER_UNREADABLE}
    assert {code for code, info in CODES.items() if info.status is None} == told_to_callers


def test_error_code_without_a_row_is_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown error counts as a fault of the service."""
    monkeypatch.setattr(error_codes, "CODES", {})
    assert {status_of(code) for code in ErrorCode} == {Status.FAILED}


def test_retried_codes_follow_the_table() -> None:
    """The codes that SHIWU_RETRY may name, and those that are retried by default."""
    assert {code.value for code in RETRIED} == {
        "source_unavailable",
        "source_throttled",
        "source_credentials",
        "source_clock_skew",
        "source_error",
        "internal_error",
        "out_of_memory",
        "unknown_label_set",
    }
    assert {code.value for code in RETRIABLE - RETRIED} == {"decoder_crashed", "decoder_timeout", "encode_failed"}


def test_readers_ignore_fields_of_newer_versions() -> None:
    """An old reader reads what a new writer wrote."""
    assert parse_request({"image": "s3://b/k", "new": 1}).image == "s3://b/k"
    assert Answer.from_json(b'{"id": "x", "status": "tagged", "new": 1}').status is Status.TAGGED


@pytest.mark.parametrize(
    ("reference", "shown"),
    [
        ("http://h:0/p?x=secret", "http://h:0/p"),
        ("https://h/p?X-Amz-Signature=secret#f", "https://h/p"),
        ("HTTPS://h/p#secret", "HTTPS://h/p"),
        ("https://h?secret", "https://h"),
        ("https://u:secret@h/p", "https://h/p"),
        ("http://[bad?secret", "http://…"),
        ("http:?secret", "http://…"),
        ("https://u:secret@[bad/", "https://…"),
        ("https://u:sec/ret@h/p", "https://…"),
        ("https://u:sec?ret@h/p", "https://…"),
        ("https://u:sec\\ret@h/p", "https://…"),
        ("https://u:sec\uff0fret@h/p", "https://…"),
        ("https:u:secret@h/p", "https://…"),
        ("https:/u:secret@h/p", "https://…"),
        ("https://h:secret/p", "https://…"),
        ("https://\u4f8b\u5b50.example:81/p?secret", "https://\u4f8b\u5b50.example:81/p"),
        ("https://[::1]:81/p?secret", "https://[::1]:81/p"),
        (" https://u:secret@h/p", "…"),
        ("ftp://u:secret@h/p", "…"),
        ("u:secret@h", "…"),
        ("s3://key:sec/ret@b/k", "s3://…"),
        ("file://u:secret@h/p", "file://…"),
        ("https://h/@user/p", "https://h/@user/p"),
        ("s3://b/k?versionId=1", "s3://b/k?versionId=1"),
        ("s3://b/h#1.jpg", "s3://b/h#1.jpg"),
        ("S3://b/q?x=1.jpg", "S3://b/q?x=1.jpg"),
        ("s3://b/user@host.jpg", "s3://b/user@host.jpg"),
        ("file:///a/b#1?.jpg", "file:///a/b#1?.jpg"),
    ],
)
def test_shown_reference_has_no_secrets(reference: str, shown: str) -> None:
    """Logs and answers never contain the query or user name of a URL; in keys and paths `?` and `#` are characters."""
    assert without_query(reference) == shown
    assert without_query(shown) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://h:1/p", "https://h:1/p"),
        ("https://u:secret@h:1/p", "https://h:1/p"),
        ("https://u:sec/ret@h", "https://h"),
        ("https://u:sec@ret@[bad/", "https://[bad/"),
        ("got 'HTTP://u:secret@h' (redis://:secret@h/0)", "got 'HTTP://h' (redis://h/0)"),
        ("sentinel://u:secret@a,b/name", "sentinel://a,b/name"),
        ("s3://b/user@host.jpg file:///a@b", "s3://b/user@host.jpg file:///a@b"),
        ("write to me@example", "write to me@example"),
    ],
)
def test_text_without_logins_has_no_password(text: str, shown: str) -> None:
    """Texts of libraries and of the configuration; names of objects and files stay."""
    assert without_logins(text) == shown


@pytest.mark.parametrize(
    "image",
    [
        "https://user:hush@[bad/",
        "https://user:hush@h/p",
        "https://user:hu/hush@h/p",
        "https://user:hush/p",
        "https://user:hu?hush@h/p",
        "https:/user:hush@h/p",
        "https:user:hush@h/p",
        "HTTPS://user:hush@[bad/",
        "https://hush\uff0f@h/p",
        "https://user:hush\uff20h:x/p",
        "//user:hush@h/p",
        "user:hush@h/p",
        "ftp://user:hush@h/p",
        "https://[bad/p?sig=hush",
        "https://h:x/p#hush",
        "s3://key:hush@bucket/k",
    ],
)
def test_error_about_a_reference_hides_its_password(image: str) -> None:
    """The text goes into answers, streams and logs."""
    error = reference_error(image)
    assert error is not None
    assert "hush" not in error
    with pytest.raises(RequestError) as caught:
        parse_request({"image": image})
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("reference", "bucket", "key", "version"),
    [
        ("s3://b/k", "b", "k", None),
        ("S3://b/K", "b", "K", None),
        ("s3://b/h#1.jpg", "b", "h#1.jpg", None),
        ("s3://b/?x", "b", "?x", None),
        ("s3://b/q?x=1&y=2", "b", "q?x=1&y=2", None),
        ("s3://b//k", "b", "/k", None),
        ("s3://b/folder/", "b", "folder/", None),
        ("s3://b/k?versionId=v", "b", "k", "v"),
        ("s3://b/k?versionId=v&x=1", "b", "k", "v"),
        ("s3://b/k?versionId=a+b/c", "b", "k", "a+b/c"),
        ("s3://b/k?versionId=a%2Bb", "b", "k", "a+b"),
        ("s3://b/k?versionId=", "b", "k", None),
        ("s3://b/k?x?versionId=v", "b", "k?x", "v"),
    ],
)
def test_split_s3_gives_bucket_key_and_version(reference: str, bucket: str, key: str, version: str | None) -> None:
    """The key is used as it is; the version ends at `&`, and `+` in it is not a space."""
    assert reference_error(reference) is None
    assert split_s3(reference) == S3Reference(bucket, key, version)


@pytest.mark.parametrize("image", ["FILE:///a/b", "file://LOCALHOST/a/b", "HTTPS://h/p", "Http://h/p", "S3://b/k"])
def test_reference_scheme_may_be_in_capitals(image: str) -> None:
    """As in any URL."""
    assert reference_error(image) is None


def test_lane_keys_are_those_of_kombu() -> None:
    """Priority steps and separator as kombu's Redis transport writes them."""
    from kombu.transport.redis import Channel  # noqa: PLC0415 used only here

    expected = [f"shiwu.bulk{Channel.sep}{step}" if step else "shiwu.bulk" for step in Channel.priority_steps]
    assert list(Lane.BULK.keys) == expected


@pytest.mark.parametrize(
    ("image", "source"),
    [
        ("s3://pictures/a/b.jpg?x=/y", "s3://pictures"),
        ("S3://pictures/a", "s3://pictures"),
        ("https://Shop.example/a?token=secret", "https://shop.example:443"),
        ("https://shop.example.:443/b", "https://shop.example:443"),
        ("http://shop.example:8080/b#c", "http://shop.example:8080"),
        ("http://user:secret@shop.example/b", "http://shop.example:80"),
        ("http://[2001:db8::1]/b", "http://2001:db8::1:80"),
        ("http://[bad/", "http:"),
        ("http://shop.example:99999/", "http:"),
        ("file:///srv/a.jpg", "file:"),
        ("nothing", ":"),
    ],
)
def test_source_of_a_reference_has_no_path_and_no_secret(image: str, source: str) -> None:
    """Images of one source share its loader threads, however the reference is written."""
    assert source_of(image) == source


@pytest.mark.parametrize("character", ["\x00", "\n", "\x7f", "\x9b", "\u200b", "\u200f", "\u2028", "\u202e", "\ufeff"])
@pytest.mark.parametrize("start", ["s3://b/", "S3://b/", "file:///", "https://h/"])
def test_reference_with_an_unsafe_character_is_refused(start: str, character: str) -> None:
    """A terminal obeys or hides these; the error names the character, and does not contain it."""
    error = reference_error(f"{start}a{character}b")
    assert error is not None
    assert f"U+{ord(character):04X}" in error
    assert error.isprintable()


@pytest.mark.parametrize(
    "name", ["猫.jpg", "a b.jpg", "é.jpg", "👨‍👩‍👧.jpg", "می‌خواهم.jpg", "a\u3000b", "[red]x[/red].jpg"]
)
def test_reference_with_letters_of_any_script_is_valid(name: str) -> None:
    """Joiners belong to emoji and to several scripts."""
    assert reference_error(f"s3://b/{name}") is None
    assert without_query(f"s3://b/{name}") == f"s3://b/{name}"


def test_reference_has_a_largest_length() -> None:
    """Of characters, whatever its scheme."""
    for start in ("s3://b/", "https://h/", "file:///"):
        largest = start + "k" * (MAX_IMAGE_CHARS - len(start))
        assert reference_error(largest) is None
        assert (
            reference_error(largest + "k") == f"expected at most {MAX_IMAGE_CHARS} characters, got {len(largest) + 1}"
        )


@pytest.mark.parametrize(("port", "is_valid"), [(0, False), (1, True), (65_535, True), (65_536, False)])
def test_port_of_a_reference_is_one_of_tcp(port: int, *, is_valid: bool) -> None:
    """0 is none."""
    assert (reference_error(f"https://h:{port}/p") is None) is is_valid
