"""Reads the messages of object stores. The structure of a message says which format it has, wherever it comes from.

| structure | sender |
|---|---|
| `{"Records": [record]}` | S3 to SQS, MinIO's namespace format and webhook |
| `[{"Event": [record], "EventTime": …}]` | MinIO's access format |
| `{"detail-type": …, "detail": {"bucket": …, "object": …}}` | S3 to EventBridge |
| `{"events": [record]}`, also in base64 | Aliyun OSS to SMQ |
| `{"specversion": …, "data": …}` | CloudEvents, as from Aliyun's EventBridge; `data` is one of the others or a record |
| `{"Type": "Notification", "Message": "…"}` | SNS around one of the others |

Records of S3 and MinIO have URL-encoded keys (`+` for a space); those of EventBridge and Aliyun OSS have plain ones.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from typing import Any, Final
from urllib.parse import unquote_plus

import msgspec

from shiwu.watch.events import Finding, Ignored, ObjectStored, Reason, Unreadable, checked

MAX_BYTES: Final = 1024 * 1024
"""A longer message is not read. Those of SQS, EventBridge and MinIO are shorter."""
MAX_RECORDS: Final = 10_000
MAX_DEPTH: Final = 5
"""Envelopes around a record, as of SNS, CloudEvents and a list."""
_UNCHANGED: Final = frozenset({"PutRetention", "PutLegalHold", "PutTagging", "DeleteTagging"})
"""MinIO reports them as ObjectCreated, though the bytes of the object stay."""
_INCOMPLETE: Final = frozenset({"InitiateMultipartUpload", "UploadPart", "UploadPartCopy"})
"""Aliyun OSS reports them as ObjectCreated; CompleteMultipartUpload follows."""
_NO_VERSION: Final = frozenset({"", "null"})


class _Wrong(ValueError):
    """A part of a message has another structure than expected."""


def read_message(raw: bytes | str, *, event_id: str = "") -> list[Finding]:
    """What a message says, in the order of its records; at least one finding, and never an exception.

    Args:
        event_id: the id of the event in its transport; stands for a missing sequencer.
    """
    data = raw.encode(errors="surrogatepass") if isinstance(raw, str) else raw
    if len(data) > MAX_BYTES:
        return [Unreadable(f"expected a message of at most {MAX_BYTES} bytes, got {len(data)}")]
    found: list[Finding] = []
    try:
        for finding in _read(_decode(data), event_id=event_id, depth=0):
            if len(found) == MAX_RECORDS:
                raise _Wrong(f"expected at most {MAX_RECORDS} records, got more")
            found.append(finding)
    except _Wrong as error:
        found.append(Unreadable(str(error)))
    return found


def read_cloud_event(headers: Mapping[str, str], body: bytes) -> list[Finding]:
    """What an HTTP request says: a CloudEvent in binary mode by its `ce-` headers, otherwise as `read_message`.

    Args:
        headers: names in lower case.
    """
    if "ce-specversion" not in headers:
        return read_message(body)
    missing = [name for name in ("ce-id", "ce-source", "ce-type") if not headers.get(name)]
    if missing:
        return [Unreadable(f"expected the header {missing[0]} of a CloudEvent")]
    return read_message(body, event_id=_event_id(headers["ce-source"], headers["ce-id"]))


def _event_id(source: str, number: str) -> str:
    return f"{source} {number}"


def _decode(raw: bytes) -> Any:
    text = raw.strip()
    if text[:1] not in (b"{", b"["):
        try:
            text = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise _Wrong("expected JSON, or JSON in base64") from None
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _Wrong(f"expected JSON ({error})") from None


def _read(value: Any, *, event_id: str, depth: int) -> Iterator[Finding]:
    if depth == MAX_DEPTH:
        raise _Wrong(f"expected a record within {MAX_DEPTH} envelopes")
    if isinstance(value, list):
        if not value:
            raise _Wrong("expected records, got an empty list")
        # MinIO's documentation has a time before the records of its access format, its source has it after them.
        for each in value[1:] if len(value) == 2 and isinstance(value[0], str) else value:
            try:
                yield from _read(each, event_id=event_id, depth=depth + 1)
            except _Wrong as error:  # the other records may be well-formed
                yield Unreadable(str(error))
    elif isinstance(value, dict):
        yield from _read_object(value, event_id=event_id, depth=depth)
    else:
        raise _Wrong(f"expected an object or a list of JSON, got {type(value).__name__}")


def _read_object(value: dict[str, Any], *, event_id: str, depth: int) -> Iterator[Finding]:
    for name in ("Records", "events", "Event"):
        if isinstance(value.get(name), list):
            yield from _read(value[name], event_id=event_id, depth=depth + 1)
            return
    if value.get("Event") == "s3:TestEvent":
        yield Ignored(Reason.TEST)
    elif "specversion" in value:
        own_id = _event_id(_text(value, "source"), _text(value, "id"))
        yield from _read(_data(value), event_id=own_id, depth=depth + 1)
    elif value.get("Type") == "Notification":
        yield from _read(_decode(_text(value, "Message").encode()), event_id=event_id, depth=depth + 1)
    elif "detail-type" in value:
        yield _read_eventbridge(value, event_id=event_id)
    elif "s3" in value or "oss" in value:
        yield _read_record(value, event_id=event_id)
    elif value.get("Type") == "SubscriptionConfirmation":
        raise _Wrong("expected an event, got SNS's request to confirm a subscription; open its SubscribeURL yourself")
    else:
        raise _Wrong(f"expected an event of an object store, got an object with {_names(value)}")


def _data(event: dict[str, Any]) -> Any:
    """The data of a CloudEvent in structured mode."""
    if "data_base64" in event:
        return _decode(_text(event, "data_base64").encode())
    data = event.get("data")
    return _decode(data.encode(errors="surrogatepass")) if isinstance(data, str) else data


def _read_record(record: dict[str, Any], *, event_id: str) -> Finding:
    if ignored := _reason(_text(record, "eventName")):
        return Ignored(ignored)
    is_encoded = "s3" in record
    inner = _object(record, "s3" if is_encoded else "oss")
    target = _object(inner, "object")
    key = _text(target, "key")
    if is_encoded:
        try:
            key = unquote_plus(key, errors="strict")
        except UnicodeDecodeError:
            raise _Wrong("expected a key in UTF-8 below its URL encoding") from None
    return checked(
        ObjectStored(
            bucket=_text(_object(inner, "bucket"), "name"),
            key=key,
            version=_version(_optional(target, "versionId")),
            etag=_optional(target, "eTag").strip('"'),
            sequencer=_optional(target, "sequencer") or _request_id(record) or event_id,
        )
    )


def _read_eventbridge(event: dict[str, Any], *, event_id: str) -> Finding:
    kind = _text(event, "detail-type")
    if kind != "Object Created":
        return Ignored(Reason.REMOVED if kind == "Object Deleted" else Reason.OTHER)
    detail = _object(event, "detail")
    target = _object(detail, "object")
    return checked(
        ObjectStored(
            bucket=_text(_object(detail, "bucket"), "name"),
            key=_text(target, "key"),
            version=_version(_optional(target, "version-id")),
            etag=_optional(target, "etag").strip('"'),
            sequencer=_optional(target, "sequencer") or _optional(event, "id") or event_id,
        )
    )


def _reason(name: str) -> Reason | None:
    """Why an event of this name becomes no job; None where it becomes one."""
    category, _, operation = name.removeprefix("s3:").removeprefix("oss:").partition(":")
    if category == "ObjectRemoved":
        return Reason.REMOVED
    if category != "ObjectCreated" or operation in _UNCHANGED | _INCOMPLETE:
        return Reason.OTHER
    return None


def _request_id(record: Mapping[str, Any]) -> str:
    elements = record.get("responseElements")
    if not isinstance(elements, dict):
        return ""
    return _optional(elements, "requestId") or _optional(elements, "x-amz-request-id")


def _version(text: str) -> str:
    return "" if text in _NO_VERSION else text


def _object(value: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = value.get(name)
    if not isinstance(found, dict):
        raise _Wrong(f"expected an object in {name}, got {type(found).__name__}")
    return found


def _text(value: Mapping[str, Any], name: str) -> str:
    found = value.get(name)
    if not isinstance(found, str) or not found:
        raise _Wrong(f"expected a text in {name}, got {found!r:.80}")
    return found


def _optional(value: Mapping[str, Any], name: str) -> str:
    found = value.get(name)
    return found if isinstance(found, str) else ""


def _names(value: Mapping[str, Any]) -> str:
    return ", ".join(name[:40] for name in sorted(value)[:8]) or "no names"
