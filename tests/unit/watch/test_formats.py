"""Messages of object stores, in the structures of MinIO's source and of the documentation of AWS and Aliyun."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import msgspec
import pytest
from cloudevents.core.bindings.http import to_binary_event, to_structured_event
from cloudevents.core.v1.event import CloudEvent
from hypothesis import given
from hypothesis import strategies as st

from shiwu.contract import reference_error
from shiwu.watch.events import Finding, Ignored, ObjectStored, Reason, Unreadable
from shiwu.watch.formats import MAX_BYTES, MAX_RECORDS, read_cloud_event, read_message

DATA = Path(__file__).parent / "data"
FLOWER = "in/red flower + 猫.jpg"
REMOVED, OTHER, TEST = (Ignored(reason) for reason in (Reason.REMOVED, Reason.OTHER, Reason.TEST))
KEY_CHARS = st.characters(blacklist_categories=("Cs", "Cc"))


def raw(name: str) -> bytes:
    """A recorded message without line breaks, as it is sent."""
    return msgspec.json.encode(msgspec.json.decode((DATA / f"{name}.json").read_bytes()))


def stored(key: str, **fields: str) -> ObjectStored:
    """What is expected of an object of the bucket photos."""
    return ObjectStored(bucket="photos", key=key, **fields)


RECORDED: dict[str, list[Finding]] = {
    "minio_access": [stored(FLOWER, etag="b1946ac92492d2347c6235b4d2611184", sequencer="18F5B4E2C0A1B2C3")],
    "minio_namespace": [
        stored(
            "in/100%+.jpg",
            version="8d6b2c1e-52c3-4f4e-8d34-3a1f0a9d1c77",
            etag="d41d8cd98f00b204e9800998ecf8427e-2",
            sequencer="18F5B4E2C0A1B2C4",
        )
    ],
    "minio_webhook": [stored("in/cat.jpg", etag="b1946ac92492d2347c6235b4d2611184", sequencer="18F5B4E2C0A1B2C3")],
    "s3_sqs": [stored(FLOWER, etag="b21b84d653bb07b05b1e6b33684dc11b", sequencer="0C0F6F405D6ED209E1"), REMOVED],
    "s3_test": [TEST],
    "sns": [
        stored(
            "in/copy.jpg",
            version="096fKKXTRTtl3on89fVO.nfljtsv6qko",
            etag="b21b84d653bb07b05b1e6b33684dc11b",
            sequencer="0C0F6F405D6ED209E1",
        )
    ],
    "eventbridge": [
        stored(
            "in/red flower + 100%2B 猫.jpg",
            version="IYV3p45BT0ac8hjHg1houSdS1a.Mro8e",
            etag="b1946ac92492d2347c6235b4d2611184",
            sequencer="617f08299329d189",
        )
    ],
    "eventbridge_deleted": [REMOVED],
    "oss_smq": [
        stored("in/熊猫 100%2B+.jpg", etag="688A7BF4F233DC9C88A80BF985AB7329", sequencer="58F9FF2D3DF792092E12044C"),
        OTHER,
        REMOVED,
    ],
    "oss_eventbridge": [
        stored("in/panda.jpg", etag="63C6A0BC9B3AC12C06D44CE3A3C27D32", sequencer="69B1007D3F26E43331A5F0A8")
    ],
}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_message_is_read(name: str) -> None:
    """Also in base64, as SMQ sends it to a port."""
    assert read_message(raw(name)) == RECORDED[name]
    assert read_message(raw(name).decode()) == RECORDED[name]
    assert read_message(base64.b64encode(raw(name))) == RECORDED[name]


def test_every_recorded_file_has_an_expectation() -> None:
    """So that no file is forgotten."""
    assert {path.stem for path in DATA.glob("*.json")} == set(RECORDED)


@pytest.mark.parametrize("write", [to_binary_event, to_structured_event], ids=["binary", "structured"])
@pytest.mark.parametrize("name", ["oss_eventbridge", "s3_sqs", "eventbridge"])
def test_cloud_event_is_read(name: str, write: Any) -> None:
    """As the SDK of CloudEvents writes it, with the record or a whole message as its data."""
    data = json.loads(raw(name))
    data = data.get("data", data) if name == "oss_eventbridge" else data
    attributes = {
        "specversion": "1.0",
        "id": "1",
        "source": "store",
        "type": "x",
        "datacontenttype": "application/json",
    }
    message = write(CloudEvent(attributes, data))
    headers = {header.lower(): value for header, value in message.headers.items()}
    assert read_cloud_event(headers, message.body) == RECORDED[name]


def test_cloud_events_may_come_in_a_batch() -> None:
    """And as data in base64, or as text."""
    event = json.loads(raw("oss_eventbridge"))
    data = json.dumps(event.pop("data"))
    batch = [event | {"data_base64": base64.b64encode(data.encode()).decode()}, event | {"data": data}]
    headers = {"content-type": "application/cloudevents-batch+json"}
    assert read_cloud_event(headers, json.dumps(batch).encode()) == 2 * RECORDED["oss_eventbridge"]


def test_id_of_a_cloud_event_stands_for_a_sequencer() -> None:
    """Where the record has neither that nor the id of a request."""
    record = {"eventName": "ObjectCreated:Put", "s3": {"bucket": {"name": "b"}, "object": {"key": "k"}}}
    headers = {"ce-specversion": "1.0", "ce-id": "7", "ce-source": "/store", "ce-type": "x"}
    [found] = read_cloud_event(headers, json.dumps(record).encode())
    assert found == ObjectStored(bucket="b", key="k", sequencer="/store 7")
    structured = {"specversion": "1.0", "id": "7", "source": "/store", "type": "x", "data": record}
    assert read_message(json.dumps(structured).encode()) == [found]
    assert read_cloud_event(headers | {"ce-id": ""}, b"{}") == [Unreadable("expected the header ce-id of a CloudEvent")]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("s3:ObjectCreated:PutTagging", OTHER),
        ("s3:ObjectCreated:PutRetention", OTHER),
        ("ObjectCreated:UploadPart", OTHER),
        ("ObjectCreated:UploadPartCopy", OTHER),
        ("s3:ObjectAccessed:Get", OTHER),
        ("ObjectRestore:Completed", OTHER),
        ("s3:ObjectRemoved:Delete", REMOVED),
        ("ObjectRemoved:AbortMultipartUpload", REMOVED),
        ("s3:LifecycleDelMarkerExpiration:Delete", OTHER),
    ],
)
def test_other_events_become_no_job(name: str, expected: Finding) -> None:
    """The object is unchanged, incomplete or gone."""
    message = json.loads(raw("minio_webhook"))
    message["Records"][0]["eventName"] = name
    assert read_message(json.dumps(message)) == [expected]


def record(key: Any, bucket: Any = "b", **fields: Any) -> dict[str, Any]:
    """One record of S3."""
    return {"eventName": "ObjectCreated:Put", "s3": {"bucket": {"name": bucket}, "object": {"key": key, **fields}}}


def test_version_null_is_none() -> None:
    """S3 and Huawei write it for a bucket without versions."""
    [found] = read_message(json.dumps({"Records": [record("k", versionId="null", eTag='"e"', sequencer="1")]}))
    assert found == ObjectStored(bucket="b", key="k", etag="e", sequencer="1")


WRONG = {
    "empty": (b"", "expected JSON"),
    "no-json": (b"{", "expected JSON"),
    "no-utf8": (b'{"Records": "\xff"}', "expected JSON"),
    "a-number": (b"7", "expected JSON"),
    "text": (b"hello world!", "expected JSON, or JSON in base64"),
    "other-object": (b'{"a": 1, "b": 2}', "got an object with a, b"),
    "long-name": (b'{"' + b"a" * 10_000 + b'": 1}', f"got an object with {'a' * 40}"),
    "empty-object": (b"{}", "got an object with no names"),
    "no-records": (b'{"Records": []}', "expected records, got an empty list"),
    "a-null": (b"[null]", "expected an object or a list of JSON, got NoneType"),
    "too-deep": (b"[" * 9 + b"]" * 9, "within 5 envelopes"),
    "much-too-deep": (b"[" * 100_000, "expected JSON"),
    "subscription": (b'{"Type": "SubscriptionConfirmation"}', "SubscribeURL"),
    "no-data": (b'{"specversion": "1.0", "id": "1", "source": "s"}', "got NoneType"),
    "no-bucket": (json.dumps([record("k", bucket=None)]).encode(), "expected a text in name, got None"),
    "no-key": (json.dumps([record(7)]).encode(), "expected a text in key, got 7"),
    "no-name": (b'{"s3": {}}', "expected a text in eventName"),
    "no-object": (
        b'{"eventName": "ObjectCreated:Put", "s3": {"object": []}}',
        "expected an object in object, got list",
    ),
    "odd-url-encoding": (json.dumps([record("%ff.jpg")]).encode(), "expected a key in UTF-8"),
    "control": (json.dumps([record("a%0Ab.jpg")]).encode(), "U+000A"),
    "version-in-key": (json.dumps([record("a%3FversionId%3Db")]).encode(), "without ?versionId="),
    "odd-bucket": (json.dumps([record("k", bucket="a@b")]).encode(), "expected a bucket of letters and digits"),
    "too-large": (b" " * (MAX_BYTES + 1), f"expected a message of at most {MAX_BYTES} bytes, got {MAX_BYTES + 1}"),
    "too-many": (b"[" + b'{"Event": "s3:TestEvent"},' * MAX_RECORDS + b"0]", "at most 10000 records"),
}


@pytest.mark.parametrize("name", WRONG)
def test_unreadable_message_says_what_was_expected(name: str) -> None:
    """It never raises."""
    body, expected = WRONG[name]
    last = read_message(body)[-1]
    assert isinstance(last, Unreadable)
    assert expected in last.reason
    assert len(last.reason) < 500


def test_unreadable_record_leaves_the_others() -> None:
    """In their order."""
    found = read_message(json.dumps({"Records": [record("a"), record(None), record("b")]}))
    assert [type(each) for each in found] == [ObjectStored, Unreadable, ObjectStored]


def test_access_event_may_begin_with_its_time() -> None:
    """As MinIO's documentation describes it."""
    [event] = json.loads(raw("minio_access"))
    assert read_message(json.dumps([event["EventTime"], event["Event"]])) == RECORDED["minio_access"]
    assert read_message(json.dumps([event["EventTime"], event["Event"][0]])) == RECORDED["minio_access"]


def test_folder_of_a_console_is_ignored() -> None:
    """It has no bytes."""
    assert read_message(json.dumps([record("in%2F")])) == [OTHER]


@given(st.text(KEY_CHARS, min_size=1, max_size=200))
def test_encoded_key_is_read_as_it_was(key: str) -> None:
    """Any key, URL-encoded by S3 and MinIO and plain by EventBridge, has the same id; or neither is readable."""
    event = {
        "detail-type": "Object Created",
        "detail": {"bucket": {"name": "b"}, "object": {"key": key, "etag": "e", "sequencer": "1"}},
    }
    [by_s3] = read_message(json.dumps(record(quote_plus(key), eTag="e", sequencer="1")))
    [by_eventbridge] = read_message(json.dumps(event))
    assert by_s3 == by_eventbridge
    if isinstance(by_s3, ObjectStored):
        assert by_s3.key == key
        assert reference_error(by_s3.reference()) is None
        assert by_s3.reference() == f"s3://b/{key}"


@given(st.binary(max_size=300))
def test_any_bytes_are_read_without_an_exception(body: bytes) -> None:
    """There is at least one finding."""
    assert read_message(body)
    assert read_cloud_event({"ce-specversion": "1.0", "ce-id": "1", "ce-source": "s", "ce-type": "t"}, body)


NAMES = st.sampled_from(["Records", "Event", "events", "s3", "oss", "object", "bucket", "name", "key", "eventName"])
NAMES |= st.sampled_from(["detail", "detail-type", "data", "specversion", "Type", "Message"])
VALUES = st.sampled_from(["ObjectCreated:Put", "Notification", "Object Created", "s3:TestEvent", "b", "{}", ""])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | VALUES | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=5),
    max_leaves=20,
)


@given(JSON)
def test_any_json_is_read_without_an_exception(value: Any) -> None:
    """Also where the names are right and the types are wrong."""
    found = read_message(json.dumps(value))
    assert found
    assert all(isinstance(each, ObjectStored | Ignored | Unreadable) for each in found)
